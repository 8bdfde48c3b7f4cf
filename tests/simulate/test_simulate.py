"""The simulator: its files agree with its truth, and scverse reads its folders."""

import runpy
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import shapely
import tifffile
from scipy import sparse
from scipy.spatial import cKDTree

from stsr.simulate import render_he, simulate_tissue, write_visium, write_xenium
from stsr.simulate.genes import CELL_TYPES, gene_table
from stsr.simulate.visium import SPOT_UM


@pytest.fixture(scope="module")
def xenium_folder(tissue, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sim") / "xenium"
    return write_xenium(tissue, folder, image_um_per_px=1.0, mirror=True, turn_deg=20)


def _matrix(path):
    with h5py.File(path) as file:
        m = file["matrix"]
        counts = sparse.csc_matrix((m["data"][:], m["indices"][:], m["indptr"][:]), shape=m["shape"][:])
        kinds, names = m["features/feature_type"][:], m["features/name"][:]
        return (
            counts[kinds == b"Gene Expression"].T,
            [n.decode() for n in names[kinds == b"Gene Expression"]],
            m["barcodes"][:],
        )


def cell_counts(tissue):
    """Counts (cell, gene) of the good transcripts inside each cell's outline."""
    inside, counts = tissue.good.cell >= 0, np.zeros((len(tissue.cells), len(tissue.genes)), np.int32)
    np.add.at(counts, (tissue.good.cell[inside], tissue.good.feature[inside]), 1)
    return counts


def _same(a, b):
    return all(np.array_equal(v, vars(b)[k]) for k, v in vars(a).items())


def test_same_seed_same_tissue_and_picture(tissue):
    again, other = simulate_tissue(620, 540, seed=3), simulate_tissue(620, 540, seed=4)
    assert _same(tissue.transcripts, again.transcripts)
    assert _same(tissue.cells, again.cells)
    assert np.array_equal(render_he(tissue, 2.0), render_he(again, 2.0))
    assert not _same(tissue.cells, other.cells)


def test_a_generator_may_be_the_seed():
    a, b = (simulate_tissue(200, 200, genes=3, seed=np.random.default_rng(1)) for _ in range(2))
    assert _same(a.transcripts, b.transcripts)


def test_all_kinds_of_cells_and_of_good_size():
    tissue = simulate_tissue(1000, 1000, seed=0)
    assert set(tissue.cell_types) == set(CELL_TYPES)
    assert 1000 < len(tissue.cells) < 8000
    nearest = cKDTree(np.column_stack([tissue.cells.x_um, tissue.cells.y_um])).query(
        np.column_stack([tissue.cells.x_um, tissue.cells.y_um]), k=2
    )[0][:, 1]
    assert nearest.min() > 4


def test_outlines_do_not_overlap_and_hold_their_nuclei(tissue):
    cells, nuclei = shapely.polygons(tissue.cells.outline_um), shapely.polygons(tissue.cells.nucleus_um)
    assert shapely.is_valid(cells).all()
    a, b = shapely.STRtree(cells).query(cells, predicate="intersects")
    shared = shapely.area(shapely.intersection(cells[a[a < b]], cells[b[a < b]]))
    assert shared.max(initial=0) < 1e-6
    assert shapely.covers(cells, nuclei).all()


def test_transcripts_lie_in_the_cells_they_are_given(tissue):
    t = tissue.transcripts
    cells, nuclei = shapely.polygons(tissue.cells.outline_um), shapely.polygons(tissue.cells.nucleus_um)
    places = shapely.points(t.x_um.astype(float), t.y_um.astype(float))
    inside = t.cell >= 0
    assert (shapely.distance(cells[t.cell[inside]], places[inside]) < 1e-9).all()
    held = np.unique(shapely.STRtree(cells).query(places[~inside], predicate="within")[0])
    assert len(held) == 0  # and those in no cell are in none
    nuclear = t.in_nucleus
    assert (shapely.distance(nuclei[t.cell[nuclear]], places[nuclear]) < 1e-9).all()
    assert 0.03 < (t.qv < 20).mean() < 0.07
    assert 0.005 < (t.feature >= len(tissue.genes)).mean() < 0.015


def test_bins_hold_every_good_transcript_once(tissue):
    assert tissue.counts(10, 0, 0, 62, 54).sum() == len(tissue.good)
    fine, coarse = tissue.counts(10, 100, 100, 20, 20), tissue.counts(20, 100, 100, 10, 10)
    assert fine.dtype == np.int32
    assert np.array_equal(fine.reshape(-1, 10, 2, 10, 2).sum((2, 4)), coarse)
    hand = tissue.good
    where = (hand.x_um >= 130) & (hand.x_um < 140) & (hand.y_um >= 250) & (hand.y_um < 260)
    assert np.array_equal(fine[:, 15, 3], np.bincount(hand.feature[where], minlength=len(tissue.genes)))


def test_expectation_is_what_counts_scatter_around():
    tissue = simulate_tissue(300, 300, genes=5, seed=1, counts_per_cell_scale=50)
    expected, counts = tissue.expected(20, 0, 0, 15, 15), tissue.counts(20, 0, 0, 15, 15)
    assert expected.shape == counts.shape == (5, 15, 15)
    assert expected.sum() == pytest.approx(tissue.rates.sum(), rel=1e-4)
    assert counts.sum((1, 2)) == pytest.approx(expected.sum((1, 2)), rel=0.15)
    assert np.corrcoef(expected[0].ravel(), counts[0].ravel())[0, 1] > 0.9


@pytest.mark.parametrize(
    "bad", [{"width_um": 20}, {"genes": 0}, {"genes": ["A", "A"]}, {"counts_per_cell_scale": 0}]
)
def test_unusable_arguments_are_refused(bad):
    with pytest.raises(ValueError):
        simulate_tissue(**({"width_um": 200, "height_um": 200} | bad))


def test_bad_bins_and_pixels_are_refused(tissue):
    with pytest.raises(ValueError):
        tissue.counts(0, 0, 0, 5, 5)
    with pytest.raises(ValueError):
        render_he(tissue, 0)


def test_invented_genes_do_not_depend_on_their_place():
    a = gene_table(["FOO", "ERBB2", "BAR"], np.random.default_rng(0))
    b = gene_table(["BAR", "FOO"], np.random.default_rng(0))
    assert np.array_equal(a.rates[0], b.rates[1]) and np.array_equal(a.rates[2], b.rates[0])
    assert gene_table(100, np.random.default_rng(0)).genes[-1].startswith("SIM")


def test_malignant_markers_follow_malignant_cells(tissue):
    rates = pd.DataFrame(tissue.rates, columns=tissue.genes).groupby(tissue.cell_types).mean()
    assert rates["ERBB2"].idxmax() == "Malignant" and rates["POSTN"].idxmax() == "Fibroblast"
    assert rates["MS4A1"].idxmax() == "B_cell" and rates["CD163"].idxmax() == "Macrophage"


def test_cells_of_the_folder_equal_its_matrix(tissue, xenium_folder):
    t = pq.read_table(xenium_folder / "transcripts.parquet").to_pandas()
    assert pq.ParquetFile(xenium_folder / "transcripts.parquet").num_row_groups >= 4
    counts, genes, barcodes = _matrix(xenium_folder / "cell_feature_matrix.h5")
    good = t[(t.qv >= 20) & t.is_gene & (t.cell_id != "UNASSIGNED")]
    table = pd.crosstab(good.cell_id, good.feature_name)
    table = table.reindex(index=[b.decode() for b in barcodes], columns=genes, fill_value=0)
    assert genes == list(tissue.genes)
    assert np.array_equal(table.to_numpy(), counts.toarray())
    assert np.array_equal(counts.toarray(), cell_counts(tissue))
    cells = pd.read_parquet(xenium_folder / "cells.parquet")
    assert np.array_equal(cells.transcript_counts, np.asarray(counts.sum(1)).ravel())


@pytest.mark.parametrize(("mirror", "turn_deg"), [(False, 0), (True, 0), (True, 20), (False, -90)])
def test_alignment_puts_nuclei_on_cells(tissue, tmp_path, mirror, turn_deg):
    folder = write_xenium(
        tissue, tmp_path / "x", image_um_per_px=1.0, mirror=mirror, turn_deg=turn_deg, labels=False
    )
    image = tifffile.imread(folder / "he_image.ome.tif").astype(float)[
        ..., 0
    ]  # red, which haematoxylin absorbs
    to_um = np.loadtxt(folder / "he_imagealignment.csv", delimiter=",") * [[0.2125], [0.2125], [1]]
    cells = pd.read_parquet(folder / "cells.parquet")

    def red(x_um, y_um):
        x_px, y_px, _ = np.linalg.inv(to_um) @ [x_um, y_um, np.ones(len(x_um))]
        return image[y_px.astype(int), x_px.astype(int)].mean()

    at = (
        (cells.x_centroid > 15)
        & (cells.x_centroid < 485)
        & (cells.y_centroid > 15)
        & (cells.y_centroid < 385)
    )
    x, y = cells.x_centroid[at].to_numpy(), cells.y_centroid[at].to_numpy()
    around = [red(x + dx, y + dy) for dx, dy in ((6, 0), (-6, 0), (0, 6), (0, -6), (14, 14))]
    assert red(x, y) < min(around) - 25
    assert np.sign(np.linalg.det(to_um[:2, :2])) == (-1 if mirror else 1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("xoa", ["1.0", "1.6", "2.0", "3.0"])
def test_spatialdata_io_reads_every_xenium_version(tissue, tmp_path, xoa):
    io = pytest.importorskip("spatialdata_io")
    folder = write_xenium(tissue, tmp_path / "x", xoa=xoa, image_um_per_px=2.0)
    sdata = io.xenium(folder, morphology_focus=False, morphology_mip=False)
    table = sdata["table"]
    assert np.array_equal(table.X.toarray(), cell_counts(tissue))
    assert list(table.var_names) == list(tissue.genes)
    assert len(sdata["transcripts"]) == len(tissue.transcripts)
    assert len(sdata["cell_boundaries"]) == len(sdata["nucleus_boundaries"]) == len(tissue.cells)
    assert sdata["he_image"]["scale0"]["image"].shape == (3, 270, 310)
    labels = np.asarray(sdata["cell_labels"]["scale0"]["image"])
    x_px, y_px = ((c / 0.2125).astype(int) for c in (tissue.cells.x_um, tissue.cells.y_um))
    assert (labels[y_px, x_px] == np.arange(1, len(tissue.cells) + 1)).mean() > 0.99


def test_old_versions_spell_things_their_way(tissue, tmp_path):
    write_xenium(tissue, tmp_path / "a", xoa="1.0", image_um_per_px=4.0, labels=False)
    old = pq.read_schema(tmp_path / "a" / "transcripts.parquet")
    assert str(old.field("feature_name").type) == "binary" and str(old.field("cell_id").type) == "int32"
    assert "is_gene" not in old.names
    with pytest.raises(ValueError, match="not covered"):
        write_xenium(tissue, tmp_path / "b", xoa="4.0")
    with pytest.raises(FileExistsError):
        write_xenium(tissue, tmp_path / "a")


def test_newest_columns_are_those_of_the_instrument(xenium_folder):
    t = pq.read_schema(xenium_folder / "transcripts.parquet")
    assert t.names[:5] == ["transcript_id", "cell_id", "overlaps_nucleus", "feature_name", "x_location"]
    assert t.names[5:9] == ["y_location", "z_location", "qv", "fov_name"]
    assert t.names[9:] == ["nucleus_distance", "codeword_index", "codeword_category", "is_gene"]
    assert {str(t.field(n).type) for n in ("x_location", "qv", "nucleus_distance")} == {"float"}
    assert str(t.field("cell_id").type) == "large_string" and str(t.field("transcript_id").type) == "uint64"
    cells = pq.read_schema(xenium_folder / "cells.parquet")
    assert cells.names[-3:] == ["nucleus_area", "nucleus_count", "segmentation_method"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("version", [1, 2])
def test_spots_hold_the_transcripts_of_their_discs(tissue, tmp_path, version):
    io = pytest.importorskip("spatialdata_io")
    folder = write_visium(tissue, tmp_path / "v", version=version)
    sdata = io.visium(folder, dataset_id="sim", fullres_image_file="he_fullres.tif")
    table, spots = sdata["table"], sdata["sim"]
    assert table.n_obs >= 15
    centres = np.column_stack([spots.geometry.x, spots.geometry.y]) * 2.0  # px -> um
    assert spots.radius.iloc[0] * 2.0 == SPOT_UM / 2
    good = tissue.good
    for spot in range(table.n_obs):  # membership by hand, apart from the writer's tree
        x, y = centres[spot]
        inside = (good.x_um.astype(float) - x) ** 2 + (good.y_um.astype(float) - y) ** 2 <= (SPOT_UM / 2) ** 2
        hand = np.bincount(good.feature[inside], minlength=len(tissue.genes))
        assert np.array_equal(table.X[spot].toarray().ravel(), hand)
    gaps = cKDTree(centres).query(centres, k=2)[0][:, 1]
    assert np.median(gaps) == pytest.approx(100, abs=2.5)  # whole pixels of 2 um
    assert sdata["sim_full_image"]["scale0"]["image"].shape == (3, 270, 310)


def test_visium_refuses_other_versions(tissue, tmp_path):
    with pytest.raises(ValueError):
        write_visium(tissue, tmp_path / "v", version=3)


def test_stream_of_transcripts(tmp_path):
    benchmarks = Path(__file__).parents[1] / "benchmarks"
    write_transcripts = runpy.run_path(str(benchmarks / "stream.py"))["write_transcripts"]
    path = write_transcripts(tmp_path / "t.parquet", 25_000, 400, 300, genes=10, seed=5, row_group=10_000)
    again = write_transcripts(tmp_path / "u.parquet", 25_000, 400, 300, genes=10, seed=5, row_group=10_000)
    assert pq.ParquetFile(path).num_row_groups == 3
    t = pq.read_table(path).to_pandas()
    assert t.equals(pq.read_table(again).to_pandas())
    assert len(t) == 25_000 and t.transcript_id.is_unique
    assert t.x_location.between(0, 400).all() and t.y_location.between(0, 300).all()
    assert t.feature_name.nunique() == 10 and 0.03 < (t.qv < 20).mean() < 0.07
    with pytest.raises(ValueError):
        write_transcripts(tmp_path / "w.parquet", 0)
