"""`stsr.prepare` on real sections."""

import shutil

import h5py
import numpy as np
import pytest

from stsr import platforms
from stsr.geometry.grid import add_up
from stsr.histology.tissue import darkness
from stsr.platforms.source import Options
from stsr.store.section import open_section
from stsr.verbs.prepare import fit
from stsr.verbs.prepare.bins import count_bins
from stsr.verbs.prepare.registration import refine
from stsr.verbs.prepare.verb import prepare

pytestmark = pytest.mark.real

XENIUM = ("xenium_same_he", "xenium_serial_he")


@pytest.fixture(scope="module")
def sections(real_data, tmp_path_factory):
    """Every section of the breast folder, prepared on first use, with its warnings."""
    folder, made = tmp_path_factory.mktemp("real"), {}

    def section(name):
        if name not in made:
            told = []
            path = prepare(real_data / "breast" / name, folder / f"{name}.zarr", warn=told.append)
            made[name] = open_section(path), told
        return made[name]

    return section


def smooth(counts, sigma):
    from scipy.ndimage import gaussian_filter

    return gaussian_filter(counts.astype(float), sigma)


@pytest.mark.parametrize("name", XENIUM)
def test_xenium_totals_are_those_of_the_matrix(real_data, sections, name):
    section, told = sections(name)
    with h5py.File(real_data / "breast" / name / "cell_feature_matrix.h5") as h5:
        genes = [gene.decode() for gene in h5["matrix/features/name"][:]]
        totals = np.bincount(h5["matrix/indices"][:], h5["matrix/data"][:], len(genes)).astype(int)
    assert told == []
    assert section.hr.genes == genes
    assert np.array_equal(section.hr.read().sum((1, 2)), totals)
    assert np.array_equal(np.asarray(section.cells.counts.X.sum(0)).ravel(), totals)
    assert section.provenance["he"]["overlap"] > 0.99


@pytest.mark.parametrize(("name", "least"), [("xenium_same_he", 0.45), ("xenium_serial_he", 0.25)])
def test_image_is_mirrored_and_turned_the_right_way(sections, name, least):
    """Staining follows the counts as aligned, and clearly less so mirrored, turned or moved by 300 um."""
    section, _ = sections(name)
    counts = np.log1p(add_up(section.hr.read().sum(0), 5))
    grid = section.hr.grid.at(50)
    covered = section.image.covered(grid)
    stain = darkness(section.image.read(grid))

    def agreement(image):
        return np.corrcoef(image[covered], counts[covered])[0, 1]

    right = agreement(stain)
    others = [stain[::-1], stain[:, ::-1], stain[::-1, ::-1], np.roll(stain, 6, 0), np.roll(stain, 6, 1)]
    assert right > least
    assert right > max(map(agreement, others)) + 0.1


def test_gata3_lies_in_the_ducts(sections):
    """Ducts are the darkest, bluest parts of this section; GATA3 is a gene of their epithelium, LUM of stroma."""
    section, _ = sections("xenium_same_he")
    grid = section.hr.grid
    red, _, blue = smooth_channels(section.image.read(grid))
    nuclei = (255 - red) * (blue > red)
    darkest = nuclei >= np.quantile(nuclei, 0.95)
    share = {
        gene: section.hr.read([gene])[0][darkest].sum() / section.hr.read([gene]).sum()
        for gene in ("GATA3", "LUM")
    }
    assert share["GATA3"] > 0.35
    assert share["GATA3"] > 4 * share["LUM"]


def smooth_channels(rgb):
    return np.stack([smooth(channel, 1) for channel in rgb])


def test_squares_hold_the_bins(sections):
    section, _ = sections("xenium_same_he")
    added = section.spots.measurement(section.hr.grid).add_up(section.hr.read())
    assert np.allclose(added, np.asarray(section.spots.counts.todense()))
    inside = section.spots.counts.sum() / section.hr.read().sum()
    assert inside > 0.99  # nearly all transcripts lie in spots that were kept


def test_instrument_files_that_do_not_join_end_in_a_clear_result(sections):
    section, told = sections("xoa3_sample1")
    assert len(section.hr.genes) == 428 and not any(
        gene.startswith("NegControl") for gene in section.hr.genes
    )
    assert section.image is None and section.cells.counts is None
    words = " ".join(told)
    assert all(part in words for part in ("other genes", "no H&E", "discs", "0 of 10000 cells", "too few"))


def test_visium_is_measured_by_its_lattice(sections, real_data):
    section, told = sections("visium")
    assert told == []
    assert section.spots.counts.shape == (493, 18085)
    assert section.spots.pitch_um == pytest.approx(100, rel=0.02)
    assert section.spots.size_um == pytest.approx(55)
    assert section.image.um_per_px == pytest.approx(2.0, rel=0.01)
    assert section.image_overlap > 0.98
    with h5py.File(real_data / "breast" / "visium" / "filtered_feature_bc_matrix.h5") as h5:
        assert section.spots.counts.sum(dtype=float) == h5["matrix/data"][:].sum()


def test_visium_without_its_full_image_takes_hires(real_data, tmp_path):
    for name in ("filtered_feature_bc_matrix.h5", "spatial"):
        source = real_data / "breast" / "visium" / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    told = []
    section = open_section(prepare(tmp_path, tmp_path / "s.zarr", genes=["GATA3"], warn=told.append))
    assert any("full-resolution" in sentence for sentence in told)
    assert section.image.um_per_px == pytest.approx(4.0, rel=0.01)


def test_legacy_st_is_measured_by_its_lattice(sections):
    section, told = sections("legacy_st_C2")
    assert told == []
    assert section.spots.pitch_um == pytest.approx(200, rel=0.1) and section.spots.size_um == pytest.approx(
        100
    )
    assert 0.6 < section.image.um_per_px < 0.8 and section.image_overlap == 1.0


def test_anndata_keeps_all_counts_and_lies_on_its_image(sections, real_data):
    import anndata

    section, told = sections("section_h5ad")
    table = anndata.read_h5ad(real_data / "breast" / "section_h5ad" / "cells.h5ad")
    assert np.array_equal(section.hr.read().sum((1, 2)), np.asarray(table.X.sum(0)).ravel())
    assert len(section.cells.outlines) == table.n_obs
    assert section.image.um_per_px == pytest.approx(10.8, rel=0.01)
    assert section.provenance["he"]["staining_follows_counts"] > 0.4
    assert any("no transcripts" in sentence for sentence in told)


# ------------------------------------------------------------------------------------------------- Visium HD


KIDNEY_GENES = ["AQP1", "NPHS2", "PODXL", "UMOD"]


@pytest.fixture(scope="module")
def kidney_folder(real_data):
    folder = real_data / "kidney" / "visium_hd"
    if not folder.is_dir():
        pytest.skip(f"no Visium HD section at {folder}")
    return folder


@pytest.fixture(scope="module")
def kidney(kidney_folder, tmp_path_factory):
    """The kidney section with some genes, and the warnings."""
    told = []
    path = tmp_path_factory.mktemp("kidney") / "k.zarr"
    return open_section(prepare(kidney_folder, path, genes=KIDNEY_GENES, warn=told.append)), told


def test_every_gene_keeps_its_total_when_bins_of_8_um_are_divided(kidney_folder):
    source = platforms.read(kidney_folder)
    counted = count_bins(source.bins, source.genes, 10.0, "square")
    with h5py.File(kidney_folder / "binned_outputs/square_008um/filtered_feature_bc_matrix.h5") as h5:
        genes = [gene.decode() for gene in h5["matrix/features/name"][:]]
        totals = np.bincount(h5["matrix/indices"][:], h5["matrix/data"][:], len(genes))
    assert source.genes == genes and len(genes) == 18_084
    layer = counted.counter
    written = [layer.block(number).sum(1, dtype=np.float64) for number in range(layer.blocks)]
    assert np.array_equal(np.concatenate(written), totals)
    assert np.array_equal(layer.per_gene, totals) and counted.kept == 41_043_515
    assert abs(counted.unseen.per_gene.sum() / counted.kept - 0.5) < 1e-3


def test_podocytes_lie_on_glomeruli(kidney):
    """Glomeruli hold more nuclei than tubules: podocyte genes follow blue staining, UMOD of tubules does not."""
    section, told = kidney
    assert [line for line in told if "spots hold" not in line] == []  # with four genes only, spots are thin
    grid = section.hr.grid
    red, _, blue = smooth_channels(section.image.read(grid))
    purple = smooth(blue - red, 3)
    inside = section.tissue.read(grid)

    def agreement(counts, stain):
        return np.corrcoef(smooth(counts, 3)[inside], stain[inside])[0, 1]

    podocytes = section.hr.read(["NPHS2", "PODXL"]).sum(0)
    right = agreement(podocytes, purple)
    moved = [
        purple[::-1],
        purple[:, ::-1],
        purple[::-1, ::-1],
        np.roll(purple, 15, 0),
        np.roll(purple, 15, 1),
    ]
    assert right > 0.25 and right > max(agreement(podocytes, stain) for stain in moved) + 0.15
    assert agreement(section.hr.read(["UMOD"])[0], purple) < right / 2


def test_the_alignment_of_the_kidney_is_kept_and_found_again(kidney, kidney_folder):
    section, _ = kidney
    assert section.provenance["he"]["refined"] is False
    source = platforms.read(kidney_folder, Options(genes=("UMOD",)))
    counted = count_bins(source.bins, source.genes, 10.0, "square")
    for shift in ((20, 0), (-20, 20)):
        away = np.eye(3)
        away[:2, 2] = shift
        found = refine(source.image.moved(away @ source.image.px_to_um), counted.density, counted.grid)
        back = found.px_to_um @ np.linalg.inv(source.image.px_to_um)
        corners = np.array([[200, 200, 1], [6500, 200, 1], [200, 3600, 1], [6500, 3600, 1.0]]).T
        assert found.applied and np.abs((back @ corners - corners)[:2]).max() < 6
    warnings = fit.fit(source.image, counted.density, counted.grid)[1]
    mirrored = np.diag([-1.0, 1.0, 1.0])
    mirrored[0, 2] = source.image.width
    turned = source.image.moved(source.image.px_to_um @ mirrored)
    assert warnings == [] and "mirrored left to right" in fit.fit(turned, counted.density, counted.grid)[1][0]
