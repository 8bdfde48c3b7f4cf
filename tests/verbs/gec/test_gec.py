"""`stsr gec` on sections with known correlations: the function and the command."""

import hashlib
import json
import os
import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image as Pillow
from typer.testing import CliRunner

from stsr.cli.app import app
from stsr.errors import StsrError, UsageError
from stsr.geometry.grid import Grid, add_up
from stsr.histology.image import Image
from stsr.progress import silent
from stsr.store import elements, publishing
from stsr.store.parts import Map
from stsr.store.places import BinPlaces, bins_of
from stsr.store.section import Section, open_section
from stsr.verbs.gec import matrices
from stsr.verbs.gec.figure import gec_figure
from stsr.verbs.gec.values import Values
from stsr.verbs.gec.verb import gec
from stsr.verbs.prepare.verb import prepare
from stsr.verbs.superres.verb import superres

GENES = ["A", "SAME", "OPPOSITE", "OTHER", "STILL"]
GRID = Grid(0.0, 0.0, 10.0, 40, 30)


@pytest.fixture(scope="module")
def counts():
    """(5, 40, 30): SAME as A, OPPOSITE to it, OTHER on its own, STILL the same everywhere."""
    rng = np.random.default_rng(0)
    a = rng.integers(0, 9, GRID.shape)
    return np.stack([a, 2 * a, 8 - a, rng.integers(0, 9, GRID.shape), np.full(GRID.shape, 3)])


@pytest.fixture(scope="module")
def hand_made(tmp_path_factory, counts):
    """A store with these counts; outside of tissue A and SAME are opposite."""
    import dask.array as da
    from spatialdata import SpatialData
    from spatialdata.models import Image2DModel

    mask = np.zeros(GRID.shape, bool)
    mask[:36, 4:] = True
    values = counts.copy()
    values[1][~mask] = 99 - values[0][~mask]

    def image(maps):
        transformations = elements.placed(GRID.bin_to_um)
        lazy = da.from_array(maps, chunks=(2, 20, 30))
        return Image2DModel.parse(lazy, dims=("c", "y", "x"), c_coords=GENES, transformations=transformations)

    path = tmp_path_factory.mktemp("hand") / "hand.zarr"
    parts = {"hr_10um": image(values.astype(np.uint16)), "tissue": elements.labels(mask, GRID)}
    publishing.create(path, SpatialData.init_from_elements(parts), {name: {} for name in parts})
    made = {"command": "superres", "method": "none"}
    publishing.publish(path, {"superres_x10": image(values.astype(np.float32))}, {"superres_x10": made})
    return path


@pytest.fixture(scope="module")
def simulated(xenium_section, tmp_path_factory):
    """A simulated section with spots, cells, measured bins and a bilinear map."""
    path = shutil.copytree(xenium_section, tmp_path_factory.mktemp("simulated") / "section.zarr")
    superres(path, method="bilinear", genes=["all"], name="bilinear_x10")
    return path


@pytest.fixture
def store(hand_made, fresh_copy):
    return fresh_copy(hand_made, "s.zarr")


@pytest.fixture
def section(simulated, fresh_copy):
    return fresh_copy(simulated, "x.zarr")


def table_of(result):
    return open_section(result.store).sdata.tables[result.element]


def contents(folder):
    return {
        str(path.relative_to(folder)): hashlib.md5(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in folder.rglob("*")
    }


# ----------------------------------------------------------------------------------------------------- matrices


def test_only_tissue_counts_and_what_does_not_vary_is_left_out(store):
    result = gec(store, source="hr_10um")
    table = table_of(result)
    assert list(table.obs_names) == list(table.var_names) == GENES[:4]
    assert (
        result.places == 36 * 26 and "1 of 5 genes do not vary here and are left out: STILL" in result.notes
    )
    np.testing.assert_allclose(table["A"].X.ravel()[:3], [1, 1, -1], atol=1e-5)
    np.testing.assert_allclose(table["A"].layers["spearman"].ravel()[:3], [1, 1, -1], atol=1e-5)
    assert abs(table["A", "OTHER"].X.item()) < 0.15
    q = pd.DataFrame(table.layers["q"], GENES[:4], GENES[:4])
    assert q.loc["A", "SAME"] < 1e-6 and q.loc["A", "OTHER"] > 0.05
    assert result.correlated == (3, 6)


def test_bins_are_added_up_first_and_a_region_is_by_bin_centres(store, counts):
    result = gec(store, source="hr_10um", bin_um=20, region=(41, 0, 300, 360), genes=["OTHER", "A"])
    assert result.element == "gec_x5" and result.places == 18 * 13
    inside = add_up(counts[[0, 3], :36, 4:], 2).reshape(2, -1)
    assert table_of(result)["A", "OTHER"].X.item() == pytest.approx(np.corrcoef(inside)[0, 1], abs=1e-5)


def test_the_newest_super_resolved_map_is_the_default(store):
    result = gec(store)
    assert result.source == "superres_x10" and result.element == "gec_x10"
    made = open_section(store).provenance["gec_x10"]
    assert made["command"] == "gec" and made["source"] == "superres_x10" and "mean map" in made["values"]
    assert made["places"] == result.places and "Clifford" in made["test"]
    assert any("no evidence" in note for note in result.notes)
    assert not any("no evidence" in note for note in gec(store, source="hr_10um", overwrite=True).notes)


def test_clusters_pairs_and_lags(store):
    result = gec(store, source="hr_10um", lags=[("A", "OTHER")], top=2)
    table = table_of(result)
    order = table.obs_names[np.argsort(table.obs["order"])]
    assert abs(list(order).index("A") - list(order).index("SAME")) == 1
    pairs = table.uns["pairs"]
    assert len(pairs) == 2 and pairs["pearson"].abs().min() > 0.999 and pairs["p_shift"].max() < 0.01
    lags = table.uns["lags"].groupby(["gene_a", "gene_b"])
    assert ("A", "OTHER") in lags.groups and ("A", "SAME") in lags.groups
    curve = lags.get_group(("A", "SAME"))
    assert curve["lag_um"].iloc[0] == 0 and curve["correlation"].iloc[0] == pytest.approx(1, abs=1e-5)
    assert curve["correlation"].iloc[1:6].abs().max() < 0.2


def test_cells(section):
    result = gec(section, per="cell")
    assert result.element == "gec_cells" and result.source == "cells_table" and result.bin_um is None
    measured, table = open_section(section).sdata.tables["cells_table"], table_of(result)
    known = np.corrcoef(measured[:, list(table.obs_names)].X.toarray().T)
    np.testing.assert_allclose(table.X, known, atol=1e-5)
    assert "p_shift" not in table.uns["pairs"] and result.places == measured.n_obs


def test_cells_of_two_tables_are_matched_by_their_name(section):
    whole = open_section(section).sdata.tables["cells_table"]
    turned = whole[::-1].copy()
    publishing.publish(section, {"cells_x10": turned}, {"cells_x10": {"command": "singlecell"}})
    result = gec(section, per="cell", truth="cells_table")
    assert result.source == "cells_x10"
    assert result.agreement[0]["rmse"] == pytest.approx(0, abs=1e-6)
    assert result.agreement[0]["pattern"] == pytest.approx(1)
    publishing.publish(section, {"cells_x5": whole[:-5].copy()}, {"cells_x5": {"command": "singlecell"}})
    with pytest.raises(UsageError, match="lacks cells"):
        gec(section, per="cell", source="cells_x10", truth="cells_x5", name="g")


@pytest.mark.parametrize("per", ["bin", "cell"])
def test_spatial_queries_leave_the_table_of_genes_out(section, tmp_path, per):
    """It describes the whole section, not the part that a query selects."""
    import shapely
    import spatialdata

    table = gec(section, source="hr_10um" if per == "bin" else None, per=per).element
    whole = spatialdata.read_zarr(section)
    assert table in whole.tables
    corner = {"min_coordinate": [100, 100], "max_coordinate": [300, 300]}
    box = spatialdata.bounding_box_query(whole, axes=("x", "y"), target_coordinate_system="global", **corner)
    polygon = spatialdata.polygon_query(
        whole, shapely.box(100, 100, 300, 300), target_coordinate_system="global"
    )
    for number, part in enumerate((box, polygon)):
        part.write(tmp_path / f"{number}.zarr")
        tables = spatialdata.read_zarr(tmp_path / f"{number}.zarr").tables
        assert set(tables) == {"cells_table", "spots_table"}
    assert spatialdata.get_element_annotators(whole, "cells") == {"cells_table"}, (
        "plots by gene find one table"
    )


def test_measured_bins_count_beyond_the_image_and_inferred_ones_do_not(section, monkeypatch):
    superres(section, method="bilinear", genes=["GATA3", "ERBB2"], name="inferred")
    monkeypatch.setattr(Section, "_stored_support", None)  # as in stores that other tools wrote
    monkeypatch.setattr(
        Image, "covered", lambda self, grid: np.arange(grid.width) < np.full(grid.shape, grid.width // 2)
    )
    cut = open_section(section)
    measured, inferred = bins_of(cut, "hr_10um"), bins_of(cut, "inferred")
    half = measured.grid.width // 2
    assert measured.number[:, half:].any() and not inferred.number[:, half:].any()
    assert inferred.number[:, :half].any() and not (inferred.number & ~measured.number).any()


def test_without_a_tissue_mask_the_section_says_which_bins_count(section):
    import spatialdata

    sdata = spatialdata.read_zarr(section)
    del sdata.labels["tissue"]
    sdata.delete_element_from_disk("tissue")
    bare = open_section(section)
    places = bins_of(bare, "hr_10um", 20)
    near_spots = bare.measured(places.grid.at(10))
    assert near_spots.any() and not near_spots.all()
    np.testing.assert_array_equal(places.number, add_up(near_spots.astype(int), 2) == 4)
    assert gec(section, source="hr_10um", bin_um=20).places == places.count


@pytest.mark.parametrize(("memory_bytes", "reads"), [(2**32, 1), (2**15, 5)])
def test_a_gene_is_read_once_if_memory_allows(store, monkeypatch, memory_bytes, reads):
    kept = gec(store, source="hr_10um", name="whole")
    seen = dict.fromkeys(GENES, 0)
    read = Map.read

    def counted(self, genes=None, window=None):
        for gene in genes:
            seen[gene] += 1
        return read(self, genes, window)

    monkeypatch.setattr(Map, "read", counted)
    monkeypatch.setattr(matrices, "MEMORY_BYTES", memory_bytes)
    table = table_of(gec(store, source="hr_10um", name="again", overwrite=True))
    assert seen["STILL"] == 1 and min(seen[gene] for gene in GENES[:4]) >= reads
    assert reads > 1 or max(seen.values()) == 1
    whole = table_of(kept)
    np.testing.assert_array_equal(table.X, whole.X)
    np.testing.assert_array_equal(table.layers["p"], whole.layers["p"])
    pd.testing.assert_frame_equal(table.uns["lags"], whole.uns["lags"])


def test_values_with_more_digits_than_memory_holds_are_read_each_time():
    class Array(np.ndarray):
        def rows(self, index, rows, columns):
            return self[index][:, rows, columns]

    values, grid = np.random.default_rng(1).random((3, 4, 5)), Grid(0.0, 0.0, 10.0, 4, 5)
    for dtype in (np.float64, np.float32):
        held = Map(grid, ["A", "B", "C"], values.astype(dtype).view(Array))
        places = BinPlaces("map", held, grid, values[0] > 0.2)
        found = Values(places, ["C", "A"], 2**20)
        for genes in (["A"], ["C", "A"], ["B", "A"], ["C", "A"]):
            np.testing.assert_array_equal(found.read(genes), places.read(genes))
            # sums over places are rounded alike only if they are laid out alike
            assert found.read(genes).flags.f_contiguous and places.read(genes).flags.f_contiguous
        places._values = None
        if dtype == np.float32:
            assert found.read(["A", "C"]).shape == (2, places.count)
        else:
            with pytest.raises(AttributeError):
                found.read(["A", "C"])


def test_moran_is_that_of_squidpy(store):
    squidpy = pytest.importorskip("squidpy")
    import anndata

    table = table_of(gec(store, source="hr_10um", truth="superres_x10"))
    places = bins_of(open_section(store), "hr_10um")
    genes = list(table.obs_names)
    cells = anndata.AnnData(places.read(genes).T.astype(float), var=pd.DataFrame(index=genes))
    cells.obsm["spatial"] = places.centres_um
    squidpy.gr.spatial_neighbors(cells, coord_type="generic", radius=15.0)
    squidpy.gr.spatial_autocorr(cells, mode="moran", transformation=False, show_progress_bar=False)
    np.testing.assert_allclose(table.obs["moran_i"], cells.uns["moranI"]["I"][genes], atol=1e-6)


# ------------------------------------------------------------------------------------------- against the truth


def test_a_map_like_the_truth_is_no_distance_away(store):
    result = gec(store, truth="hr_10um")
    assert [row["map"] for row in result.agreement] == ["superres_x10", "superres_x10"]
    assert all(row["rmse"] < 1e-5 and row["pattern"] > 0.999 for row in result.agreement)
    table = table_of(result)
    np.testing.assert_allclose(table.layers["truth"], table.X, atol=1e-5)


def test_interpolation_and_spots_stand_beside(section):
    superres(section, method="bicubic", genes=["all"])
    result = gec(section, source="superres_x10", truth="hr_10um", denoise_truth=True, bin_um=20)
    rows = pd.DataFrame(result.agreement).set_index(["map", "truth", "correlation"])
    maps = rows.index.get_level_values("map")
    assert set(maps) == {"superres_x10", "bilinear_x10", "spots", "spots, noise-corrected"}
    table = table_of(result)
    above = np.triu_indices(table.n_obs, 1)
    for truth, layer in (("raw", "truth"), ("noise-corrected", "truth_denoised")):
        bias = np.nanmean((table.X - table.layers[layer])[above].astype(np.float64))
        assert rows.loc[("superres_x10", truth, "pearson"), "bias"] == pytest.approx(bias, abs=1e-6)
    assert np.nanmean(np.abs(table.layers["truth_denoised"])) > np.nanmean(np.abs(table.layers["truth"]))
    saved = table.uns["agreement"]
    assert list(saved["map"]) == list(maps)


# -------------------------------------------------------------------------------------------- other libraries


def test_the_table_opens_in_spatialdata_and_scanpy(store):
    import scanpy
    import spatialdata

    gec(store, truth="hr_10um")
    sdata = spatialdata.read_zarr(store)
    table = sdata.tables["gec_x10"]
    assert table.shape == (4, 4) and {"spearman", "effective_places", "p", "q", "truth"} <= set(table.layers)
    assert list(scanpy.get.obs_df(table, ["SAME"])["SAME"].round(3))[:2] == [1, 1]
    scanpy.pp.pca(table, n_comps=2)
    assert table.obsm["X_pca"].shape == (4, 2)


def test_measured_elements_stay_as_they_are(store):
    before = contents(store / "images")
    gec(store)
    assert contents(store / "images") == before
    assert [name for name in os.listdir(store.parent) if name.startswith(".")] == []


# ------------------------------------------------------------------------------------------------- command line


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_the_command_prints_the_table_and_writes_what_was_asked(store, tmp_path):
    pairs, figure = tmp_path / "new" / "pairs.csv", tmp_path / "f.png"
    words = ["gec", store, "--from", "hr_10um", "--pairs", pairs, "--figure", figure, "--lag", "A:OTHER"]
    result = run(*words)
    assert (result.exit_code, result.stdout) == (0, "gec_x10\n"), result.stderr
    written = pd.read_csv(pairs)
    assert {"gene_a", "gene_b", "pearson", "spearman", "p", "q", "p_shift"} <= set(written.columns)
    with Pillow.open(figure) as drawn:
        assert len(written) == 6 and drawn.width > 1500
    again = run(*words)
    assert again.exit_code == 2 and "--overwrite" in again.stderr and again.stdout == ""
    told = json.loads(run(*words, "--overwrite", "--json", "-q").stdout)
    assert told["element"] == "gec_x10" and told["genes"] == 4 and told["csv"] == str(pairs)
    assert told["pairs"][0]["pearson"] == pytest.approx(written["pearson"][0])


def test_the_comparison_is_shown(store):
    result = run("gec", store, "--truth", "hr_10um")
    assert result.exit_code == 0 and "rmse" in result.stderr and "raw spearman" in result.stderr


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--from", "nothing"], 2, ["'nothing'", "hr_10um"]),
        (["--per", "spot"], 2, ["bin, cell"]),
        (["--per", "cell"], 1, ["stsr singlecell"]),
        (["--per", "cell", "--from", "hr_10um"], 2, ["no table 'hr_10um'"]),
        (["--genes", "SAMEE"], 2, ["did you mean SAME"]),
        (["--genes", "A"], 1, ["two are needed"]),
        (["--genes", "A,STILL"], 1, ["--genes"]),
        (["--bin-um", "15"], 2, ["multiple of 10"]),
        (["--bin-um", "nan"], 2, ["multiple of 10"]),
        (["--bin-um", "5"], 2, ["multiple of 10"]),
        (["--bin-um", "0"], 2, ["multiple of 10"]),
        (["--bin-um", "200"], 2, ["smaller --bin-um"]),
        (["--region", "5000,0,6000,10"], 2, ["--region"]),
        (["--region", "1,2,3"], 2, ["--region"]),
        (["--lag", "A"], 2, ["A:B"]),
        (["--lag", "A:NOPE"], 2, ["'NOPE'"]),
        (["--lag", "A:A"], 2, ["twice"]),
        (["--truth", "superres_x10"], 2, ["itself"]),
        (["--truth", "nope_10um"], 2, ["'nope_10um'"]),
        (["--denoise-truth"], 2, ["--truth hr_10um"]),
        (["--beside", "hr_10um"], 2, ["--truth hr_10um"]),
        (["--truth", "hr_10um", "--genes", "A,SAME"], 2, ["three"]),
        (["--from", "hr_10um", "--truth", "fraction_x10", "--denoise-truth"], 2, ["no counts"]),
        (["--top", "0"], 2, ["--top"]),
        (["--name", "hr_10um"], 2, ["--name"]),
        (["--name", "no name"], 2, ["letters"]),
        (["--figure", "f.bmp"], 2, [".png"]),
        (["--pairs", "p.txt"], 2, [".csv"]),
        (["--pairs", "s.zarr"], 2, [".csv"]),
        (["--figure", "file/f.png"], 2, ["--figure"]),
        (["--form", "hr_10um"], 2, ["--from"]),
    ],
)
def test_bad_input_is_answered_with_a_sentence(store, monkeypatch, options, code, words):
    monkeypatch.chdir(store.parent)
    (store.parent / "file").write_text("")
    if "fraction_x10" in options:
        image = open_section(store).sdata.images["superres_x10"] * 0.3
        publishing.publish(store, {"fraction_x10": image}, {"fraction_x10": {"command": "superres"}})
    before = contents(store.parent)
    result = run("gec", "s.zarr", *options)
    told = result.stderr.strip()
    assert result.exit_code == code, told
    assert told.startswith("error: ") and "\n" not in told and "internal" not in told
    for word in words:
        assert word in told
    assert result.stdout == "" and contents(store.parent) == before


def test_a_section_without_a_map(section):
    result = run("gec", section, "--from", "bilinear_x10", "--name", "spots")
    assert result.exit_code == 2 and "reserved for measured data" in result.stderr
    import spatialdata

    sdata = spatialdata.read_zarr(section)
    del sdata.images["bilinear_x10"]
    sdata.delete_element_from_disk("bilinear_x10")
    with pytest.raises(StsrError, match="stsr superres"):
        gec(section)


def test_a_map_with_holes(store):
    image = open_section(store).sdata.images["superres_x10"].astype(np.float32)
    publishing.publish(store, {"holes_x10": image.where(image < 8)}, {"holes_x10": {"command": "superres"}})
    with pytest.raises(StsrError, match="NaN or infinite"):
        gec(store, source="holes_x10")


# ------------------------------------------------------------------------------------------------------ figures


class Tens:
    """150 genes in correlated groups of ten."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.name, self.count, self.genes = "map", 225, [f"GENE{number}" for number in range(150)]
        self.grid, self.number = Grid(0, 0, 10, 15, 15), np.ones((15, 15), bool)
        self.values = np.repeat(rng.standard_normal((15, 225)), 10, 0) + rng.standard_normal((150, 225))

    def read(self, genes):
        return self.values[[int(gene[4:]) for gene in genes]]

    def raster(self, values):
        return values.reshape(-1, 15, 15)


@pytest.mark.parametrize("genes", [12, 150])
@pytest.mark.parametrize("truth", [False, True])
def test_figures_of_few_and_many_genes(tmp_path, genes, truth):
    from stsr.verbs.gec.agreement import add_layer
    from stsr.verbs.gec.table import correlate

    places = Tens()
    names = places.genes[:genes]
    table = correlate(Values(places, names, 0), places, genes=names, top=5, lags=[], progress=silent)
    if truth:
        add_layer(table, "truth_denoised", places.genes[: genes - 1], table.X[1:, 1:])
    path = gec_figure(table, tmp_path / "f.png", "a title")
    pixels = np.asarray(Pillow.open(path).convert("RGB")).astype(int)
    assert pixels.shape[1] > 1.3 * pixels.shape[0] > 1500
    red = (pixels[..., 0] - pixels[..., 2] > 80).mean()
    assert red > 0.01, "blocks of genes that go together are seen"


# ---------------------------------------------------------------------------------------------------- real data


@pytest.mark.real
def test_real_counts_show_what_is_known_of_breast(real_data, tmp_path):
    store = prepare(real_data / "breast" / "xenium_same_he", tmp_path / "same.zarr")
    result = gec(store, source="hr_10um", bin_um=20, genes=["EPCAM", "KRT8", "LUM", "POSTN", "CD3E", "TRAC"])
    table = table_of(result).to_df()
    for a, b in (("EPCAM", "KRT8"), ("LUM", "POSTN"), ("CD3E", "TRAC")):
        others = table.loc[a].drop([a, b])
        assert table.loc[a, b] > 0.3 and table.loc[a, b] > others.max() + 0.1
