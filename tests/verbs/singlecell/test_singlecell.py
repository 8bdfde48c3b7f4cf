"""`stsr singlecell` on simulated sections: the table, its mass, other tools, bad input."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import shapely
import spatialdata
from typer.testing import CliRunner

from stsr.cli.app import app
from stsr.errors import StsrError, UsageError
from stsr.geometry.grid import Grid
from stsr.simulate import write_xenium
from stsr.store import publishing
from stsr.store.elements import placed
from stsr.store.section import Section, open_section
from stsr.store.writer import MapWriter
from stsr.verbs.prepare.verb import prepare
from stsr.verbs.singlecell.figure import cells_figure
from stsr.verbs.singlecell.verb import singlecell

GENES = ["GATA3", "LUM", "LYZ"]


@pytest.fixture(scope="module")
def made(tissue, tmp_path_factory):
    """A section with cells, measured bins, and an inferred map with its spread; tests work on copies."""
    folder = tmp_path_factory.mktemp("singlecell")
    write_xenium(tissue, folder / "run", labels=False)
    store = prepare(folder / "run", folder / "s.zarr", refine=False)
    _write_map(store, open_section(store).hr.grid)
    return store


def _write_map(store, grid, elements=("superres_x10", "superres_x10_sd")):
    rng = np.random.default_rng(0)
    with MapWriter(
        store, elements, GENES, grid, {name: {"command": "superres"} for name in elements}
    ) as writer:
        for name in elements:
            values = rng.gamma(0.7, 1, (len(GENES), *grid.shape))
            writer.write(name, *map(slice, values.shape), values)


@pytest.fixture
def store(made, fresh_copy):
    return fresh_copy(made, "s.zarr")


def table(store, name="cells_x10"):
    return spatialdata.read_zarr(store).tables[name]


# ------------------------------------------------------------------------------------------------------- the table


def test_cells_hold_what_their_areas_of_the_bins_hold(store):
    made = singlecell(store)
    section, found = open_section(store), table(store)
    bins, shapes = section.map("superres_x10"), section.sdata.shapes["cells"]
    assert (made.element, made.annotates, made.source) == ("cells_x10", "cells", "superres_x10")
    assert found.obs_names.tolist() == shapes.index.tolist() and found.var_names.tolist() == GENES
    x, y = np.meshgrid(*bins.grid.centres_um())
    boxes = shapely.box(x - 5, y - 5, x + 5, y + 5)
    values, spread = bins.read(), section.map("superres_x10_sd").read()
    for number in (0, 50, len(shapes) - 1):
        part = shapely.area(shapely.intersection(boxes, shapes.geometry.iloc[number])) / 100
        assert found.X[number] == pytest.approx((values * part).sum((1, 2)), rel=1e-4)
        assert found.layers["sd"][number] == pytest.approx((spread * part).sum((1, 2)), rel=1e-4)
    assert found.obs["area_um2"].to_numpy() == pytest.approx(shapes.area.to_numpy())
    centroid = shapes.geometry.centroid
    assert found.obsm["spatial"] == pytest.approx(np.column_stack([centroid.x, centroid.y]))
    assert found.X.dtype == np.float32


@pytest.mark.parametrize("layer", ["hr_10um", "superres_x10"])
def test_mass_is_kept(store, layer):
    made = singlecell(store, source=layer)
    whole = open_section(store).map(layer).read().sum(dtype=float)
    in_cells = table(store).X.sum(dtype=float)
    assert in_cells == pytest.approx(made.counts_in_cells, rel=1e-6)
    assert in_cells + made.counts_outside == pytest.approx(whole, rel=1e-6)
    record = open_section(store).provenance["cells_x10"]
    assert record["counts_outside"] == made.counts_outside and record["from"] == layer


def test_measured_bins_give_back_measured_cells_better_than_spots(store):
    scores = singlecell(store, source="hr_10um").scores
    of_genes = scores[scores["of"] == "gene"].set_index("name")
    assert set(of_genes.index) == set(GENES) and (scores["of"] == "cell").sum() > 200
    assert of_genes["pcc_hr_10um"].min() > 0.75
    assert (of_genes["pcc_hr_10um"] > of_genes["pcc_spots"] + 0.1).all()
    assert (of_genes["rmse_hr_10um"] < of_genes["rmse_bilinear"]).all()


def test_a_second_run_is_scored_against_measured_cells_and_not_against_the_first(store):
    measured = table(store, "cells_table").X.sum()
    first = singlecell(store, source="hr_10um").scores
    again = singlecell(store, source="hr_10um", overwrite=True).scores
    pd.testing.assert_frame_equal(first, again)
    assert again.loc[again["of"] == "gene", "counts"].sum() == table(store, "cells_table").X.sum() == measured


def test_genes_and_regions_are_chosen(store, tmp_path):
    made = singlecell(
        store,
        source="hr_10um",
        genes=["LUM"],
        name="mine",
        scores=tmp_path / "s.csv",
        score_region=(0, 0, 150, 150),
    )
    assert table(store, "mine").var_names.tolist() == ["LUM"]
    written = pd.read_csv(tmp_path / "s.csv")
    x, y = open_section(store).sdata.tables["mine"].obsm["spatial"].T
    assert made.scored_cells == ((x <= 150) & (y <= 150)).sum() == (written["of"] == "cell").sum()
    assert written["pcc_spots"].to_numpy() == pytest.approx(
        made.scores["pcc_spots"].to_numpy(), nan_ok=True, abs=1e-5
    )


def test_cells_off_the_map_are_left_out_and_not_called_empty(store):
    grid = open_section(store).hr.grid
    _write_map(store, grid.window(0, 0, 10, 20), ["corner"])
    made = singlecell(store, source="corner")
    found = table(store)
    assert made.cells == found.n_obs < len(open_section(store).sdata.shapes["cells"])
    assert any("lie outside of corner" in note for note in made.notes)
    cut = found.obs["outside_map"] > 0
    assert cut.any() and not cut.all() and found.obs["outside_map"].max() < 1
    assert (found.X.sum(1) > 0).all()


def test_cells_outside_the_support_of_a_prediction_are_told(store, monkeypatch):
    section = open_section(store)
    grid, origin = section.hr.grid, {"predicted": "predicted", "told": "measured"}
    for name in origin:
        with MapWriter(store, [name], GENES, grid, {name: {"origin": origin[name]}}) as writer:
            values = np.ones((len(GENES), *grid.shape))
            writer.write(name, *map(slice, values.shape), values)
    monkeypatch.setattr(Section, "support", lambda _, grid: np.indices(grid.shape)[1] < 10)
    predicted = singlecell(store, source="predicted", name="a")
    x0, _, x1, _ = section.sdata.shapes["cells"].bounds.to_numpy().T
    edge = grid.x0_um + 100
    right, cut, left = x0 >= edge, (x0 < edge) & (edge < x1), (x0 > grid.x0_um) & (x1 <= edge)
    outside = table(store, "a").obs["outside_map"].to_numpy()
    assert right.any() and (outside[right] == 1).all() and left.any() and (outside[left] < 1e-9).all()
    assert cut.any() and outside[cut].min() > 0 and outside[cut].max() < 1
    note = next(note for note in predicted.notes if "outside the support" in note)
    assert note.startswith(f"{right.sum()} cells")
    measured = singlecell(store, source="told", name="b")
    assert measured.notes == [] and table(store, "b").obs["outside_map"].max() < 1


# --------------------------------------------------------------------------------------------------- kinds of cells


def test_imported_cells_come_as_new_shapes(store, tmp_path):
    squares = shapely.box([20, 40], [20, 20], [30, 50], [40, 30])
    import geopandas as gpd

    gpd.GeoDataFrame(geometry=squares, index=["a", "b"]).to_parquet(tmp_path / "c.parquet")
    made = singlecell(store, segmentation=tmp_path / "c.parquet")
    sdata = spatialdata.read_zarr(store)
    assert made.annotates == "cells_x10_shapes" and made.scores is None
    assert shapely.equals_exact(sdata.shapes["cells_x10_shapes"].geometry.to_numpy(), squares, 1e-9).all()
    joined = spatialdata.join_spatialelement_table(
        sdata=sdata, spatial_element_names="cells_x10_shapes", table_name="cells_x10"
    )
    assert joined[1].n_obs == 2
    again = singlecell(store, cells="cells_x10_shapes", source="hr_10um", name="more")
    assert again.annotates == "cells_x10_shapes"


def test_labels_of_the_store_are_annotated_themselves(store):
    from spatialdata.models import Labels2DModel

    labels = np.zeros((32, 33), np.int32)
    labels[2:4, 2:5], labels[10:12, 10:12] = 5, 2
    grid = Grid(*open_section(store).hr.grid.bounds_um[:2], 10, 32, 33)
    element = Labels2DModel.parse(labels, dims=("y", "x"), transformations=placed(grid.bin_to_um))
    publishing.publish(store, {"painted": element}, {})
    made = singlecell(store, cells="painted")
    found, values = table(store), open_section(store).map("superres_x10").read()
    assert made.annotates == "painted" and found.obs["instance_id"].tolist() == [2, 5]
    assert found.X[1] == pytest.approx(values[:, 2:4, 2:5].sum((1, 2)), rel=1e-5)
    sdata = spatialdata.read_zarr(store)
    assert spatialdata.get_element_annotators(sdata, "painted") == {"cells_x10"}


def test_nuclei_of_the_image(store):
    made = singlecell(store, segment=True, expand_um=4)
    true = len(open_section(store).sdata.shapes["cells"])
    assert 0.8 * true < made.cells < 1.2 * true
    assert "nuclei of the H&E, grown by 4 um" in open_section(store).provenance["cells_x10"]["cells"]


def test_a_store_whose_units_are_pixels(made, tmp_path):
    """spatialdata_io.xenium keeps cells in um and its coordinate system in pixels of 0.2125 um."""
    spatialdata_io = pytest.importorskip("spatialdata_io")
    path = tmp_path / "foreign.zarr"
    options = dict.fromkeys(["cells_as_circles", "cells_labels", "nucleus_labels", "morphology_focus"], False)
    spatialdata_io.xenium(made.parent / "run", aligned_images=False, morphology_mip=False, **options).write(
        path
    )
    section = open_section(path)
    assert section.frame.um_per_unit == pytest.approx(0.2125, rel=1e-3)
    _write_map(path, open_section(made).hr.grid)
    _write_csv(made, tmp_path / "c.csv")
    singlecell(path)
    singlecell(path, segmentation=tmp_path / "c.csv", name="imported")
    ours = singlecell(shutil.copytree(made, tmp_path / "ours.zarr"))
    theirs, imported, expected = table(path), table(path, "imported"), table(ours.store)
    for found in (theirs, imported):
        np.testing.assert_allclose(found[expected.obs_names].X, expected.X, rtol=1e-3, atol=1e-3)
    sdata = spatialdata.read_zarr(path)
    one, other = (
        spatialdata.get_extent(sdata[n], section.frame.name) for n in ("imported_shapes", "cell_boundaries")
    )
    assert one["x"] == pytest.approx(other["x"], rel=1e-3)


def _write_csv(store, path):
    shapes = open_section(store).sdata.shapes["cells"]
    corners, part = shapely.get_coordinates(shapes.geometry.to_numpy(), return_index=True)
    ids = shapes.index.to_numpy()[part]
    pd.DataFrame({"cell_id": ids, "vertex_x": corners[:, 0], "vertex_y": corners[:, 1]}).to_csv(
        path, index=False
    )


# ------------------------------------------------------------------------------------------------------ other tools


def test_scanpy_and_squidpy_go_on_from_there(store):
    import scanpy
    import squidpy

    singlecell(store)
    found = table(store)
    scanpy.pp.normalize_total(found)
    scanpy.pp.log1p(found)
    scanpy.pp.pca(found, n_comps=2)
    squidpy.gr.spatial_neighbors(found, coord_type="generic", n_neighs=6)
    squidpy.gr.spatial_autocorr(found, mode="moran")
    assert found.uns["moranI"].shape[0] == len(GENES) and np.isfinite(found.obsm["X_pca"]).all()


@pytest.mark.parametrize("region", [None, (50, 50, 200, 150)])
def test_a_figure(store, tmp_path, region):
    from PIL import Image

    singlecell(store)
    path = cells_figure(
        open_section(store), "cells_x10", ["GATA3", "LUM"], tmp_path / "f.png", region_um=region
    )
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    assert pixels.shape[1] > 1200 and np.ptp(pixels, axis=2).max() > 100


# --------------------------------------------------------------------------------------------------- command line


def run(*words):
    return CliRunner().invoke(app, ["singlecell", *map(str, words)])


def test_the_command_says_results_on_stdout_and_words_on_stderr(store, tmp_path):
    plain = run(store, "--from", "hr_10um", "--figure", tmp_path / "f.png", "--figure-genes", "LUM")
    assert (plain.exit_code, plain.stdout) == (0, "cells_x10\n")
    assert "of its counts lie in cells" in plain.stderr and "hr_10um against measured cells" in plain.stderr
    assert (tmp_path / "f.png").exists()
    told = json.loads(run(store, "--from", "hr_10um", "--overwrite", "--json", "-q").stdout)
    assert told["element"] == "cells_x10" and told["mean_scores"]["gene"]["pcc_hr_10um"] > 0.5


def contents(folder):
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--from", "nothing"], 2, "no map 'nothing'"),
        (["--from", "superres_x10_sd"], 2, "give --from superres_x10"),
        (["--from", "cells"], 2, "no map 'cells'"),
        (["--genes", "GATA"], 2, "did you mean GATA3"),
        (["--genes", "LUM", "--figure", "f.png", "--figure-genes", "GATA3"], 2, "--genes"),
        (["--figure-genes", "LUM"], 2, "--figure FILE.png"),
        (["--figure", "f.bmp3"], 2, ".png"),
        (["--cells", "nothing"], 2, "no shapes or labels 'nothing'"),
        (["--cells", "cells", "--segment"], 2, "exclude each other"),
        (["--segmentation", "nowhere.geojson"], 1, "check --segmentation"),
        (["--segmentation", "broken.geojson"], 1, "broken.geojson is damaged"),
        (["--segmentation", "empty.geojson"], 1, "contains no cell outlines"),
        (["--segmentation", "columns.csv"], 1, "'vertex_x'"),
        (["--segmentation", "cut.parquet"], 1, "cut.parquet is damaged"),
        (["--segmentation", "cells.doc"], 2, "give .geojson"),
        (["--segmentation", "small.tif"], 2, "H&E's own pixels"),
        (["--segmentation", "far.csv"], 1, "--coordinates"),
        (["--segment", "--expand-um", 99], 2, "--expand-um"),
        (["--segment", "--scores", "s.csv"], 2, "no measured counts"),
        (["--score-region", "0,0,1"], 2, "--score-region is"),
        (["--score-region", "9000,9000,9001,9001"], 2, "--score-region"),
        (["--scores", "nowhere/s.csv"], 2, "another path for --scores"),
        (["--name", "cells"], 2, "reserved for measured data"),
        (["--name", "superres_x10"], 2, "--overwrite"),
    ],
)
def test_bad_input_ends_in_a_sentence_and_leaves_nothing(store, tmp_path, monkeypatch, words, code, message):
    import tifffile

    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.geojson").write_text('{"features": [')
    (tmp_path / "empty.geojson").write_text('{"features": []}')
    (tmp_path / "columns.csv").write_text("cell_id,x,y\na,1,2\n")
    (tmp_path / "far.csv").write_text("cell_id,vertex_x,vertex_y\na,9000,9000\na,9010,9000\na,9000,9010\n")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1half")
    (tmp_path / "cells.doc").write_text("cells")
    tifffile.imwrite(tmp_path / "small.tif", np.ones((9, 9), np.uint8))
    before = contents(tmp_path)
    result = run(store, *words)
    told = result.stderr.strip()
    assert result.exit_code == code, told
    assert told.startswith("error: ") and "\n" not in told and message in told
    assert result.stdout == "" and contents(tmp_path) == before


def test_results_are_replaced_only_on_request(store):
    singlecell(store, genes=["LUM"])
    with pytest.raises(UsageError, match="--overwrite"):
        singlecell(store)
    singlecell(store, overwrite=True)
    assert table(store).n_vars == 3


def test_a_section_without_maps_or_cells(store):
    sdata = spatialdata.read_zarr(store)
    for name in ("superres_x10", "superres_x10_sd", "cells_table", "cells"):
        del sdata[name]
        sdata.delete_element_from_disk(name)
    with pytest.raises(StsrError, match="or add --from hr_10um"):
        singlecell(store)
    with pytest.raises(StsrError, match="--segmentation FILE"):
        singlecell(store, source="hr_10um")


# ------------------------------------------------------------------------------------------------------ real tissue


@pytest.mark.real
def test_bins_of_real_tissue_give_back_the_cells_of_the_instrument(real_data, tmp_path):
    store = prepare(real_data / "breast" / "xenium_same_he", tmp_path / "same.zarr")
    made = singlecell(store, source="hr_10um")
    assert made.counts_in_cells + made.counts_outside == pytest.approx(made.counts_in_map, rel=1e-6)
    of_genes = made.scores[made.scores["of"] == "gene"].set_index("name")
    many = of_genes[of_genes["counts"] > 2000]
    assert of_genes.loc[["GATA3", "TPD52", "SERPINA3"], "pcc_hr_10um"].min() > 0.9
    assert many["pcc_hr_10um"].median() > 0.88  # docs/singlecell.md explains the limit
    assert (many["pcc_hr_10um"] > many["pcc_spots"]).all()
