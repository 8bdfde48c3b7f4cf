"""Expression of genes in cell types: the biology of the simulator.

The table was written by hand from well-known marker genes of the human breast, without copying data. Every gene is on
the 10x Xenium Human Breast panel, so a model trained on that panel can predict it.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

#: Names as in the breast single-cell reference commonly used with `stsr celltype`, plus Myoepithelial.
CELL_TYPES = (
    "Malignant",
    "Epithelial",
    "Myoepithelial",
    "Fibroblast",
    "Endothelial",
    "Pericyte",
    "T_cell",
    "B_cell",
    "Plasmablast",
    "Macrophage",
)

#: Mean counts in a cell of average size for the levels 0..4 of the table below.
LEVEL_COUNTS = np.array([0.01, 0.25, 1.0, 3.5, 9.0])

#: Smooth programmes across cells of all types, so that expression depends on position as well as on type.
PROGRAMMES = ("luminal", "cycling", "activated_stroma", "inflamed")

#: Gene, level (0 to 4) in each cell type in the order of CELL_TYPES, programme and its strength.
_TABLE = """
ERBB2     4310000000 luminal -0.6
GATA3     3310001000 luminal 0.4
FOXA1     3210000000 luminal 0.5
ESR1      2200000000 luminal 0.9
PGR       1100000000 luminal 1.0
EPCAM     3310000000 luminal 0.2
CDH1      3320000000 luminal 0.2
KRT7      3420000000 luminal -0.5
KRT8      3310000000 luminal 0.4
TACSTD2   3330000000 luminal -0.3
CEACAM6   3100000000 luminal -0.9
SERPINA3  3201000001 luminal 0.7
ANKRD30A  3200000000 luminal 0.8
MLPH      3210000000 luminal 0.4
SCD       2110000001 luminal -0.5
FASN      3210000000 luminal -0.5
CCND1     3212110000 luminal 0.6
ELF3      2210000000 luminal -0.3
CLDN4     3310000000 luminal -0.4
AGR3      2200000000 luminal 0.9
MKI67     2000001000 cycling 1.2
TOP2A     2000001000 cycling 1.2
CENPF     2000001000 cycling 1.2
PCLAF     2000001100 cycling 1.0
KRT5      0130000000 luminal -0.4
KRT14     0140000000 luminal -0.4
KRT15     0230000000 luminal -0.3
ACTA2     0042030000 activated_stroma 0.5
ACTG2     0031020000 activated_stroma 0.3
MYLK      0031130000 activated_stroma 0.2
MYH11     0030030000 activated_stroma -0.3
DST       1231110000 luminal 0.1
POSTN     0004010000 activated_stroma 1.0
LUM       0004010000 activated_stroma 0.2
MMP2      0003010000 activated_stroma 0.4
CCDC80    0003010000 activated_stroma -0.3
CXCL12    0003210000 activated_stroma -0.6
SFRP4     0003000000 activated_stroma 0.8
FBLN1     0013000000 activated_stroma -0.2
PDGFRA    0003000000 activated_stroma -0.2
PDGFRB    0002030000 activated_stroma 0.4
IGF1      0002000001 activated_stroma -0.8
ADH1B     0002000000 activated_stroma -1.0
DPT       0002000000 activated_stroma -1.0
PTGDS     0102000000 activated_stroma -0.7
ZEB2      0002222112 inflamed 0.1
PECAM1    0000300001 activated_stroma 0.2
VWF       0000300000 activated_stroma 0.2
AQP1      0000310000 activated_stroma -0.2
CLDN5     0000200000 activated_stroma 0.0
KDR       0000200000 activated_stroma 0.3
CAVIN2    0000200000 activated_stroma 0.0
CD3E      0000003000 inflamed 0.4
CD3D      0000002000 inflamed 0.4
TRAC      0000003000 inflamed 0.4
CD8A      0000002000 inflamed 0.8
CD4       0000002002 inflamed 0.2
IL7R      0000003000 inflamed -0.6
GZMA      0000002000 inflamed 0.9
CCL5      0000003001 inflamed 0.9
NKG7      0000002000 inflamed 0.9
PTPRC     0000003322 inflamed 0.2
CXCR4     0101103322 inflamed 0.3
MS4A1     0000000300 inflamed -0.2
CD79A     0000000330 inflamed -0.1
BANK1     0000000200 inflamed -0.3
MZB1      0000000130 inflamed 0.1
TNFRSF17  0000000020 inflamed 0.1
DERL3     0000000020 inflamed 0.1
CD68      0000000003 inflamed 0.2
CD163     0000000003 inflamed -0.3
LYZ       1000000004 inflamed 0.3
FCER1G    0000000003 inflamed 0.4
AIF1      0000000003 inflamed 0.3
CD14      0001000002 inflamed 0.1
C1QA      0000000003 inflamed -0.1
MRC1      0000000002 inflamed -0.5
TOMM7     3222222222 luminal 0.1
"""


@dataclass(frozen=True)
class GeneTable:
    """Rates of genes in cell types and their modulation."""

    genes: tuple[str, ...]
    rates: np.ndarray
    """(gene, type) float: mean counts in a cell of average size of that type."""
    programme: np.ndarray
    """(gene,) int: index into `PROGRAMMES`."""
    strength: np.ndarray
    """(gene,) float: change of the log rate per unit of the (standardised, smooth) programme field."""


def _known() -> dict[str, tuple[np.ndarray, int, float]]:
    known = {}
    for line in _TABLE.split("\n"):
        if line:
            gene, levels, programme, strength = line.split()
            rates = LEVEL_COUNTS[[int(level) for level in levels]]
            known[gene] = (rates, PROGRAMMES.index(programme), float(strength))
    return known


def _invented(gene: str, salt: int) -> tuple[np.ndarray, int, float]:
    """Rates of a gene that is not in the table; they depend on its name and the salt, not on its position."""
    rng = np.random.default_rng([salt, zlib.crc32(gene.encode())])
    levels = np.zeros(len(CELL_TYPES), int)
    homes = rng.choice(len(CELL_TYPES), size=rng.integers(1, 4), replace=False)
    levels[homes] = rng.choice([1, 2, 3], size=len(homes), p=[0.5, 0.35, 0.15])
    return LEVEL_COUNTS[levels], int(rng.integers(len(PROGRAMMES))), float(rng.normal(0, 0.5))


def gene_table(genes: Sequence[str] | int | None, rng: np.random.Generator) -> GeneTable:
    """Rates of genes in every cell type.

    Parameters
    ----------
    genes : sequence of str, int or None
        None: every gene of the table. A number: that many, first those of the table, then invented ones named
        `SIM0000` and so on. Names: these; a gene that is not in the table gets invented rates in one to three cell
        types.
    rng : numpy.random.Generator
        Seeds the invented rates.

    Returns
    -------
    GeneTable

    Raises
    ------
    ValueError
        If there is no gene, or one is named twice.
    """
    known, salt = _known(), int(rng.integers(2**31))
    if genes is None:
        names = list(known)
    elif isinstance(genes, int | np.integer):
        names = (list(known) + [f"SIM{i:04d}" for i in range(int(genes))])[: int(genes)]
    else:
        names = list(genes)
    if not names:
        raise ValueError("no genes to simulate: give at least one name, a number of 1 or more, or None")
    if len(set(names)) != len(names):
        raise ValueError("a gene is named twice: give every gene once")
    rows = [known.get(name) or _invented(name, salt) for name in names]
    return GeneTable(
        tuple(names),
        np.array([row[0] for row in rows]),
        np.array([row[1] for row in rows]),
        np.array([row[2] for row in rows]),
    )
