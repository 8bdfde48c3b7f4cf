"""Visium HD in a SpatialData store: tables of bins, as ``spatialdata_io.visium_hd`` writes them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp
from scipy import ndimage

from stsr.errors import StsrError
from stsr.histology import files as he
from stsr.histology.image import Image, um_per_px_of
from stsr.platforms.source import BinChunk, Bins, Options, Source, choose_genes
from stsr.platforms.spaceranger import Registration, open_image
from stsr.platforms.tenx import GENE
from stsr.platforms.visium_hd.matrix import binned, gene_index, runs
from stsr.platforms.visium_hd.positions import Positions, fitted_to
from stsr.store import discovery
from stsr.store.discovery import Frame

if TYPE_CHECKING:
    from anndata import AnnData

    from stsr.store.section import Section

_GAP_UM = 48.0  # narrower gaps between bins with counts are tissue: a table need not list empty bins


def read(section: Section, name: str, bin_um: float, options: Options) -> Source:
    """Read the bins of one table, and the image in the same coordinate system.

    Parameters
    ----------
    section
        The store. spatialdata holds its tables and shapes in memory.
    name, bin_um
        The table, with ``array_row`` and ``array_col``, and the size of its bins, um.
    options
        Genes; an image in whose full-resolution pixels the bins lie.

    Raises
    ------
    StsrError
        If counts are not raw, or positions do not follow the array.
    """
    table = section.sdata.tables[name]
    row, column = (table.obs[key].to_numpy(np.int64) for key in ("array_row", "array_col"))
    on = table.obs["in_tissue"].to_numpy(int) == 1 if "in_tissue" in table.obs else np.ones(len(row), bool)
    if not on.any():
        raise StsrError(f"no tissue found: no bin of {name} is marked as in tissue; check its table")
    positions = fitted_to(
        np.stack([column[on] + 0.5, row[on] + 0.5], 1) * bin_um,
        _centres(section, table, name)[on],
        bin_um,
        _mask(row[on], column[on], bin_um),
        None,
        section.path / "tables" / name,
    )
    genes = choose_genes(_names(table), options.genes, f"the table {name} of {section.path.name}")
    warnings: list[str] = []
    return Source(
        name=section.name,
        platform="spatialdata",
        genes=genes,
        image=_image(section, positions, options, warnings),
        bins=_stream(table, row, column, genes, positions),
        warnings=warnings,
        facts={
            "store": section.path.name,
            "counts_from": name,
            "counts_bin_um": bin_um,
            "um_per_unit": round(um_per_px_of(positions.px_to_um), 6),
            "positions_misfit_um": round(positions.misfit_um, 3),
        },
    )


def _centres(section: Section, table: AnnData, name: str) -> np.ndarray:
    """Centres of the bins (n, 2) in the section's coordinate system, in its units."""
    if "spatial" in table.obsm:
        return np.asarray(table.obsm["spatial"], float)[:, :2]
    sdata, shapes = section.sdata, next(iter(discovery.regions(table)), "")
    if shapes not in sdata.shapes:
        raise StsrError(f'the table {name} has no positions; put them in obsm["spatial"]')
    geometry, rows = discovery.annotated(sdata, shapes, name)
    centres = np.full((table.n_obs, 2), np.nan)
    to_unit = discovery.affine(sdata.shapes[shapes], _system(section))
    centres[rows], _, _ = discovery.outline(geometry, to_unit)
    return centres


def _system(section: Section) -> str:
    """The coordinate system of the full-resolution image."""
    return discovery.find_frame(section.sdata, um_per_unit=1.0).name  # the unit follows from the array


def _mask(row: np.ndarray, column: np.ndarray, bin_um: float) -> np.ndarray:
    """Bins in tissue (rows, columns) bool: those listed, and narrow gaps between them."""
    size = max(1, round(_GAP_UM / bin_um))
    mask = np.zeros((int(row.max()) + 1 + 2 * size, int(column.max()) + 1 + 2 * size), bool)
    mask[row + size, column + size] = True
    closed = ndimage.maximum_filter(mask, size)
    inner = ndimage.minimum_filter(closed, size, origin=0 if size % 2 else -1)
    return (inner | mask)[size:-size, size:-size]


def _names(table: AnnData) -> list[str]:
    kinds = table.var["feature_types"].astype(str) if "feature_types" in table.var else None
    keep = np.ones(table.n_vars, bool) if kinds is None else (kinds == GENE).to_numpy()
    return [str(name) for name in table.var_names[keep]]


def _stream(
    table: AnnData, row: np.ndarray, column: np.ndarray, genes: list[str], positions: Positions
) -> Bins:
    matrix: Any = sp.csr_matrix(table.layers.get("counts", table.X))
    gene_of = gene_index(
        np.arange(table.n_vars), [str(name) for name in table.var_names], genes, table.n_vars
    )
    indptr = matrix.indptr.astype(np.int64)

    def chunks() -> Iterator[BinChunk]:
        for first, last in runs(indptr):
            part, each = slice(indptr[first], indptr[last]), np.diff(indptr[first : last + 1])
            rows, columns = np.repeat(row[first:last], each), np.repeat(column[first:last], each)
            gene, number = gene_of[matrix.indices[part]], matrix.data[part]
            yield binned(rows, columns, gene, number, positions.in_tissue, positions.file)

    return Bins(chunks, positions.bin_um, positions.in_tissue, int(indptr[-1]))


def _image(section: Section, positions: Positions, options: Options, warnings: list[str]) -> Image | None:
    import dask.array as da

    if options.he is not None:
        registration = Registration(positions.px_to_um, positions.pixels, "bins")
        return open_image((), section.path, options, registration, warnings)
    images, system = section.sdata.images, _system(section)
    name = discovery.find_image(section.sdata, Frame(system, 1.0))
    if name is None:
        warnings.append(
            f"no H&E in {section.path.name}: superres needs one; add the full-resolution image with --he"
        )
        return None
    px_to_um = positions.px_to_um @ discovery.affine(images[name], system)
    he.check_pixel(px_to_um, None, f"image {name} in {section.path.name}")
    stored = [da.from_array(array, array.chunks, name=False) for array in section.arrays("images", name)]
    return Image([he.as_level(level, section.path, "cyx") for level in stored], px_to_um)
