import numpy as np
import pytest
import scipy.sparse as sp

from stsr.errors import StsrError, UsageError
from stsr.genes import wanted_genes
from stsr.verbs.superres.mixtures import mixtures

PANEL = ["GATA3", "LUM", "LYZ"]
MEASURED = ["LYZ", "ACTB", "LUM", "KRT8"]


def test_by_default_the_genes_of_both():
    assert wanted_genes(None, MEASURED, PANEL) == ["LUM", "LYZ"]
    assert wanted_genes([], [], PANEL) == PANEL


def test_names_lists_and_files(tmp_path):
    listed = tmp_path / "genes.txt"
    listed.write_text("LUM  # collagen binder\n\nACTB,KRT8\n")
    assert wanted_genes(["GATA3,LUM", f"@{listed}"], MEASURED, PANEL) == ["GATA3", "LUM", "ACTB", "KRT8"]
    assert wanted_genes(["all"], MEASURED, PANEL) == MEASURED
    with pytest.raises(UsageError, match="cannot be read"):
        wanted_genes(["@nowhere.txt"], MEASURED, PANEL)


def test_an_unknown_gene_is_answered_with_near_ones():
    with pytest.raises(UsageError, match="did you mean GATA3"):
        wanted_genes(["gata-3"], MEASURED, PANEL)


def test_nothing_in_common():
    with pytest.raises(StsrError, match="in common"):
        wanted_genes(None, ["ACTB"], PANEL)


def spots():
    """LYZ and KRT8 are correlated, LUM anticorrelated with them; ACTB is constant."""
    rng = np.random.default_rng(0)
    level = rng.uniform(0, 1, 200)
    rates = np.stack([20 * level, np.full(200, 30.0), 20 * (1 - level), 40 * level], 1)
    return sp.csr_matrix(rng.poisson(rates).astype(np.float32))


def test_panel_genes_are_themselves_and_others_take_after_those_alike():
    mixed = mixtures(["LUM", "KRT8", "GATA3"], PANEL, MEASURED, spots())
    np.testing.assert_array_equal(mixed[0], [0, 1, 0])
    np.testing.assert_array_equal(mixed[2], [1, 0, 0])
    assert mixed[1, 2] > 0.5 and mixed[1, 1] < 0.1 and mixed[1, 0] == 0
    assert mixed.sum(1).max() <= 1 + 1e-6


def test_a_gene_like_no_other_is_left_alone():
    rng = np.random.default_rng(1)
    counts = sp.csr_matrix(np.hstack([rng.poisson(9, (300, 3)), rng.poisson(9, (300, 1))]).astype(np.float32))
    mixed = mixtures(["X"], ["A", "B", "C"], ["A", "B", "C", "X"], counts)
    assert mixed.sum() < 0.3


def test_order_of_genes_does_not_matter():
    one = mixtures(["KRT8", "ACTB"], PANEL, MEASURED, spots())
    two = mixtures(["ACTB", "KRT8"], PANEL, MEASURED, spots())
    np.testing.assert_array_equal(one, two[::-1])


def test_without_spots_only_the_panel():
    with pytest.raises(UsageError, match="KRT8"):
        mixtures(["KRT8"], PANEL, [], None)
