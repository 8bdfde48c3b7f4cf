"""The default model on real tissue that it has not seen."""

import numpy as np
import pytest

from stsr.metrics import pearson
from stsr.store.section import open_section
from stsr.verbs.prepare.verb import prepare
from stsr.verbs.superres.verb import superres

HELD_OUT_UM = (1000.0, 900.0, 2000.0, 1900.0)  # see examples/default_model.py
GENES = [
    "GATA3",
    "ERBB2",
    "LUM",
    "POSTN",
    "LYZ",
    "EPCAM",
    "KRT7",
    "FOXA1",
    "CXCL12",
    "TPD52",
    "SERPINA3",
    "CD4",
]

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def section(real_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    return prepare(real_data / "breast" / "xenium_same_he", folder / "same.zarr")


@pytest.mark.parametrize("scale", [10, 5])
def test_the_default_model_beats_interpolation_on_unseen_tissue(section, scale):
    scores = {}
    for label, options in {"model": {}, "bicubic": {"method": "bicubic"}}.items():
        made = superres(
            section,
            genes=GENES,
            region=HELD_OUT_UM,
            scale=scale,
            name=f"{label}{scale}",
            samples=None,
            **options,
        )
        assert made.consistency_error < 1e-3
        shown = open_section(section).map(made.element)
        truth = open_section(section).hr.read(GENES, window=shown.grid.at(10)).astype(float)
        factor = truth.shape[1] // shown.grid.height
        truth = truth.reshape(len(GENES), shown.grid.height, factor, shown.grid.width, factor).sum((2, 4))
        scores[label] = pearson(shown.read(), truth).mean()
    assert scores["model"] > scores["bicubic"] + 0.02, scores


def test_real_visium_for_genes_inside_and_outside_the_panel(real_data, tmp_path):
    store = prepare(real_data / "breast" / "visium", tmp_path / "visium.zarr")
    made = superres(store, genes=["GATA3", "LUM", "ACTB", "COL1A1"], consistency="exact", adapt="off")
    assert made.consistency_error < 1e-3
    section = open_section(store)
    maps, spots = section.map(made.element), section.spots
    measurement, support = spots.measurement(maps.grid), section.support(maps.grid)
    whole = measurement.matrix @ ~support.ravel() == 0
    counts = spots.select(maps.genes).toarray()[whole]
    added = measurement.add_up(maps.read())[whole]
    assert whole.mean() > 0.9
    np.testing.assert_allclose(added.sum(0), counts.sum(0), rtol=1e-3)
    assert maps.read().min() >= 0 and not maps.read()[:, ~support].any()
