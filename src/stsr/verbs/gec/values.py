"""Values of genes over places, read from disk once where memory allows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stsr.store.places import BinPlaces, Places, SpotPlaces
from stsr.verbs.gec import matrices


class Values:
    """Values of a map's genes that stay in memory after the first reading.

    Parameters
    ----------
    places
        Bins of a map. Values of cells and spots are in memory already and pass through.
    genes
        Genes to keep; those that the map lacks are skipped.
    most_bytes
        Memory that may be used. If the values do not fit, they are read from disk each time.

    Attributes
    ----------
    name, count, genes
        Of the places: name of the element, number of places, set of genes.
    bytes
        Memory that the values take once all of them are read; 0 if they are not kept.
    """

    def __init__(self, places: Places | SpotPlaces, genes: Sequence[str], most_bytes: int):
        self.name, self.count, self.genes = places.name, places.count, frozenset(places.genes)
        self._places = places
        kept = [gene for gene in genes if gene in self.genes] if isinstance(places, BinPlaces) else []
        size = 4 * len(kept) * places.count
        self._column = {gene: number for number, gene in enumerate(kept)} if size <= most_bytes else {}
        self._is_read: set[str] = set()
        # Genes vary fastest in memory, as in values read from a map, so that sums are rounded alike.
        self._kept = np.empty((places.count, len(self._column)), np.float32)
        self.bytes = self._kept.nbytes

    def read(self, genes: Sequence[str]) -> np.ndarray:
        """Values (genes, places)."""
        if not all(gene in self._column for gene in genes):
            return self._places.read(genes)
        missing = [gene for gene in genes if gene not in self._is_read]
        if missing:
            values = self._places.read(missing)
            single = values.astype(np.float32)
            if not np.array_equal(single, values):  # NaN, or more digits than float32 holds
                self._column = {}
                return self._places.read(genes)
            self._kept[:, [self._column[gene] for gene in missing]] = single.T
            self._is_read.update(missing)
        return np.take(self._kept, [self._column[gene] for gene in genes], axis=1).T

    def reader(self, genes: Sequence[str]) -> matrices.Read:
        """Values of a slice of these genes."""
        return lambda part: self.read(genes[part])


def values_of(layers: Sequence[Places | SpotPlaces], genes: Sequence[str]) -> list[Values]:
    """Values of several layers, kept in memory in this order, up to half of `matrices.MEMORY_BYTES` in all."""
    left = matrices.MEMORY_BYTES // 2  # the matrices' blocks take as much again
    found = []
    for places in layers:
        found.append(Values(places, genes, left))
        left -= found[-1].bytes
    return found
