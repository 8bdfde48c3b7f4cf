"""Parts of celltype: regression, platform effects, clusters, colours, references and markers."""

import json
from itertools import pairwise

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from stsr.errors import UsageError
from stsr.verbs.celltype import model, signatures

GENES = [f"G{number}" for number in range(30)]


@pytest.fixture
def profiles():
    """(30, 3) shares of genes in three types that overlap."""
    drawn = np.random.default_rng(1).gamma(0.5, size=(30, 3)) + 0.01
    return drawn / drawn.sum(0)


# ---------------------------------------------------------------------------------------------- regression


def test_expected_counts_give_back_their_mixture(profiles):
    weights = np.array([[100, 0, 0], [10, 80, 10], [0, 30, 70], [0.2, 0.3, 0.5]], np.float32)
    found = model.transcripts_by_type(weights @ profiles.T, profiles, steps=2000)
    np.testing.assert_allclose(model.proportions(found), model.proportions(weights), atol=0.02)
    np.testing.assert_allclose(found.sum(1), weights.sum(1), rtol=1e-3)


def test_the_likelihood_never_falls(profiles):
    counts = np.random.default_rng(2).poisson(3.0, size=(20, 30))

    def deviance(steps):
        mean = model.transcripts_by_type(counts, profiles, steps=steps) @ profiles.T
        return (mean - counts * np.log(np.maximum(mean, 1e-12))).sum()

    values = [deviance(steps) for steps in (10, 20, 50, 200)]
    assert all(after <= before + 1e-3 for before, after in pairwise(values))
    assert values[-1] < values[0]


def test_the_maximum_agrees_with_a_general_optimiser(profiles):
    from scipy.optimize import minimize

    counts = np.random.default_rng(3).poisson(4 * profiles @ [20, 5, 1])

    def deviance(logs):
        mean = profiles @ np.exp(logs)
        return (mean - counts * np.log(mean)).sum()

    best = np.exp(
        minimize(deviance, np.log([10.0, 10, 10]), method="Nelder-Mead", options={"maxiter": 5000}).x
    )
    found = model.transcripts_by_type(counts[None], profiles, steps=3000)[0]
    np.testing.assert_allclose(found, best, atol=0.01 * counts.sum())


def test_signatures_that_share_no_gene_are_counting():
    flat = np.kron(np.eye(2), np.ones((2, 1)))  # genes 0, 1 are of the first type; 2, 3 of the second
    counts = np.array([[3, 1, 2, 0], [0, 0, 0, 5], [0, 0, 0, 0]])
    np.testing.assert_allclose(model.transcripts_by_type(counts, flat), [[4, 2], [0, 5], [0, 0]], atol=1e-3)


def test_platform_effects_are_found():
    rng = np.random.default_rng(4)
    many = rng.gamma(0.3, size=(400, 5)) + 0.05
    many /= many.sum(0)
    effects = np.exp(rng.normal(0, 1, 400))
    effects /= np.exp(np.log(effects).mean())
    weights = rng.dirichlet([0.3] * 5, 300) * 200
    counts = rng.poisson(weights @ (many * effects[:, None]).T)
    found = model.platform_effects(counts.sum(0), many)
    assert np.corrcoef(np.log(found), np.log(effects))[0, 1] > 0.97
    assert np.exp(np.log(found).mean()) == pytest.approx(1)


def test_without_platform_effects_none_are_found(profiles):
    np.testing.assert_allclose(
        model.platform_effects(1e6 * profiles @ [0.5, 0.3, 0.2], profiles), 1, atol=0.01
    )


def test_what_is_unassigned():
    shares = np.array([[0.5, 0.3, 0.2], [0.35, 0.33, 0.32], [0.1, 0.1, 0.8], [0, 0, 0]])
    codes = model.assign(shares, np.array([10, 10, 4, 0]), min_probability=0.4, min_counts=5)
    np.testing.assert_array_equal(codes, [1, 0, 0, 0])


def test_agreement_falls_with_the_spread(profiles):
    counts = (np.array([[60, 40, 0]] * 200) @ profiles.T).astype(np.float32)
    weights = model.transcripts_by_type(counts, profiles)
    found = [
        model.agreement(
            counts,
            part * counts,
            signatures=profiles,
            weights=weights,
            draws=10,
            rng=np.random.default_rng(0),
        ).mean()
        for part in (0.0, 0.5, 3.0)
    ]
    assert found[0] == 1 and found[0] >= found[1] > found[2] + 0.05


# ------------------------------------------------------------------------------------------------- clusters


def test_clusters_and_their_markers():
    pytest.importorskip("igraph", reason="scanpy's Leiden runs on it")
    rng = np.random.default_rng(5)
    rate = np.ones((2, 12))
    rate[0, :3] = rate[1, 3:6] = 12
    group = np.repeat([0, 1], [90, 60])
    counts = rng.poisson(rate[group])
    labels = model.clusters(counts, 0.3, seed=0)
    np.testing.assert_array_equal(labels, group)  # the larger is 0
    np.testing.assert_array_equal(labels, model.clusters(counts, 0.3, seed=0))
    genes = GENES[:12]
    assert [set(best) for best in model.ranked_markers(counts, labels, genes, 3)] == [
        set(genes[:3]),
        set(genes[3:6]),
    ]


def test_too_few_places_to_cluster():
    pytest.importorskip("igraph")
    with pytest.raises(UsageError, match="too few"):
        model.clusters(np.ones((20, 5)), 1.0, 0)


# -------------------------------------------------------------------------------------------------- colours


def test_colours_follow_names():
    many = ["T_cell", "Fibroblast", "strange", "Zebra", "cluster 1", "cluster 2", model.UNASSIGNED]
    first = dict(zip(many, model.colours(many), strict=True))
    assert len(set(first.values())) == len(many)
    assert first[model.UNASSIGNED] == model.GREY
    for name in many:
        assert model.colours([name]) == [first[name]]
    assert model.colours(["T cell"]) == model.colours(["t_cells"])
    forty = [f"cluster {number}" for number in range(40)]
    assert len(set(model.colours(forty))) == 40


# ----------------------------------------------------------------------------------------------- references


def table(path, values=None, sep=","):
    values = np.arange(1.0, 9).reshape(4, 2) if values is None else values
    frame = pd.DataFrame(values, index=GENES[: len(values)], columns=["A", "B", "C"][: values.shape[1]])
    frame.to_csv(path, sep=sep)
    return frame


@pytest.mark.parametrize("name", ["r.csv", "r.tsv", "r.csv.gz"])
def test_a_table_reads_either_way_round(tmp_path, name):
    sep = "\t" if "tsv" in name else ","
    frame = table(tmp_path / name, sep=sep)
    frame.T.to_csv(tmp_path / f"t{name}", sep=sep)
    for file in (name, f"t{name}"):
        found = signatures.read_reference(tmp_path / file, None, GENES)
        assert (found.types, found.genes) == (["A", "B"], GENES[:4])
        np.testing.assert_array_equal(found.counts, frame)
        np.testing.assert_allclose(found.profiles.sum(0), 1)


@pytest.fixture
def cells():
    """60 labelled cells with raw counts, two types and a rare third."""
    rng = np.random.default_rng(6)
    kind = np.repeat(["A", "B", "rare", "Unknown"], [30, 20, 4, 6])
    counts = rng.poisson(2.0, (60, 8)).astype(np.float32)
    return anndata.AnnData(
        sp.csr_matrix(counts),
        obs=pd.DataFrame({"kind": pd.Categorical(kind), "age": 1}, index=map(str, range(60))),
        var=pd.DataFrame({"feature_name": GENES[:8]}, index=[f"ENSG{number}" for number in range(8)]),
    )


def test_labelled_cells(cells, tmp_path):
    counts, kind = cells.X.toarray(), cells.obs["kind"]
    expected = np.stack([counts[kind == name].sum(0) for name in "AB"], axis=1)
    cells.write_h5ad(tmp_path / "raw.h5ad")
    found = signatures.read_reference(tmp_path / "raw.h5ad", "kind", GENES)
    assert found.types == ["A", "B"] and found.genes == GENES[:8]  # symbols, as the section has them
    np.testing.assert_allclose(found.counts, expected)
    assert len(found.notes) == 1 and "rare" in found.notes[0]

    cells.layers["counts"] = cells.X.copy()
    cells.X = cells.X.log1p()
    cells.write_h5ad(tmp_path / "LAYERED.H5AD")
    np.testing.assert_allclose(
        signatures.read_reference(tmp_path / "LAYERED.H5AD", "kind", GENES).counts, expected
    )

    del cells.layers["counts"]
    cells.write_h5ad(tmp_path / "logged.h5ad")
    logged = signatures.read_reference(tmp_path / "logged.h5ad", "kind", GENES)
    assert any("no raw counts" in note for note in logged.notes)
    np.testing.assert_allclose(logged.counts, expected, rtol=1e-4)


def test_bad_tables(tmp_path):
    def refused(match, label_key=None, **options):
        with pytest.raises(UsageError, match=match):
            signatures.read_reference(tmp_path / "r.csv", label_key, GENES, **options)

    refused("there is no file")
    table(tmp_path / "r.csv", np.array([[1, -2], [3, 4]]))
    refused("negative")
    table(tmp_path / "r.csv", np.array([[1.0], [3]]))
    refused("1 cell type")
    table(tmp_path / "r.csv", np.array([[1.0, 0], [3, 0]]))
    refused("'B'")
    table(tmp_path / "r.csv", np.array([[1.0, np.nan], [3, 4]]))
    refused("without a number")
    refused("label-key", label_key="kind")
    (tmp_path / "r.csv").write_text("gene,A,B\nG0,many,few\n")
    refused("not a table of numbers")
    (tmp_path / "r.csv").write_bytes(b"\x00\xff\xfe\x81")
    refused("r.csv")


def test_bad_cells(cells, tmp_path):
    def refused(match, label_key="kind"):
        with pytest.raises(UsageError, match=match):
            signatures.read_reference(tmp_path / "r.h5ad", label_key, GENES)

    (tmp_path / "r.h5ad").write_text("no h5")
    refused("cannot be read")
    cells.write_h5ad(tmp_path / "r.h5ad")
    refused("one of: kind, age", label_key="celltype")
    refused("one of: kind, age", label_key=None)
    cells[cells.obs["kind"] == "A"].copy().write_h5ad(tmp_path / "r.h5ad")
    refused("1 cell type")
    cells.X = cells.X - sp.csr_matrix(np.ones(cells.shape, np.float32))
    cells.write_h5ad(tmp_path / "r.h5ad")
    refused("negative")


def test_informative_genes_are_kept_first():
    counts = np.ones((6, 2))
    counts[2, 0] = counts[5, 1] = 50
    found = signatures.Signatures(["A", "B"], GENES[:6], counts).informative(2)
    assert found.genes == ["G2", "G5"] and found.distinct(1) == [["G2"], ["G5"]]


# -------------------------------------------------------------------------------------------------- markers

MARKERS = {"A": ["G0", "G1"], "B": ["G2", "nope"]}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("m.json", json.dumps(MARKERS)),
        ("m.gmt", "A\tabout\tG0\tG1\nB\t\tG2\tnope\n"),
        ("m.csv", "type,gene\nA,G0\nA,G1\nB,G2\nB,nope\n"),
        ("m.csv", "Gene,cell_type\nG0,A\nG1,A\nG2,B\nnope,B\n"),
        ("m.csv", " GENE , CellType \n G0 , A \nG1,A\n,\n,B\nG2,B\nG9,\n nope,B \n"),
        ("m.csv", "gene,note,TYPE\nG0,of A,A\nG2,,B\nG1,,A\nnope,,B\n"),
        ("m.gmt", "\n A \tabout\tG0\t\t G1 \n\n\t \nB\tx\tG2\tnope\t\n"),
        ("M.GMT", "A\tabout\tG0\tG1\nB\t\tG2\tnope\n"),
    ],
)
def test_markers_in_three_formats(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert signatures.read_markers(tmp_path / name) == MARKERS


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("m.json", '{"2": [7], "1": [8, 9]}'),
        ("m.csv", "type,gene\n2,7\n1,8\n1,9\n"),
        ("m.gmt", "2\t\t7\n1\t\t8\t9\n"),
    ],
)
def test_types_and_markers_are_text_in_the_order_of_the_file(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert list(signatures.read_markers(tmp_path / name).items()) == [("2", ["7"]), ("1", ["8", "9"])]


def test_a_gmt_line_of_one_gene_is_enough_and_one_of_none_is_not(tmp_path):
    (tmp_path / "m.gmt").write_text("A\tabout\tG0\nB\tabout\tG1\n")
    assert signatures.read_markers(tmp_path / "m.gmt") == {"A": ["G0"], "B": ["G1"]}


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("m.json", "{", "not a list of markers"),
        ("m.json", '["G0"]', "not a list of markers"),
        ("m.json", '{"A": "G0", "B": "G1"}', "not a list of markers"),
        ("m.json", '{"A": ["G0"]}', "1 cell type"),
        ("m.gmt", "A G0 G1\n", "not a list of markers"),
        ("m.gmt", "A\tabout\tG0\nB\tabout\n", "not a list of markers"),
        ("m.json", '{"A": ["G0"], "B": "G1"}', "not a list of markers"),
        ("m.csv", "type,genes\nA,G0\nB,G1\n", "not a list of markers"),
        ("m.csv", "kind,gene\nA,G0\nB,G1\n", "not a list of markers"),
        ("m.csv", "type,gene\nA,G0\nA,G1\n", "1 cell type"),
        ("m.txt", "type,gene\nA,G0\nB,G1\n", "give a .csv, .gmt or .json"),
        ("m.csv", "a,b\n1,2\n", "not a list of markers"),
        ("m.xlsx", "", "csv"),
    ],
)
def test_bad_markers(tmp_path, name, text, match):
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=match):
        signatures.read_markers(tmp_path / name)


def test_markers_become_flat_signatures():
    found = signatures.from_markers({**MARKERS, "C": ["nowhere"]}, GENES)
    assert (found.types, found.genes) == (["A", "B"], ["G0", "G1", "G2"])
    np.testing.assert_array_equal(found.counts, [[1, 0], [1, 0], [0, 1]])
    assert found.notes == ["C has no marker in the map and is left out"]
    with pytest.raises(UsageError, match="1 of the 4 marker genes are in the map, of 1 of 2 types"):
        signatures.from_markers({"A": ["G0", "x"], "B": ["y", "z"]}, GENES)


def test_a_missing_file_of_markers(tmp_path):
    with pytest.raises(UsageError, match=r"nowhere.csv .* that exists"):
        signatures.read_markers(tmp_path / "nowhere.csv")


def test_genes_are_listed_once_and_belong_to_every_type_that_names_them():
    """Repeats within a type, genes shared by types, and genes that the section lacks."""
    found = signatures.from_markers({"A": ["G3", "x", "G0", "G3"], "B": ["G0", "G1"]}, GENES)
    assert (found.types, found.genes, found.notes) == (["A", "B"], ["G3", "G0", "G1"], [])
    np.testing.assert_array_equal(found.counts, [[1, 0], [1, 1], [0, 1]])
    np.testing.assert_allclose(found.profiles, [[0.5, 0], [0.5, 0.5], [0, 0.5]])


def test_one_type_with_markers_is_not_enough_and_two_are():
    two = {"A": ["G0"], "B": ["G1"], "C": ["x"]}
    assert signatures.from_markers(two, GENES).types == ["A", "B"]
    with pytest.raises(UsageError, match="2 of the 4 marker genes are in the map, of 1 of 3 types"):
        signatures.from_markers({**two, "B": ["G1", "G2", "G1"]}, ["G1", "G2"])
    with pytest.raises(UsageError, match="0 of the 3 marker genes are in the map, of 0 of 3 types"):
        signatures.from_markers(two, [])
