"""`stsr.prepare` of Visium HD: counts per bin, simulated spots, and the half of the counts that they did not take."""

import shutil

import numpy as np
import pytest

from stsr import platforms
from stsr.errors import StsrError, UsageError
from stsr.geometry.grid import Grid, add_up
from stsr.geometry.measurement import Measurement
from stsr.histology.image import Image
from stsr.platforms.source import BinChunk, Bins
from stsr.store.section import open_section
from stsr.verbs.prepare import binning, fit
from stsr.verbs.prepare.bins import count_bins
from stsr.verbs.prepare.verb import prepare


def square(folder, bin_um):
    return folder / "binned_outputs" / f"square_{bin_um:03d}um"


@pytest.fixture(scope="module")
def made(hd_folder, tmp_path_factory):
    """Stores of the folder, or of one bin size of it, each made once."""
    folder, stores = tmp_path_factory.mktemp("made"), {}

    def section(only_um=None, **options):
        key = (only_um, *sorted(options.items()))
        if key not in stores:
            source = hd_folder if only_um is None else square(hd_folder, only_um)
            stores[key] = prepare(source, folder / f"{len(stores)}.zarr", refine=False, **options)
        return open_section(stores[key])

    return section


def dense(path, bin_um):
    """Counts (genes, rows, columns) of the folder of one bin size, and the grid from the array's corner."""
    source = platforms.read(square(path, bin_um))
    counts = np.zeros((len(source.genes), *source.bins.in_tissue.shape))
    for chunk in source.bins.chunks():
        np.add.at(counts, (chunk.gene, chunk.row, chunk.column), chunk.number)
    return counts


def placed(counts, bin_um, grid):
    """Counts of bins that nest in the grid's, from the array's corner, on the grid."""
    height, width = (round(end / bin_um) for end in grid.bounds_um[:1:-1])
    whole = np.zeros((len(counts), height, width))
    whole[:, : counts.shape[1], : counts.shape[2]] = counts
    row, column = round(grid.y0_um / bin_um), round(grid.x0_um / bin_um)
    return add_up(whole[:, row:, column:], round(grid.bin_um / bin_um))


def unseen(section):
    return section.map(next(name for name in section.elements if name.endswith("_unseen"))).read()


# ----------------------------------------------------------------------------------------------------- counts


def test_bins_that_nest_are_summed_exactly(made, hd_folder):
    section = made()
    counts = section.hr.read()
    assert counts.dtype == np.uint16 and section.hr.grid.bin_um == 10
    assert np.array_equal(counts, placed(dense(hd_folder, 2), 2, section.hr.grid))
    assert section.provenance["hr_10um"]["counts"] == counts.sum() == section.describe()["hr"]["counts"]


def test_bins_of_8_um_are_divided_by_area(made, hd_folder):
    """A bin of 8 um is sixteen of 2 um with a sixteenth of its counts, which nest in 10 um."""
    section, counts = made(8), dense(hd_folder, 8)
    sixteenths = np.kron(counts, np.ones((1, 4, 4))) / 16
    divided = section.hr.read()
    assert divided.dtype == np.float32 and (divided % 1).any()
    assert np.array_equal(divided, placed(sixteenths, 2, section.hr.grid))
    assert np.array_equal(divided.sum((1, 2), dtype=np.float64), counts.sum((1, 2)))
    facts = section.provenance["hr_10um"]
    assert section.divided_from_um == 8.0
    assert (facts["divided_by_area_from_um"], facts["totals_per_gene_kept_to"]) == (8.0, 1e-6)


@pytest.mark.parametrize("bin_um", [8, 16])
def test_bins_can_stay_as_they_are(made, hd_folder, bin_um):
    section = made(8, bin_um=bin_um)
    grid = section.hr.grid
    assert (grid.bin_um, grid.width * bin_um % 96, grid.height * bin_um % 96) == (bin_um, 0, 0)
    assert section.hr.read().dtype == np.uint16
    assert np.array_equal(section.hr.read(), placed(dense(hd_folder, 8), 8, grid))
    assert section.grid(bin_um) == grid


def test_finer_bins_than_measured_are_refused(hd_folder, tmp_path):
    with pytest.raises(UsageError, match="--bin-um 16 or larger"):
        prepare(square(hd_folder, 16), tmp_path / "s.zarr")
    assert not (tmp_path / "s.zarr").exists()


def test_lost_counts_are_noticed(hd_folder, tmp_path, monkeypatch):
    true = binning._shares

    def leaky(*arguments):
        (first, share), rest = true(*arguments)
        return [(first, share * np.float32(0.99999)), rest]

    monkeypatch.setattr(binning, "_shares", leaky)
    with pytest.raises(StsrError, match="counts were lost"):
        prepare(square(hd_folder, 8), tmp_path / "s.zarr")
    assert not (tmp_path / "s.zarr").exists()


def test_the_tissue_is_that_of_the_array(made, hd_folder, tissue):
    section = made()
    x, y = section.hr.grid.centres_um()
    truth = tissue.is_tissue(*np.meshgrid(x, y))
    assert (section.tissue.read(section.hr.grid) == truth).mean() > 0.9
    on_array = platforms.read(square(hd_folder, 16)).bins.in_tissue
    outside = placed(~on_array[None].repeat(8, 1).repeat(8, 2), 2, section.hr.grid)[0] == 25
    assert outside.any() and not section.tissue.read(section.hr.grid)[outside].any()


# ------------------------------------------------------------------------------------------------------ spots


def test_square_spots_and_the_unseen_half_are_all_counts(made):
    section = made(spots="square")
    taken = section.hr.read() - unseen(section).astype(int)
    assert taken.min() == 0
    added = section.spots.measurement(section.hr.grid).add_up(taken)
    assert np.array_equal(added, section.spots.counts.toarray())
    assert section.spots.shape == "square" and section.spots.size_um == 100


def test_the_half_is_binomial_and_independent_of_the_rest(made):
    section = made(spots="square")
    whole, left = section.hr.read().astype(float), unseen(section).astype(float)
    apart = (left.sum() - whole.sum() / 2) / np.sqrt(whole.sum() / 4)
    assert abs(apart) < 5
    spread = (
        (2 * left - whole) ** 2
    ).sum() / whole.sum()  # variance of a binomial half: a quarter of the count
    assert abs(spread - 1) < 0.05
    facts = section.provenance
    assert (facts["spots"]["depth"], facts["spots"]["seed"], facts["spots"]["origin"]) == (
        0.5,
        0,
        "simulated",
    )
    assert facts["hr_10um_unseen"]["counts"] == left.sum()


def test_the_draw_depends_on_the_seed_and_not_on_the_genes(made):
    section, other = made(spots="square"), made(spots="square", seed=1)
    names = section.hr.genes[3:6]
    few = made(spots="square", genes=tuple(names))
    assert few.hr.genes == names
    assert np.array_equal(unseen(few), unseen(section)[3:6])
    assert np.array_equal(
        few.spots.counts.toarray(),
        section.spots.select(names).toarray()[: len(few.spots.counts.shape) and None],
    )
    assert np.array_equal(few.tissue.read(few.hr.grid), section.tissue.read(section.hr.grid))
    assert not np.array_equal(unseen(other), unseen(section))


def even(bin_um, rows, columns, number):
    """Every bin holds ``number`` counts of one gene."""
    row, column = np.indices((rows, columns)).reshape(2, -1)
    chunk = BinChunk(row, column, np.zeros(row.size, int), np.full(row.size, number))
    return Bins(lambda: iter([chunk]), bin_um, np.ones((rows, columns), bool), row.size)


@pytest.mark.parametrize("bin_um", [2.0, 8.0, 16.0])
def test_discs_take_their_area_of_each_bin(bin_um):
    side = round(480 / bin_um)
    per_um2 = 4.0
    counted = count_bins(
        even(bin_um, side, side, round(per_um2 * bin_um**2)), ["A"], max(10.0, bin_um), "visium"
    )
    expected = np.pi * 27.5**2 * per_um2 / 2
    counts = counted.spots.counts.X.toarray().ravel()
    inside = (np.abs(counted.spots.centres_um - 240) < 200).all(1)
    assert inside.sum() > 8
    assert (np.abs(counts[inside] - expected) < 5 * np.sqrt(expected)).all()
    assert counts[inside].std() < 1.7 * np.sqrt(expected)


def test_own_bins_serve_as_measured_spots(made, hd_folder):
    truth = dense(hd_folder, 16)
    for bin_um in (None, 8):
        section = made(bin_um, spots="bins")
        spots = section.spots
        assert (spots.shape, spots.size_um, spots.pitch_um) == ("square", 16, pytest.approx(16))
        column, row = np.floor(spots.centres_um.T / 16).astype(int)
        assert np.array_equal(spots.counts.toarray(), truth[:, row, column].T)
        assert spots.counts.sum() == truth.sum() == section.hr.read().sum(dtype=np.float64)
        assert section.sdata.tables["spots_table"].obs_names[0] == f"s_016um_{row[0]:05d}_{column[0]:05d}-1"
        assert not any("unseen" in name for name in section.elements)
        assert (
            section.provenance["spots"]["origin"] == "measured" and "depth" not in section.provenance["spots"]
        )


def test_rasters_of_small_squares_hold_their_counts(made):
    section = made(spots="bins")
    spots, grid = section.spots, section.hr.grid
    lr, mask = spots.measurement(grid).raster(spots.counts)
    whole = mask[0] > 1 - 1e-6
    exact = Measurement.squares(grid.at(2), spots.centres_um, 16).matrix  # bins of 2 um nest in both
    fine = np.asarray((exact.T @ (spots.counts / 64)).todense()).T.reshape(-1, *grid.at(2).shape)
    assert whole.sum() > 5
    assert np.allclose(lr[:, whole], add_up(fine, 50)[:, whole], rtol=1e-4)


def test_the_unseen_half_is_reserved_and_replaceable_by_nobody(made):
    from stsr.store import names

    assert names.is_measured_name("hr_10um_unseen") and names.bin_um_of("hr_10um_unseen") == 10
    section = made()
    assert section.catalogue.hr_elements == ["hr_10um"]
    assert section.map("hr_10um_unseen").grid == section.hr.grid
    assert section.map("hr_10um_unseen").genes == section.hr.genes


# ---------------------------------------------------------------------------------------------------- refusals


def test_options_of_other_platforms_are_refused(xenium_folder, tmp_path):
    with pytest.raises(UsageError, match="Visium HD"):
        prepare(xenium_folder, tmp_path / "s.zarr", spots="bins")
    with pytest.raises(UsageError, match="--bin-um 10"):
        prepare(xenium_folder, tmp_path / "s.zarr", bin_um=8)


def test_divided_counts_are_not_prepared_again(made, tmp_path):
    with pytest.raises(StsrError, match="prepare the original folder"):
        prepare(made(8).path, tmp_path / "again.zarr")
    again = open_section(prepare(made().path, tmp_path / "coarse.zarr", bin_um=20, refine=False))
    assert np.array_equal(again.hr.read(), add_up(made().hr.read(), 2))


def test_a_folder_without_tissue_leaves_nothing(hd_folder, tmp_path):
    import pandas as pd

    copy = shutil.copytree(square(hd_folder, 16), tmp_path / "square_016um")
    file = copy / "spatial" / "tissue_positions.parquet"
    pd.read_parquet(file).assign(in_tissue=0).to_parquet(file)
    with pytest.raises(StsrError, match="no tissue found"):
        prepare(copy, tmp_path / "s.zarr")
    assert not (tmp_path / "s.zarr").exists()


# --------------------------------------------------------------------------------------------- image and counts


def test_tissue_that_fills_the_slide_is_judged_by_its_nuclei():
    """Without contrast at 50 um, nuclei still tell the right image from a mirrored one and from another."""
    rng = np.random.default_rng(0)
    grid = Grid(0, 0, 10, 120, 160)
    nuclei = rng.random(grid.shape) < 0.15
    counts = rng.poisson(np.where(nuclei, 60, 20))
    pixels = np.where(nuclei[None], np.array([90, 60, 140])[:, None, None], 200).astype(np.uint8)
    px_to_um = np.diag([10.0, 10.0, 1.0])

    def warnings(picture):
        return fit.fit(Image([picture], px_to_um), counts, grid)[1]

    assert warnings(pixels) == []
    assert "mirrored left to right" in warnings(pixels[:, :, ::-1].copy())[0]
    assert "hardly correlate" in warnings(rng.permuted(pixels, axis=1))[0]
