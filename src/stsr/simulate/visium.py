"""Write a simulated tissue as the output folder of Space Ranger for a Visium section."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np

from stsr.simulate.formats import empty_folder, write_matrix_h5, write_rgb_tiff
from stsr.simulate.histology import render_he
from stsr.simulate.tissue import Tissue

SPOT_UM = 55.0
PITCH_UM = 100.0
_HIRES_PX, _LOWRES_PX = 2000, 600  # Space Ranger's own limits for the two small images
_COLUMNS = ("barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres")


def write_visium(
    tissue: Tissue,
    folder: str | Path,
    version: int = 2,
    image_um_per_px: float = 2.0,
    seed: int | np.random.Generator = 0,
) -> Path:
    """Write the output of Space Ranger, with spots of 55 um, 100 um apart; return the folder.

    `filtered_feature_bc_matrix.h5` (spots on tissue), `spatial/` with positions of all spots,
    `scalefactors_json.json`, `tissue_hires_image.png` and `tissue_lowres_image.png`, and `he_fullres.tif`. A
    spot's counts are exactly the good transcripts within 27.5 um of its written centre, as in
    `tissue.counts_in_discs`; a real slide captures only a part of them.

    Parameters
    ----------
    tissue : Tissue
    folder : path
        New or empty. Read it with `spatialdata_io.visium(folder, dataset_id=...)`.
    version : int
        1: `tissue_positions_list.csv` without a header; 2: `tissue_positions.csv` with one.
    image_um_per_px : float
        Pixel size of the full-resolution image. Positions are in its pixels, rounded.
    seed : int or numpy.random.Generator
        Seed of the barcodes.

    Raises
    ------
    FileExistsError
        If the folder is not empty.
    ValueError
        If the version is not 1 or 2, or the pixel size not positive.
    """
    if version not in (1, 2):
        raise ValueError(f"Space Ranger layouts are 1 or 2, not {version}")
    image = render_he(tissue, image_um_per_px)
    folder = empty_folder(folder)
    spatial = folder / "spatial"
    spatial.mkdir()
    row, column = _lattice(tissue.width_um, tissue.height_um)
    x_um, y_um = SPOT_UM / 2 + column * PITCH_UM / 2, SPOT_UM / 2 + row * PITCH_UM * np.sqrt(0.75)
    x_px, y_px = np.rint(x_um / image_um_per_px).astype(int), np.rint(y_um / image_um_per_px).astype(int)
    centres_um = np.column_stack([x_px, y_px]) * image_um_per_px
    on_tissue = tissue.is_tissue(*centres_um.T)
    barcodes = _barcodes(len(row), np.random.default_rng(seed))

    counts = tissue.counts_in_discs(centres_um[on_tissue], SPOT_UM / 2)
    attributes: dict[str, object] = {
        "chemistry_description": "Visium V1 Slide - v1 Chemistry",
        "filetype": "matrix",
        "library_ids": np.array([b"simulated"]),
        "software_version": f"spaceranger-{version}.0.0",
    }
    kept = [b.encode() for b, on in zip(barcodes, on_tissue, strict=True) if on]
    write_matrix_h5(folder / "filtered_feature_bc_matrix.h5", counts, kept, tissue.genes, attributes)
    _write_positions(spatial, version, (barcodes, on_tissue.astype(int), row, column, y_px, x_px))
    write_small_images(spatial, image, image_um_per_px)
    write_rgb_tiff(folder / "he_fullres.tif", image, image_um_per_px, ome=False)
    return folder


def _write_positions(spatial: Path, version: int, places: tuple) -> None:
    name = "tissue_positions.csv" if version == 2 else "tissue_positions_list.csv"
    with open(spatial / name, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if version == 2:
            writer.writerow(_COLUMNS)
        writer.writerows(zip(*places, strict=True))


def write_small_images(
    spatial: Path, image: np.ndarray, image_um_per_px: float, spot_um: float = SPOT_UM, **more: float
) -> None:
    """Write the hires and lowres images, and `scalefactors_json.json` with ``more`` entries."""
    from PIL import Image

    scale = {
        "spot_diameter_fullres": spot_um / image_um_per_px,
        "fiducial_diameter_fullres": 144 / image_um_per_px,
        **more,
    }
    for size, limit in (("hires", _HIRES_PX), ("lowres", _LOWRES_PX)):
        factor = min(1.0, limit / max(image.shape[:2]))
        small = Image.fromarray(image).resize(
            [max(1, round(side * factor)) for side in image.shape[1::-1]], Image.Resampling.BOX
        )
        small.save(spatial / f"tissue_{size}_image.png")
        scale[f"tissue_{size}_scalef"] = factor
    (spatial / "scalefactors_json.json").write_text(json.dumps(scale))


def _lattice(width_um: float, height_um: float) -> tuple[np.ndarray, np.ndarray]:
    """Array rows and columns of the spots that lie wholly inside; columns count half pitches."""
    rows = int((height_um - SPOT_UM) / (PITCH_UM * np.sqrt(0.75))) + 1
    columns = int((width_um - SPOT_UM) / (PITCH_UM / 2)) + 1
    row, column = np.indices((rows, columns)).reshape(2, -1)
    set_on = (row + column) % 2 == 0
    return row[set_on], column[set_on]


def _barcodes(count: int, rng: np.random.Generator) -> list[str]:
    """Unique random barcodes such as `AACTAGCCTTGCAATA-1`."""
    number = np.unique(rng.integers(0, 4**16, 2 * count + 16))
    number = rng.permutation(number)[:count]
    letters = np.array(list("ACGT"))[(number[:, None] >> np.arange(0, 32, 2)) & 3]
    return ["".join(word) + "-1" for word in letters]
