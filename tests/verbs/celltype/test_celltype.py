"""`stsr celltype` on a small section with known cell types, and on real cells."""

import hashlib
import json

import anndata
import numpy as np
import pandas as pd
import pytest
import typer
from typer.testing import CliRunner

from stsr.cli.celltype import celltype as command
from stsr.errors import StsrError, UsageError
from stsr.geometry.grid import Grid
from stsr.store import catalogue, elements, places, publishing
from stsr.store.section import open_section
from stsr.verbs.celltype import model
from stsr.verbs.celltype.verb import celltype

TYPES = ["Fibroblast", "Malignant", "T_cell"]
GENES = [f"{kind[0]}{number}" for kind in TYPES for number in range(4)]
GRID = Grid(-10.0, 20.0, 10.0, 40, 40)


def true_types() -> np.ndarray:
    """(40, 40) index into TYPES: two halves and a square of T cells."""
    kinds = np.zeros((40, 40), int)
    kinds[:, 20:] = 1
    kinds[5:15, 5:15] = 2
    return kinds


def signatures() -> np.ndarray:
    """(12, 3): each type has four genes of its own, and some of all others."""
    return np.kron(np.eye(3), np.full((4, 1), 9.0)) + 1


EMPTY_ROWS, GLASS_COLUMNS = slice(36, 40), slice(38, 40)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A store with a predicted map and its spread, the measured one, tissue, H&E and a table of cells."""
    from spatialdata import SpatialData
    from spatialdata.models import Image2DModel

    folder = tmp_path_factory.mktemp("types")
    kinds = true_types()
    maps = (4.0 * signatures()[:, kinds]).astype(np.float32)  # (g, y, x); 192 counts a bin
    maps[:, EMPTY_ROWS] *= 0.005
    tissue = np.ones((40, 40), bool)
    tissue[:, GLASS_COLUMNS] = False
    place = elements.placed(GRID.bin_to_um)

    def image(values):
        return Image2DModel.parse(values, dims=("c", "y", "x"), c_coords=GENES, transformations=place)

    he = Image2DModel.parse(
        np.full((3, 80, 80), 200, np.uint8),
        dims=("c", "y", "x"),
        transformations=elements.placed(GRID.at(5.0).bin_to_um),
    )
    measured = np.random.default_rng(0).poisson(maps).astype(np.uint16)
    centres = np.array([[50.0, 300.0], [300.0, 100.0], [90.0, 120.0], [30.0, 30.0]])
    rows, columns, _ = GRID.rows_columns(*centres.T)
    cells = anndata.AnnData(
        maps[:, rows, columns].T.copy(),
        obs=pd.DataFrame(index=[f"cell{number}" for number in range(4)]),
        var=pd.DataFrame(index=GENES),
    )
    sdata = SpatialData.init_from_elements(
        {
            "he": he,
            "hr_10um": image(measured),
            "superres_x10": image(maps),
            "superres_x10_sd": image(0.3 * maps),
            "tissue": elements.labels(tissue, GRID),
            "cells": elements.spot_shapes(centres, "disc", 12.0, cells.obs_names),
            "cells_x10": elements.table(cells, "cells", centres),
        }
    )
    made = {
        name: {"origin": "predicted", "command": "superres"} for name in ("superres_x10", "superres_x10_sd")
    }
    made["cells_x10"] = {"origin": "predicted", "command": "singlecell"}
    publishing.create(folder / "s.zarr", sdata, made)
    pd.DataFrame(signatures(), GENES, TYPES).to_csv(folder / "reference.csv")
    markers = {kind: [gene for gene in GENES if gene[0] == kind[0]] for kind in TYPES}
    (folder / "markers.json").write_text(json.dumps(markers))
    return folder


@pytest.fixture
def here(prepared, tmp_path, monkeypatch):
    """A working folder with the section ``s.zarr``, ``reference.csv`` and ``markers.json``."""
    import shutil

    shutil.copytree(prepared, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def labels(element="celltype_x10"):
    return np.asarray(open_section("s.zarr").sdata.labels[element])


def expected() -> np.ndarray:
    """Codes: 0 where there are hardly any counts, or no tissue."""
    codes = true_types() + 1
    codes[EMPTY_ROWS] = 0
    codes[:, GLASS_COLUMNS] = 0
    return codes


@pytest.mark.parametrize("source", [None, "hr_10um"])
@pytest.mark.parametrize("way", [{"reference": "reference.csv"}, {"markers": "markers.json"}])
def test_types_are_where_they_are(here, way, source):
    made = celltype("s.zarr", source=source, draws=2, **way)
    np.testing.assert_array_equal(labels(), expected())
    assert made.source == (source or "superres_x10") and list(made.types) == TYPES
    numbers = np.bincount(expected().ravel(), minlength=4)[1:]
    assert list(made.types.values()) == numbers.tolist()
    assert made.unassigned == 4 * 38  # bins with hardly any counts; bins outside of tissue are not counted
    assert made.confidence > 0.9


def test_clusters_are_the_types(here):
    pytest.importorskip("igraph", reason="scanpy's Leiden runs on it")
    made = celltype("s.zarr", source="hr_10um", resolution=0.2, draws=0)
    assert list(made.types) == ["cluster 1", "cluster 2", "cluster 3"]
    assert pd.crosstab(labels().ravel(), expected().ravel()).gt(0).sum().sum() == 4  # one to one
    shown = open_section("s.zarr").sdata.tables["celltype_x10_table"].obs["genes"]
    assert {frozenset(genes.split(", ")[:4]) for genes in shown} == {
        frozenset(GENES[first : first + 4]) for first in (0, 4, 8)
    }


def test_cells_get_types_too(here):
    made = celltype("s.zarr", reference="reference.csv", per="cell", min_counts=2)
    table = open_section("s.zarr").sdata.tables["celltype_x10_cells"]
    assert made.element == "celltype_x10_cells" and made.source == "cells_x10"
    assert list(table.obs["celltype"]) == ["Fibroblast", "Malignant", "T_cell", "Fibroblast"]
    assert table.uns["spatialdata_attrs"]["region"] == "cells" and made.confidence is None
    assert "confidence" not in table.obs  # the standard deviation of these counts is not known


def test_the_result_opens_elsewhere(here):
    import scanpy as sc
    import spatialdata
    import squidpy as sq

    celltype("s.zarr", reference="reference.csv", draws=2)
    celltype("s.zarr", reference="reference.csv", per="cell")
    sdata = spatialdata.read_zarr("s.zarr")
    bins, types = sdata.tables["celltype_x10_bins"], sdata.tables["celltype_x10_table"]
    extent = spatialdata.get_extent(sdata["celltype_x10"], coordinate_system="global")
    np.testing.assert_allclose([*extent["x"], *extent["y"]], [-10, 390, 20, 420])
    _, annotation = spatialdata.join_spatialelement_table(
        sdata, spatial_element_names="celltype_x10", table_name="celltype_x10_table", how="left"
    )
    assert list(annotation.obs["celltype"]) == TYPES == list(types.obs_names)
    assert list(bins.var_names) == TYPES
    np.testing.assert_allclose(bins.X.sum(1), 1, atol=1e-5)
    np.testing.assert_array_equal(
        bins.obsm["proportions"]["T_cell"], sc.get.obs_df(bins, ["T_cell"])["T_cell"]
    )
    np.testing.assert_allclose(bins.obsm["spatial"][0], [-5, 25])
    sc.pl.embedding(bins, "spatial", color=["celltype", "T_cell"], show=False)
    sq.gr.spatial_neighbors(bins, coord_type="generic", n_neighs=4)
    sq.gr.nhood_enrichment(bins, "celltype", n_perms=5, show_progress_bar=False)
    assert np.isfinite(bins.uns["celltype_nhood_enrichment"]["count"]).all()
    matched, _ = spatialdata.match_element_to_table(sdata, "cells", "celltype_x10_cells")
    assert len(matched["cells"]) == 4


def test_it_draws_in_spatialdata_plot(here, monkeypatch):
    plot = pytest.importorskip("spatialdata_plot")
    assert plot is not None
    import spatialdata
    from matplotlib import pyplot

    monkeypatch.setattr("matplotlib.rcParams", pyplot.rcParams)
    celltype("s.zarr", markers="markers.json", draws=0)
    sdata = spatialdata.read_zarr("s.zarr")
    _, axis = pyplot.subplots()
    sdata.pl.render_labels("celltype_x10", color="celltype", table_name="celltype_x10_table").pl.show(ax=axis)
    shown = {text.get_text() for text in axis.get_legend().get_texts()}
    pyplot.close("all")
    assert set(TYPES) <= shown


@pytest.mark.parametrize("per", ["bin", "cell"])
def test_spatialdata_plot_colours_each_type_as_the_table_says(here, monkeypatch, per):
    """The first type, Absent, does not occur: the others must keep their colours."""
    pytest.importorskip("spatialdata_plot")
    import spatialdata
    from matplotlib import pyplot

    monkeypatch.setattr("matplotlib.rcParams", pyplot.rcParams)
    markers = {"Absent": GENES[:1], **json.loads((here / "markers.json").read_text())}
    markers["Fibroblast"] = GENES[1:4]
    (here / "five.json").write_text(json.dumps(markers))
    celltype("s.zarr", markers="five.json", per=per, draws=0, min_probability=0.4)
    sdata = spatialdata.read_zarr("s.zarr")
    if per == "cell":
        name, plot = (
            "celltype_x10_cells",
            sdata.pl.render_shapes("cells", "celltype", table_name="celltype_x10_cells"),
        )
    else:
        name = "celltype_x10_bins"
        plot = sdata.pl.render_labels("celltype_x10_bin_ids", "celltype", table_name=name, fill_alpha=1.0)
    table = sdata.tables[name]
    assert len(table.obs["celltype"].cat.categories) == len(table.uns["celltype_colors"])
    told = dict(zip(table.obs["celltype"].cat.categories, table.uns["celltype_colors"], strict=True))
    expected = {kind: colour for kind, colour in zip(TYPES, model.colours(TYPES), strict=True)}
    assert {kind: told[kind] for kind in TYPES} == expected
    figure, axis = pyplot.subplots(dpi=150)
    plot.pl.show(ax=axis)
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())
    for kind in TYPES:
        for x, y in table.obsm["spatial"][(table.obs["celltype"] == kind).to_numpy()][:3]:
            column, row = axis.transData.transform((x, y))
            shown = pixels[len(pixels) - 1 - round(row), round(column), :3]
            assert "#{:02x}{:02x}{:02x}".format(*shown) == expected[kind], kind
    pyplot.close("all")


def test_colours_are_the_same_everywhere(here):
    celltype("s.zarr", reference="reference.csv", draws=0)
    celltype("s.zarr", markers="markers.json", per="cell", name="again")
    tables = open_section("s.zarr").sdata.tables
    found = [
        dict(
            zip(tables[name].obs["celltype"].cat.categories, tables[name].uns["celltype_colors"], strict=True)
        )
        for name in ("celltype_x10_bins", "celltype_x10_table", "again")
    ]
    for kind in TYPES:
        assert len({colours[kind] for colours in found}) == 1


@pytest.mark.parametrize("shape", ["box", "polygon"])
def test_spatial_queries_cut_the_results(here, tmp_path, shape):
    import shapely
    import spatialdata

    celltype("s.zarr", reference="reference.csv", draws=0)
    celltype("s.zarr", reference="reference.csv", per="cell")
    whole = spatialdata.read_zarr("s.zarr")
    x0, y0, x1, y1 = 40.0, 80.0, 140.0, 170.0  # bins and one of the four cells
    if shape == "box":
        part = spatialdata.bounding_box_query(
            whole,
            axes=("x", "y"),
            min_coordinate=[x0, y0],
            max_coordinate=[x1, y1],
            target_coordinate_system="global",
        )
    else:
        part = spatialdata.polygon_query(
            whole, shapely.box(x0, y0, x1, y1), target_coordinate_system="global"
        )
    part.write(tmp_path / "part.zarr")
    tables = spatialdata.read_zarr(tmp_path / "part.zarr").tables
    x, y = whole.tables["celltype_x10_bins"].obsm["spatial"].T
    inside = (x > x0) & (x < x1) & (y > y0) & (y < y1)
    assert inside.sum() == 90
    bins = tables["celltype_x10_bins"]
    pd.testing.assert_frame_equal(
        bins.to_df(), whole.tables["celltype_x10_bins"][inside].to_df(), check_dtype=False
    )
    assert list(tables["celltype_x10_cells"].obs_names) == ["cell2"]
    assert spatialdata.get_element_annotators(whole, "celltype_x10") == {"celltype_x10_table"}


def test_without_a_mask_only_bins_near_spots_get_types(here):
    """The supported bins, as in gec."""
    import spatialdata

    sdata = spatialdata.read_zarr("s.zarr")
    centres = np.array([[60.0, 100.0], [160.0, 100.0]])
    counts = anndata.AnnData(
        np.ones((2, 12), np.float32), pd.DataFrame(index=["a", "b"]), pd.DataFrame(index=GENES)
    )
    for name in ("tissue", "superres_x10_sd"):
        del sdata[name]
    sdata["spots"] = elements.spot_shapes(centres, "disc", 55.0, counts.obs_names)
    sdata["spots_table"] = elements.table(counts, "spots", centres)
    publishing.create("bare.zarr", sdata, open_section("s.zarr").provenance)
    section = open_section("bare.zarr")
    supported = section.support(GRID)
    assert 0 < supported.sum() < supported.size / 2
    celltype("bare.zarr", markers="markers.json", draws=0, min_counts=0, min_probability=0)
    codes = np.asarray(open_section("bare.zarr").sdata.labels["celltype_x10"])
    np.testing.assert_array_equal(codes > 0, supported)
    assert places.bins_of(section, "superres_x10").count == supported.sum()


def test_measured_cells_are_typed_where_no_others_are(here):
    import spatialdata

    sdata = spatialdata.read_zarr("s.zarr")
    sdata["cells_table"] = sdata.tables["cells_x10"].copy()
    del sdata["cells_x10"]
    publishing.create("measured.zarr", sdata, {})
    made = celltype("measured.zarr", reference="reference.csv", per="cell", draws=2)
    assert made.source == "cells_table" and list(made.types.values()) == [2, 1, 1]
    assert made.confidence is not None, "measured counts have a Poisson standard deviation"


def test_the_newest_cells_are_read(here):
    table = open_section("s.zarr").sdata.tables["cells_x10"]
    made = {"origin": "predicted", "command": "singlecell"}
    publishing.publish(
        "s.zarr", {"cells_x20": table.copy(), "cells_table": table.copy()}, {"cells_x20": made}
    )
    assert places.newest_cells(open_section("s.zarr")) == "cells_x20"
    publishing.publish("s.zarr", {"cells_x10": table.copy()}, {"cells_x10": made}, overwrite=True)
    assert places.newest_cells(open_section("s.zarr")) == "cells_x10"


def test_running_again(here):
    def read():
        return open_section("s.zarr").sdata.tables["celltype_x10_bins"]

    celltype("s.zarr", reference="reference.csv", draws=3, seed=1)
    first = read().copy()
    with pytest.raises(UsageError, match="--overwrite"):
        celltype("s.zarr", reference="reference.csv")
    celltype("s.zarr", reference="reference.csv", draws=3, seed=1, overwrite=True)
    pd.testing.assert_frame_equal(first.obs, read().obs)
    celltype("s.zarr", markers="markers.json", overwrite=True, draws=0)
    made = open_section("s.zarr").provenance["celltype_x10"]
    assert (made["command"], made["method"], made["file"]) == ("celltype", "markers", "markers.json")
    assert made["source"] == "superres_x10" and made["draws"] == 0 and len(made["sha256"]) == 12


def test_the_work_may_be_cut_anyhow(here, monkeypatch):
    celltype("s.zarr", reference="reference.csv", name="whole", draws=0)
    monkeypatch.setattr(places, "_CHUNK_BINS", 16)
    monkeypatch.setattr(places, "_LEAST_BINS", 7)
    monkeypatch.setattr(places, "_BLOCK_BYTES", 1)
    celltype("s.zarr", reference="reference.csv", name="cut", draws=0)
    np.testing.assert_array_equal(labels("whole"), labels("cut"))
    tables = open_section("s.zarr").sdata.tables
    np.testing.assert_allclose(tables["whole_bins"].X, tables["cut_bins"].X, atol=2e-3)


def test_genes_that_platforms_see_differently_are_left_out(here):
    reference = pd.read_csv("reference.csv", index_col=0)
    reference.loc["T3"] /= 5000
    reference.loc["elsewhere"] = 7.0
    reference.to_csv("odd.csv")
    made = celltype("s.zarr", reference="odd.csv", draws=0)
    assert made.genes == 11 and made.notes[-1].endswith("left out: T3")
    assert "12 of the reference's 13 genes" in made.notes[0]
    np.testing.assert_array_equal(labels(), expected())


# ------------------------------------------------------------------------------------------ the command line

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(command)


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_stdout_is_for_the_next_command(here):
    result = run("s.zarr", "--markers", "markers.json", "--draws", 0)
    assert (result.exit_code, result.stdout) == (0, "celltype_x10\n")
    result = run(
        "s.zarr", "--reference", "reference.csv", "--per", "cell", "--figure", "f.png", "--json", "-q"
    )
    told = json.loads(result.stdout)
    assert told["types"] == {"Fibroblast": 2, "Malignant": 1, "T_cell": 1}
    assert told["element"] == "celltype_x10_cells" and told["figure"] == "f.png" and result.stderr == ""
    assert (here / "f.png").stat().st_size > 10_000


def test_the_figure_shows_the_types(here):
    from PIL import Image as Pillow

    run("s.zarr", "--markers", "markers.json", "--draws", 0, "--figure", "f.png")
    pixels = np.asarray(Pillow.open("f.png").convert("RGB")).reshape(-1, 3)
    colours = open_section("s.zarr").sdata.tables["celltype_x10_table"].uns["celltype_colors"]
    parts = [(pixels == [int(colour[i : i + 2], 16) for i in (1, 3, 5)]).all(1).mean() for colour in colours]
    numbers = np.bincount(expected().ravel(), minlength=4)[1:]
    assert min(parts) > 0.005
    assert np.argsort(parts).tolist() == np.argsort(numbers).tolist()


def contents(folder):
    return {
        str(path.relative_to(folder)): hashlib.md5(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize(
    ("options", "code", "word"),
    [
        (["--reference", "nowhere.csv"], 2, "nowhere.csv"),
        (["--reference", "broken.csv"], 2, "broken.csv"),
        (["--reference", "one.csv"], 2, "1 cell type"),
        (["--reference", "negative.csv"], 2, "negative"),
        (["--reference", "strange.csv"], 2, "0 of the 12 genes"),
        (["--reference", "reference.csv", "--label-key", "kind"], 2, "--label-key"),
        (["--label-key", "kind"], 2, "--reference"),
        (["--reference", "reference.csv", "--markers", "markers.json"], 2, "one of them"),
        (["--markers", "broken.csv"], 2, "markers"),
        (["--markers", "markers.json", "--min-probability", 1.5], 2, "--min-probability"),
        (["--markers", "markers.json", "--min-counts", "nan"], 2, "--min-counts"),
        (["--markers", "markers.json", "--from", "nothing"], 2, "'nothing'"),
        (["--markers", "markers.json", "--from", "cells", "--per", "cell"], 2, "'cells'"),
        (["--markers", "markers.json", "--name", "hr_5um"], 2, "--name"),
        (["--markers", "markers.json", "--name", "cells_x10", "--per", "cell"], 2, "--overwrite"),
        (["--markers", "markers.json", "--figure", "f.xyz"], 2, "f.xyz"),
        (["--resolution=-1"], 2, "--resolution"),
    ],
)
def test_bad_input(here, options, code, word):
    (here / "broken.csv").write_bytes(b"\x00\x01\xff")
    frame = pd.read_csv("reference.csv", index_col=0)
    frame[["T_cell"]].to_csv("one.csv")
    (-frame).to_csv("negative.csv")
    frame.rename(index=str.swapcase).rename(index="x{}".format).to_csv("strange.csv")
    before = contents(here)
    result = run("s.zarr", *options)
    told = result.stderr.strip()
    assert (result.exit_code, result.stdout) == (code, ""), told
    assert told.startswith("error: ") and "\n" not in told and "internal" not in told
    assert word in told
    assert contents(here) == before


def test_a_section_without_a_map(here, monkeypatch):
    with pytest.raises(StsrError, match="no section at"):
        celltype("nowhere.zarr", markers="markers.json")
    monkeypatch.setattr(catalogue.Catalogue, "superres_elements", [])
    with pytest.raises(StsrError, match="stsr superres"):
        celltype("s.zarr", markers="markers.json")


# ------------------------------------------------------------------------------------------------ real tissue


@pytest.mark.real
def test_real_cells_have_the_markers_of_their_types(real_data, tmp_path):
    from stsr.verbs.prepare.verb import prepare

    store = prepare(real_data / "breast" / "xenium_same_he", tmp_path / "same.zarr")
    reference = real_data / "reference" / "breast_scrna_pseudobulk_counts.csv"
    celltype(store, reference=reference, source="cells_table", per="cell", name="types", draws=0)
    tables = open_section(store).sdata.tables
    best = {
        "EPCAM": "Malignant", "POSTN": "Fibroblast", "CD3E": "T_cell", "MS4A1": "B_cell", "CD163": "Macrophage",
        "PECAM1": "Endothelial", "PDGFRB": "Pericyte", "MZB1": "Plasmablast", "NKG7": "NK_cell", "LYZ": "Monocyte",
    }  # fmt: skip
    counts = pd.DataFrame(tables["cells_table"][:, list(best)].X.toarray(), columns=list(best))
    means = counts.groupby(tables["types"].obs["celltype"].to_numpy(), observed=True).mean()
    assert means.idxmax().to_dict() == best
