"""Encoders of image patches from files: TorchScript, or the weights of a vision transformer. Nothing is unpickled."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stsr.errors import StsrError, UsageError, did_you_mean
from stsr.nn.vit import vit_of

TORCHSCRIPT = (".pt", ".ts")
WEIGHTS = (".safetensors",)
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet
_OWN = ("um_per_px", "image_px", "patch_px", "mean", "std", "tokens", "stride_um")
_VIT = ("architecture", "width", "depth", "heads", "mlp", "mlp_ratio", "registers", "layer_scale")
_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16, 1536: 24}
"""Heads of timm's models by width; a config.json by timm names the model and not its heads."""


@dataclass(frozen=True)
class EncoderSettings:
    """How an encoder reads an image.

    Parameters
    ----------
    um_per_px
        Pixels that it was trained on, um.
    image_px
        Side of its windows, px.
    mean, std
        Of the colours in 0..1, by which it was normalised.
    tokens
        ``"patch"`` for one vector per patch, ``"class"`` for one per window.
    stride_um
        Distance of windows that give one vector each; the side of a window if None.
    """

    um_per_px: float = 0.5
    image_px: int = 224
    mean: tuple[float, ...] = _MEAN
    std: tuple[float, ...] = _STD
    tokens: str = "patch"
    stride_um: float | None = None

    def __post_init__(self) -> None:
        numbers = [
            self.um_per_px,
            self.image_px,
            *self.std,
            1.0 if self.stride_um is None else self.stride_um,
        ]
        if not all(isinstance(value, (int, float)) and value > 0 for value in numbers):
            raise UsageError("um_per_px, image_px, std and stride_um of an encoder must be positive numbers")
        if len(self.mean) != 3 or len(self.std) != 3 or self.image_px != int(self.image_px):
            raise UsageError("an encoder needs three numbers for mean and std, and whole pixels for image_px")
        if self.tokens not in ("patch", "class"):
            raise UsageError(f"tokens of an encoder must be patch or class, not {self.tokens!r}")

    @property
    def side_um(self) -> float:
        """Side of a window, um."""
        return self.um_per_px * self.image_px


@dataclass(frozen=True)
class FrozenEncoder:
    """An encoder on a device."""

    name: str
    """File name, for messages."""
    settings: EncoderSettings
    device: torch.device
    network: Callable[[torch.Tensor], Any] = field(repr=False)
    per_side: int | None = None
    """Patches along a window, where an output (b, tokens, c) alone does not determine them."""

    def encode(self, rgb: np.ndarray) -> np.ndarray:
        """Encode windows (b, 3, image_px, image_px) uint8 to tokens (b, n, n, c) float32; n is 1 for one per window.

        Raises
        ------
        StsrError
            If the encoder fails, or its output is no finite tensor of a known shape.
        """
        image = torch.from_numpy(np.ascontiguousarray(rgb)).to(self.device).float() / 255
        mean, std = (
            torch.tensor(values, device=self.device)[:, None, None]
            for values in (self.settings.mean, self.settings.std)
        )
        half = torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")
        try:
            with torch.inference_mode(), half:
                output = self.network((image - mean) / std)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1][:150]
            raise StsrError(
                f"{self.name} cannot encode images of {self.settings.image_px} px ({reason}); "
                f"give its image_px in {Path(self.name).stem}.json beside it"
            ) from error
        tokens = self._tokens(output).float().cpu().numpy()
        if not np.isfinite(tokens).all():
            raise StsrError(f"{self.name} produced NaN or infinite values; check its mean and std")
        return tokens

    def _tokens(self, output: Any) -> torch.Tensor:
        """Tokens (b, n, n, c) of an output (b, c), (b, c, n, n) or (b, tokens, c)."""
        if isinstance(output, torch.Tensor):
            if output.ndim == 2:
                return output[:, None, None]  # (b, 1, 1, c)
            if output.ndim == 4 and output.shape[-1] == output.shape[-2]:
                return output.permute(0, 2, 3, 1)
            if output.ndim == 3 and self.settings.tokens == "class":
                return output[:, :1, None]
            if output.ndim == 3:
                n = self.per_side or math.isqrt(output.shape[1])  # class and register tokens come first
                if n**2 <= output.shape[1]:
                    return output[:, -(n**2) :].reshape(len(output), n, n, -1)
        shown = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        raise StsrError(
            f"{self.name} returns {shown}, not one tensor (b, c), (b, c, n, n) or (b, tokens, c); "
            f"export it with such an output"
        )


def config_file(path: Path) -> Path | None:
    """The JSON file with an encoder's settings: the same stem, or config.json beside weights; None if absent."""
    candidates = [path.with_suffix(".json")]
    if path.suffix in WEIGHTS:
        candidates.append(path.parent / "config.json")
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def load_encoder(path: Path, device: torch.device) -> FrozenEncoder:
    """Load an encoder.

    Parameters
    ----------
    path
        TorchScript (``.pt``, ``.ts``), with its settings in a JSON file of the same stem if they are not the defaults;
        or ``.safetensors`` with such a file or ``config.json`` beside it, which may be that of timm.
    device
        Where it runs.

    Raises
    ------
    StsrError
        If the file is missing, damaged, or not an encoder.
    UsageError
        If its settings are unknown or contradict the tensors.
    """
    if not path.is_file():
        raise StsrError(f"there is no encoder at {path}; check --features")
    found = config_file(path)
    if path.suffix in TORCHSCRIPT:
        given = _read_settings(found) if found else {}
        settings = _settings(given, image_px=224)
        per_side = int(settings.image_px) // int(given["patch_px"]) if "patch_px" in given else None
        return FrozenEncoder(path.name, settings, device, _torchscript(path, device), per_side)
    if found is None:
        raise UsageError(
            f'{path} needs a config beside it: {path.stem}.json with at least {{"architecture": "vit", "heads": 16}}'
        )
    tensors = _tensors(path)
    given = _read_settings(found, tensors)
    model = vit_of(tensors, given, path.name).to(device)
    settings = _settings(given, image_px=model.config.image_px)
    first = 1 + model.config.registers

    def network(image: torch.Tensor) -> torch.Tensor:
        tokens = model(image)
        return tokens[:, 0] if settings.tokens == "class" else tokens[:, first:]

    return FrozenEncoder(path.name, settings, device, network)


def _settings(given: Mapping[str, Any], image_px: int) -> EncoderSettings:
    known = {key: given[key] for key in ("um_per_px", "image_px", "tokens", "stride_um") if key in given}
    colours = {key: tuple(given[key]) for key in ("mean", "std") if key in given}
    return EncoderSettings(**{"image_px": image_px, **known, **colours})


def _read_settings(path: Path, tensors: Mapping[str, torch.Tensor] | None = None) -> dict[str, Any]:
    """Settings of a JSON file, of TorchScript or beside tensors; those of timm's config.json are translated."""
    try:
        read = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is not a JSON file ({error}); correct it") from None
    if not isinstance(read, dict):
        raise UsageError(f'{path} must contain settings such as {{"um_per_px": 0.5}}')
    if tensors is not None and ("pretrained_cfg" in read or "model_args" in read):
        return _of_timm(read, tensors)
    known = _OWN if tensors is None else (*_OWN, *_VIT)
    for key in read:
        if key not in known:
            hint = did_you_mean(key, known, f"known are: {', '.join(known)}.")
            raise UsageError(f"{key!r} in {path.name} is not a setting of an encoder; {hint}")
    if tensors is not None and read.get("architecture", "vit") != "vit":
        raise UsageError(
            f"{path.name} has the architecture {read['architecture']!r}; only vit can be read from weights, "
            f"export others as TorchScript"
        )
    return read


def _of_timm(read: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Settings in a config.json by timm, as Hugging Face distributes it with the weights."""
    arguments = read.get("model_args") or {}
    trained = read.get("pretrained_cfg") or {}
    width = tensors["cls_token"].shape[-1] if "cls_token" in tensors else 0
    heads = arguments.get("num_heads") or _HEADS.get(width)
    found = {"heads": heads, "mean": trained.get("mean"), "std": trained.get("std")}
    return {key: value for key, value in found.items() if value is not None}


def _torchscript(path: Path, device: torch.device) -> Callable[[torch.Tensor], Any]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", DeprecationWarning
            )  # torch recommends export, which few encoders use
            return torch.jit.load(str(path), map_location=device).eval()
    except (RuntimeError, ValueError, OSError) as error:
        raise StsrError(
            f"{path} is not a TorchScript file; save the encoder with torch.jit.save, not torch.save"
        ) from error


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise StsrError(
            f"{path} is not a complete safetensors file; copy it again from its source"
        ) from error
