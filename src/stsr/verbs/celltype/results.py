"""Cell types as elements of the store: labels and tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from stsr.store import elements, names
from stsr.store.places import BinPlaces, CellPlaces, Places
from stsr.verbs.celltype import model
from stsr.verbs.celltype.learning import Fit, Learned
from stsr.verbs.celltype.model import UNASSIGNED

if TYPE_CHECKING:
    from anndata import AnnData

_USUAL_SCALE = 10  # for the name, if that of the cells is not known


def result_names(places: Places, name: str | None) -> list[str]:
    """Names of the elements to write; the first is reported to the user.

    For bins: labels of types, table of types, table of bins, labels of bin numbers. For cells: their table.
    """
    usual = names.result_name("celltype", places.scale or _USUAL_SCALE)
    if isinstance(places, CellPlaces):
        return [names.check_name(name or f"{usual}_cells")]
    base = names.check_name(name or usual)
    return [base, names.table_name(base), f"{base}_bins", f"{base}_bin_ids"]


@dataclass(frozen=True)
class Typed:
    """Places with their cell types.

    Parameters
    ----------
    places
        Bins or cells, n.
    learned
        Signatures of k types.
    fit
        Proportions and confidence.
    codes
        (n,) type of each place, 1 to k; 0 for unassigned.
    """

    places: Places
    learned: Learned
    fit: Fit
    codes: np.ndarray

    def elements(self, outputs: Sequence[str], frame: elements.Frame) -> dict[str, Any]:
        """{name: element} to publish under the names of `result_names`."""
        if isinstance(self.places, CellPlaces):
            return {outputs[0]: self._cells_table(self.places)}
        labels, types, bins, ids = outputs
        numbers = np.arange(1, self.places.count + 1, dtype=np.int32)
        return {
            labels: elements.labels(
                self.places.raster(self.codes.astype(np.uint16)), self.places.grid, frame
            ),
            types: self._types_table(labels),
            bins: self._bins_table(self.places, ids, numbers),
            ids: elements.labels(self.places.raster(numbers), self.places.grid, frame),
        }

    @property
    def _types(self) -> list[str]:
        return self.learned.signatures.types

    def _table(self, rows: Sequence[str]) -> AnnData:
        """AnnData (places, types): proportions in X, so that scanpy draws them by the types' names."""
        import anndata

        fit, types = self.fit, self._types
        table = anndata.AnnData(fit.shares, obs=pd.DataFrame(index=list(rows)), var=pd.DataFrame(index=types))
        codes = (self.codes - 1) % (len(types) + 1)
        table.obs["celltype"] = pd.Categorical.from_codes(codes, [*types, UNASSIGNED])
        table.obs["probability"] = fit.shares.max(1)
        if fit.confidence is not None:
            table.obs["confidence"] = fit.confidence
        table.obs["counts"] = fit.counts
        # read by squidpy and decoupler
        table.obsm["proportions"] = pd.DataFrame(fit.shares, table.obs_names, types)
        table.uns["celltype_colors"] = model.colours([*types, UNASSIGNED])
        return table

    def _bins_table(self, places: BinPlaces, ids: str, numbers: np.ndarray) -> AnnData:
        """One row per bin; annotates the labels ``ids``, so that spatial queries select rows as they select bins."""
        table = self._table([f"{r}_{c}" for r, c in zip(places.rows, places.columns, strict=True)])
        table.obs["row"], table.obs["column"] = places.rows, places.columns
        table.obsm["spatial"] = places.centres_um
        table = elements.annotating(table, ids, numbers)
        # As a list: spatialdata looks for an element's name in this value, and would find "x" in the text "x_bin_ids".
        table.uns["spatialdata_attrs"]["region"] = [ids]
        return table

    def _cells_table(self, places: CellPlaces) -> AnnData:
        """One row per cell; annotates the shapes that the source annotates."""
        table = self._table([str(name) for name in places.obs_names])
        kinds = table.obs["celltype"].cat
        # For shapes, spatialdata-plot assigns the colours in order to the categories that occur.
        colours = dict(zip(kinds.categories, table.uns["celltype_colors"], strict=True))
        table.obs["celltype"] = kinds.remove_unused_categories()
        table.uns["celltype_colors"] = [colours[kind] for kind in table.obs["celltype"].cat.categories]
        if places.centres_um is not None:
            table.obsm["spatial"] = np.asarray(places.centres_um, float)
        return elements.annotating(table, places.element, places.ids)

    def _types_table(self, labels: str) -> AnnData:
        """One row per type; annotates the codes of the labels."""
        import anndata

        types = self._types
        rows = pd.DataFrame(index=types)
        rows["celltype"] = pd.Categorical(types, types)
        rows["color"] = model.colours(types)
        rows["bins"] = np.bincount(self.codes, minlength=len(types) + 1)[1:]
        rows["genes"] = [", ".join(genes) for genes in self.learned.shown]
        table = anndata.AnnData(obs=rows, uns={"celltype_colors": model.colours(types)})
        return elements.annotating(table, labels, np.arange(1, len(types) + 1))
