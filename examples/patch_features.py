"""Compute patch features of a section's H&E with any torch encoder, as an array for ``stsr train --features``.

    python examples/patch_features.py sample.zarr encoder.pt --output sample.npy
    python examples/patch_features.py sample.zarr uni_encoder:load --um-per-px 0.5 --stride-um 20

The encoder is a TorchScript file, or ``module:function`` where the function returns a callable that takes images
(b, 3, px, px), normalised as ImageNet, and returns vectors (b, channels); of tokens (b, tokens, channels) the first is
taken, and maps (b, channels, y, x) are averaged. Windows of ``--image-px`` lie ``--stride-um``
apart; each gives one vector for its centre. The array (y, x, channels) is written row by row, with its place beside it.
"""

import argparse
import json
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import numpy as np
import torch

import stsr
from stsr.geometry.grid import Grid
from stsr.histology.image import Image, scaling

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GLASS = 8.0  # standard deviation of grey values below which a window is empty


def write_features(
    image: Image,
    encode: Callable[[torch.Tensor], torch.Tensor],
    output: Path,
    *,
    um_per_px: float = 0.5,
    image_px: int = 224,
    stride_um: float = 20.0,
    mean: tuple = IMAGENET[0],
    std: tuple = IMAGENET[1],
    batch: int = 32,
    device: str = "cpu",
) -> tuple[int, int, int]:
    """Write the array and its place; returns its shape."""
    upright = image.moved(scaling(image.um_per_px))  # along the axes of its own pixels, from its corner
    rows, columns = (max(1, int(side * image.um_per_px // stride_um)) for side in (image.height, image.width))
    half = um_per_px * image_px / 2
    shift, scale = (torch.tensor(values, device=device)[:, None, None] for values in (mean, std))

    def vectors(windows: list[np.ndarray]) -> np.ndarray:
        pixels = torch.from_numpy(np.stack(windows)).to(device).float() / 255
        with torch.inference_mode():
            found = encode((pixels - shift) / scale).float()
        if found.ndim == 3:
            found = found[:, 0]  # the class token
        elif found.ndim == 4:
            found = found.mean((2, 3))
        return found.cpu().numpy()  # (b, channels)

    channels = vectors([np.full((3, image_px, image_px), 255, np.uint8)]).shape[1]
    shape = rows, columns, channels
    array = np.lib.format.open_memmap(output, mode="w+", dtype=np.float16, shape=shape)
    for row in range(rows):
        y = (row + 0.5) * stride_um - half
        strip = Grid(-half, y, um_per_px, image_px, round((columns * stride_um + 2 * half) / um_per_px))
        pixels = upright.read(strip)  # (3, image_px, all columns)
        starts = [round((column + 0.5) * stride_um / um_per_px) for column in range(columns)]
        windows = {at: pixels[:, :, start : start + image_px] for at, start in enumerate(starts)}
        chosen = [at for at, window in windows.items() if window.mean(0).std() > GLASS]
        for first in range(0, len(chosen), batch):
            part = chosen[first : first + batch]
            array[row, part] = vectors([windows[at] for at in part])
        print(f"\r{row + 1} of {rows} rows", end="", file=sys.stderr)
    array.flush()
    stride_px = stride_um / image.um_per_px
    output.with_suffix(".json").write_text(json.dumps({"stride_px": stride_px, "offset_px": stride_px / 2}))
    return shape


def load(name: str, device: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """A TorchScript file, or what ``module:function`` returns."""
    if Path(name).is_file():
        return torch.jit.load(name, map_location=device).eval()
    module, _, function = name.partition(":")
    return getattr(import_module(module), function)()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("store")
    parser.add_argument("encoder")
    parser.add_argument("--output", type=Path, help="default: <section>.npy")
    parser.add_argument("--um-per-px", type=float, default=0.5)
    parser.add_argument("--image-px", type=int, default=224)
    parser.add_argument("--stride-um", type=float, default=20.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = vars(parser.parse_args())
    section = stsr.open_section(options.pop("store"))
    encode = load(options.pop("encoder"), options["device"])
    output = options.pop("output") or Path(f"{section.name}.npy")
    shape = write_features(section.image, encode, output, **options)
    print(f"\n{output}: {shape[0]} x {shape[1]} patches, {shape[2]} channels", file=sys.stderr)


if __name__ == "__main__":
    main()
