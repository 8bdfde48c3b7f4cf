"""What maps are made from and add up to: raw or denoised counts of spots."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from stsr.errors import StsrError, UsageError
from stsr.metrics import pearson
from stsr.progress import silent
from stsr.spots.denoising import denoise
from stsr.store.parts import Spots
from stsr.store.section import open_section
from stsr.verbs.superres.job import make_job
from stsr.verbs.superres.loading import load
from stsr.verbs.superres.predict import predicted_maps
from stsr.verbs.superres.spots import spot_counts, with_denoised
from stsr.verbs.superres.verb import superres

GENES = ["GATA3", "LUM", "LYZ"]
PLAIN = {"method": "bilinear", "genes": GENES, "overwrite": True}


@pytest.fixture
def visium(visium_section, tmp_path):
    return shutil.copytree(visium_section, tmp_path / "visium.zarr")


def _maps(store, **options):
    made = superres(store, **PLAIN | options)
    section = open_section(store)
    return made, section, section.map(made.element)


def _few(counts, genes=("A", "B")):
    counts = np.asarray(counts, float)
    centres = np.stack([100.0 * np.arange(len(counts)), np.zeros(len(counts))], 1)
    return Spots(centres, sp.csr_matrix(counts), list(genes), "disc", 55.0)


def test_measured_spots_are_denoised_and_sums_are_not(visium_section, xenium_section):
    measured, sums = open_section(visium_section), open_section(xenium_section)
    assert not measured.spots_are_sums and sums.spots_are_sums
    for section, expected in ((measured, ("denoised", "none")), (sums, ("raw", "exact"))):
        counts, notes = spot_counts(section.spots, "auto", "auto", are_sums=section.spots_are_sums)
        assert (counts.read, counts.consistency) == expected and not notes
        kriged, _ = spot_counts(section.spots, "auto", "auto", are_sums=section.spots_are_sums, kriges=True)
        assert kriged.read == "denoised"  # single counts have no useful logarithm


def test_spots_from_a_half_of_the_counts_are_not_sums(xenium_section, monkeypatch):
    section = open_section(xenium_section)
    made = {"spots_table": {**section.provenance["spots_table"], "depth": 0.5}}
    monkeypatch.setattr(type(section), "provenance", property(lambda self: made))
    assert not section.spots_are_sums


def test_one_gene_alone_is_not_denoised_unless_asked():
    spots = _few([[3, 0], [5, 0], [0, 0]])
    counts, notes = spot_counts(spots, "auto", "auto", are_sums=False)
    assert counts.read == "raw" and "one has counts" in notes[0]
    asked, _ = spot_counts(spots, "denoised", "none", are_sums=False)
    with pytest.raises(StsrError, match="compares genes"):
        asked.fitted(["A"])


@pytest.mark.parametrize("wrong", [{"spots": "smooth"}, {"consistency": "yes"}])
def test_unknown_values_are_refused(visium, wrong):
    with pytest.raises(UsageError, match=f"--{next(iter(wrong))} must be one of auto"):
        superres(visium, **PLAIN, **wrong)


def _job(section, **options):
    loaded = load(None, "bilinear", section, use_lr=True, device=torch.device("cpu"))
    usual = {"scale": 10, "genes": GENES, "use_lr": True, "seed": 0, "consistency": "none", "base": "auto"}
    others = dict.fromkeys(("samples", "region", "name"))
    return with_denoised(make_job(section, loaded, **others | usual | options), silent)


def _columns(spots):
    return np.array([spots.genes.index(gene) for gene in GENES])


def _expected(spots):
    """Expected counts (n, g) of `GENES`."""
    columns = _columns(spots)
    order = np.argsort(columns)
    made = np.empty((len(spots.centres_um), len(GENES)), np.float32)
    made[:, order] = denoise(spots.counts, genes=columns[order]).expected()
    return made


def test_the_method_reads_denoised_counts(visium, monkeypatch):
    """The map of denoised spots is that of a section whose counts are the expected ones."""
    section = open_section(visium)
    genes = slice(0, len(GENES))
    denoised = predicted_maps(_job(section, spots="denoised"), genes, silent)
    raw = predicted_maps(_job(section, spots="raw"), genes, silent)
    replaced = section.spots.counts.toarray()
    replaced[:, _columns(section.spots)] = _expected(section.spots)
    monkeypatch.setitem(section.__dict__, "spots", replace(section.spots, counts=sp.csr_matrix(replaced)))
    np.testing.assert_allclose(predicted_maps(_job(section, spots="raw"), genes, silent), denoised, rtol=1e-4)
    assert np.abs(raw - denoised).max() > 0.05 * raw.max()


def test_the_result_says_what_was_read(visium):
    made, section, _ = _maps(visium)
    assert (made.spots, made.consistency, made.consistency_error) == ("denoised", "none", None)
    provenance = section.provenance[made.element]
    assert (provenance["spots"], provenance["consistency"]) == ("denoised", "none")
    assert provenance["denoising"]["components"] >= 0


@pytest.mark.parametrize("consistency", ["exact", "denoised"])
def test_maps_add_up_to_what_was_asked(visium, consistency):
    made, section, maps = _maps(visium, spots="denoised", consistency=consistency)
    assert made.consistency == consistency and made.consistency_error < 1e-3
    spots = section.spots
    whole = spots.measurement(maps.grid)
    support = section.support(maps.grid).ravel()
    inside = np.asarray(whole.matrix @ ~support).ravel() < 1e-6
    targets = {"exact": spots.select(GENES).toarray(), "denoised": _expected(spots)}
    sums = whole.add_up(maps.read(GENES))[inside]
    for name, target in targets.items():
        error = np.abs(sums - target[inside]).sum(0) / target[inside].sum(0)
        assert (error < 2e-3).all() if name == consistency else (error > 0.02).all()


def test_smooth_consistency_brings_sums_towards_expected_counts(visium):
    """Closer than without, and not as close as sums that agree with every spot."""
    errors = {}
    for consistency in ("none", "smooth", "denoised"):
        made, section, maps = _maps(visium, spots="denoised", consistency=consistency)
        assert (made.consistency, made.consistency_error is None) == (consistency, consistency != "denoised")
        whole = section.spots.measurement(maps.grid)
        inside = np.asarray(whole.matrix @ ~section.support(maps.grid).ravel()).ravel() < 1e-6
        target = _expected(section.spots)[inside]
        errors[consistency] = np.abs(whole.add_up(maps.read(GENES))[inside] - target).sum() / target.sum()
    assert errors["none"] > 1.03 * errors["smooth"] > 3 * errors["denoised"]


def test_denoised_maps_are_nearer_the_truth(visium, tissue):
    grid = open_section(visium).grid(20.0)
    counts = tissue.counts(20.0, grid.x0_um, grid.y0_um, grid.width, grid.height)
    truth = counts[[tissue.genes.index(gene) for gene in GENES]].astype(float)
    found = {}
    for spots in ("raw", "denoised"):
        maps = _maps(visium, spots=spots, consistency="none", scale=5, name=spots)[2]
        found[spots] = np.nanmean(pearson(maps.read(GENES, grid).astype(float), truth))
    assert found["denoised"] > found["raw"]


def test_spots_that_are_left_out_change_nothing(visium, monkeypatch):
    """`kept` restricts every use of the counts: raster, denoising, mixtures and correction."""
    section = open_section(visium)
    kept = np.arange(0, len(section.spots.centres_um), 2)

    def maps():
        job = _job(section, spots="denoised", consistency="denoised", kept=kept)
        found = predicted_maps(job, slice(0, len(GENES)), silent)
        job.correction.apply(found, job.counts.targets(GENES, job.corrected))
        return found

    before = maps()
    changed = section.spots.counts.toarray()
    changed[1::2] = changed[1::2][:, ::-1] * 3
    monkeypatch.setitem(section.__dict__, "spots", replace(section.spots, counts=sp.csr_matrix(changed)))
    np.testing.assert_array_equal(maps(), before)
    changed[::2] *= 2
    monkeypatch.setitem(section.__dict__, "spots", replace(section.spots, counts=sp.csr_matrix(changed)))
    assert np.abs(maps() - before).max() > 0.1 * before.max()


def test_kriged_maps(visium):
    """A method of its own, and a base for others; recorded with its covariance."""
    made, section, kriged = _maps(visium, method="kriged", name="kriged")
    provenance = section.provenance[made.element]
    assert provenance["base"] == "kriged" and provenance["kriging"]["length_um"] > 0
    based = _maps(visium, base="kriged", name="based")[2]
    plain = _maps(visium, name="plain")[2]
    np.testing.assert_array_equal(based.read(GENES), kriged.read(GENES))
    assert np.abs(kriged.read(GENES) - plain.read(GENES)).max() > 0.05 * plain.read(GENES).max()
    with pytest.raises(UsageError, match="leave out --base"):
        superres(visium, **PLAIN | {"method": "kriged"}, base="raster")


def test_kriged_densities_of_a_window_are_those_of_the_whole(visium):
    section = open_section(visium)
    job = _job(section, spots="denoised", base="kriged")
    kriged = job.counts.kriged(GENES, job.spots)
    whole = kriged.maps(job.grid)
    window = job.grid.window(10, 20, 30, 20)
    np.testing.assert_allclose(kriged.maps(window), whole[:, 10:40, 20:40], rtol=1e-5)
    assert job.counts.kriged(GENES[:1], job.spots).maps(window).shape == (1, 30, 20)
