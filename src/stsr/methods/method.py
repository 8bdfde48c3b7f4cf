"""`Method`: the interface that regression and diffusion methods share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from stsr.diffusion.noise import TileNoise
from stsr.errors import UsageError, did_you_mean
from stsr.geometry.grid import raster_um
from stsr.methods.batch import PLAIN_DENSITY, Batch, Requirements
from stsr.nn.image import ImageEncoder
from stsr.spread.dispersion import Dispersion

Module = TypeVar("Module", bound=nn.Module)
IMAGE_MEAN, IMAGE_SPREAD = 0.7, 0.25
"""Approximate mean and standard deviation of H&E pixels in 0..1; fixed, so that tiles are not rescaled one by one."""


@dataclass(frozen=True)
class BinConfig:
    """What a method without parameters needs.

    Parameters
    ----------
    bin_um
        Size of bins, um.
    """

    bin_um: float = 10.0

    def requirements(self, panel: tuple[str, ...]) -> Requirements:
        """Tiles of these bins; the image is not used."""
        return Requirements(panel, bin_um=self.bin_um, image_um=self.bin_um, lr_um=raster_um(self.bin_um))


@dataclass(frozen=True)
class TileConfig(BinConfig):
    """What a method that learns reads of a tile, in addition to `BinConfig`.

    Parameters
    ----------
    image_um
        Size of image pixels, um.
    image_channels
        Channels into which the image encoder turns the pixels of a bin; without effect if pixels are as large as bins.
    features, features_um
        Channels and pixel size, um, of patch features from another encoder; 0 channels for none.
    tile_lr, overlap_lr
        Side of a prediction tile and minimum overlap, low-resolution pixels. The size should be close to that of the
        training tiles, because group norm statistics depend on it: tiles of 24 cost 0.01 of PCC at 40 um.

    Raises
    ------
    ValueError
        If a value is out of range.
    """

    image_um: float = 10.0
    image_channels: int = 48
    features: int = 0
    features_um: float = 20.0
    tile_lr: int = 8
    overlap_lr: int = 3

    def __post_init__(self) -> None:
        check_positive(self, "bin_um", "image_um", "image_channels", "features_um")
        check_not_negative(self, "features")
        if not 0 <= self.overlap_lr < self.tile_lr:
            raise ValueError(
                f"tiles of {self.tile_lr} low-resolution pixels cannot overlap by {self.overlap_lr}"
            )
        lr_um = raster_um(self.bin_um)
        for name in ("image_um", "features_um") if self.features else ("image_um",):
            pixels = lr_um / getattr(self, name)
            if abs(pixels - round(pixels)) > 1e-6:
                raise ValueError(f"{lr_um:g} um must be a whole number of {name}, not {pixels:.4g} of them")
        self.image_encoder()  # checks how pixels fit bins

    def image_encoder(self) -> ImageEncoder:
        """The encoder of this config, with new weights."""
        return ImageEncoder(self.bin_um / self.image_um, self.image_channels, self.features)

    def requirements(self, panel: tuple[str, ...]) -> Requirements:
        """The tiles of this config."""
        return Requirements(
            panel,
            bin_um=self.bin_um,
            image_um=self.image_um,
            tile_lr=self.tile_lr,
            overlap_lr=self.overlap_lr,
            lr_um=raster_um(self.bin_um),
            features=self.features,
            features_um=self.features_um,
        )


class Method(nn.Module, ABC):
    """Predict high-resolution counts.

    A subclass names its frozen dataclass of settings as ``Config`` and is built from ``(config, panel, reference)``.

    Parameters
    ----------
    config
        The method's settings; the defaults if None.
    panel
        Ordered gene names.
    reference
        (p,) mean counts per low-resolution pixel in the training sections: the scale of a gene where no spots were
        measured. Kept as a buffer, so the checkpoint stores it.
    """

    Config: ClassVar[type]
    learns: ClassVar[bool] = True
    """False for baselines without parameters, which need no training and no checkpoint."""
    samples: ClassVar[bool] = False
    """True if predictions depend on noise."""
    needs_kriging: ClassVar[bool] = False
    """True if batches must have kriged spots as their base."""
    learns_from_spots: ClassVar[bool] = False
    """True if the loss takes batches with the counts of spots instead of counts per bin."""
    added_buffers: ClassVar[tuple[str, ...]] = ()
    """Buffers that weights of earlier versions lack; they keep their initial values."""
    encoder: ImageEncoder
    """Set by methods that learn."""
    reference: torch.Tensor

    def __init__(self, config: Any = None, panel: tuple[str, ...] = (), reference: np.ndarray | None = None):
        super().__init__()
        self.config = config or self.Config()
        self.panel = tuple(panel)
        values = np.ones(len(panel)) if reference is None else np.asarray(reference)
        self.register_buffer(
            "reference", torch.as_tensor(values, dtype=torch.float32).clamp_min(PLAIN_DENSITY)
        )

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load weights; those of earlier versions may lack `added_buffers`."""
        initial = {key: value for key, value in self.state_dict().items() if key in self.added_buffers}
        return super().load_state_dict(initial | dict(state_dict), strict, assign)

    @property
    def knows_mean(self) -> bool:
        """Whether `mean` gives the expected counts without sampling."""
        return False

    @property
    def requirements(self) -> Requirements:
        """The tiles that the method needs."""
        return self.config.requirements(self.panel)

    def encode(self, batch: Batch) -> torch.Tensor:
        """Encode the image, and patch features if there are any, as maps (b, c, H, W) on the bins."""
        picture = (batch.image.to(self.reference.dtype) / 255 - IMAGE_MEAN) / IMAGE_SPREAD
        return self.encoder(picture.contiguous(memory_format=torch.channels_last), batch.features)

    def completed(self, batch: Batch) -> Batch:
        """Give genes that the section did not measure their mean everywhere, which says nothing on where they are.

        The mean is the reference times the depth of the section's spots, relative to the reference, over the genes
        that were measured.
        """
        if batch.measured is None or bool(batch.measured.all()):
            return batch
        known = batch.known()
        mixed = (batch.genes @ self.reference)[None]  # (1, g)
        depth = (batch.lr_mean * known).sum(1, keepdim=True) / (mixed * known).sum(1, keepdim=True).clamp_min(
            1e-6
        )
        depth = torch.where((depth > 0) & batch.has_lr[:, None], depth, 1.0)
        mean = torch.where(known > 0, batch.lr_mean, mixed * depth)
        lr = torch.where(known[..., None, None] > 0, batch.lr, mean[..., None, None] * (batch.lr_mask > 0))
        base = batch.base
        if base is not None:
            plain = mean / self.requirements.per_lr**2
            base = torch.where(known[..., None, None] > 0, base, plain[..., None, None])
        return replace(batch, lr=lr, lr_mean=mean, base=base)

    @property
    def dispersion(self) -> Dispersion | None:
        """How far expression may lie from predictions on every scale; None if the method does not know."""
        return None

    def loss(self, batch: Batch, progress: float, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Compute the terms of the loss; ``"loss"`` is their weighted sum.

        Parameters
        ----------
        batch
            Tiles with ``hr``, whose genes are the panel.
        progress
            0 at the start of training, 1 at its end.
        generator
            Source of all random numbers of the loss.
        """
        raise TypeError(f"{type(self).__name__} has no parameters to train")

    def finish(self, batches: Iterable[Batch]) -> None:
        """Calibrate once on validation tiles, after training and with the weights that are kept."""

    def condition(self, batch: Batch) -> Any:
        """Compute features that depend neither on the gene nor on noise; ``batch.genes`` is the panel.

        Called once per tile. The result is passed to `draw`, `predict` and `mean`.
        """
        return None

    def draw(self, batch: Batch, features: Any, noise: TileNoise) -> Any:
        """Draw what all genes of a sample share. Called once per tile and sample."""
        return None

    @abstractmethod
    def predict(
        self, batch: Batch, noise: TileNoise | None, features: Any = None, drawn: Any = None
    ) -> torch.Tensor:
        """Predict counts per bin (b, g, H, W) of the genes of ``batch``, inside or outside the panel.

        Parameters
        ----------
        noise
            Determined by (seed, gene, sample, position), independent of the tiling; not needed if ``drawn`` is given.
        features, drawn
            Results of `condition` and `draw` for these tiles; computed if not given.
        """

    def mean(self, batch: Batch, features: Any) -> torch.Tensor:
        """Expected counts (b, g, H, W) without sampling; only if `knows_mean`."""
        raise TypeError(f"{type(self).__name__} gives a mean only as the average of samples")

    def vary(self, batch: Batch, mean: torch.Tensor, drawn: Any) -> torch.Tensor:
        """Turn the mean and the result of `draw` into one sample (b, g, H, W); only if `knows_mean`."""
        raise TypeError(f"{type(self).__name__} gives a mean only as the average of samples")

    def scale(self, batch: Batch) -> torch.Tensor:
        """Mean counts per low-resolution pixel (b, g): the section's own, or the reference for tiles without spots."""
        mixed = batch.genes @ self.reference  # (g,)
        return torch.where(batch.has_lr[:, None], batch.lr_mean, mixed).clamp_min(PLAIN_DENSITY)


def channels_last(module: Module) -> Module:
    """Store 4-d weights with channels last, which makes convolutions faster on CPUs and GPUs."""
    return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs


def random_normal(
    shape: Sequence[int], generator: torch.Generator, device: torch.device | str
) -> torch.Tensor:
    """Standard normal numbers, drawn on the generator's device and then moved."""
    return torch.randn(shape, generator=generator, device=generator.device).to(device)


def interpolated(batch: Batch, scale: torch.Tensor, per_lr: int, mode: str = "bilinear") -> torch.Tensor:
    """Expected counts per bin (b, g, H, W) from the spots alone: the batch's base, else interpolated spots.

    Pixels without a spot take the mean of their neighbours, or the gene's ``scale`` (b, g) where none is near.
    """
    if batch.base is not None and bool(batch.has_lr.all()):
        return batch.base
    filled = fill_unmeasured(batch.lr, batch.lr_mask, scale)
    up = F.interpolate(filled, scale_factor=per_lr, mode=mode, align_corners=False)
    up = up.clamp_min(0) / per_lr**2
    return up if batch.base is None else torch.where(batch.has_lr[:, None, None, None], batch.base, up)


def fill_unmeasured(lr: torch.Tensor, mask: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Fill gaps of a low-resolution raster (b, g, h, w) from neighbouring pixels, then from the scale (b, g)."""
    if bool((mask > 0).all()):
        return lr
    weight = (mask > 0).to(lr.dtype)
    filled, known = lr * weight, weight
    for _ in range(2):  # two pixels, 200 um: spots farther away carry little information
        total = F.avg_pool2d(filled * known, 3, 1, 1)
        count = F.avg_pool2d(known, 3, 1, 1)
        filled = torch.where(known > 0, filled, total / count.clamp_min(1e-6))
        known = torch.maximum(known, (count > 0).to(lr.dtype))
    return torch.where(known > 0, filled, scale[:, :, None, None])


def configured(config_class: type, settings: dict[str, Any]) -> Any:
    """Build a config from a mapping; the class checks the values.

    Raises
    ------
    UsageError
        For an unknown key, naming the nearest known one, or an invalid value.
    """
    known = {field.name: field for field in fields(config_class)}
    for key in settings:
        if key not in known:
            hint = did_you_mean(key, known, f"known are: {', '.join(known)}.")
            raise UsageError(f"{key!r} is not a setting of this method; {hint}")
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    try:
        return config_class(**values)
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error


def check_positive(config: Any, *names: str) -> None:
    """Raise ValueError unless these fields are above 0; NaN is not."""
    for name in names:
        if not getattr(config, name) > 0:
            raise ValueError(f"{name} must be positive, not {getattr(config, name)}")


def check_not_negative(config: Any, *names: str) -> None:
    """Raise ValueError unless these fields are at least 0; NaN is not."""
    for name in names:
        if not getattr(config, name) >= 0:
            raise ValueError(f"{name} cannot be negative, but is {getattr(config, name)}")


def check_probability(config: Any, *names: str) -> None:
    """Raise ValueError unless these fields are probabilities below 1."""
    for name in names:
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{name} is a probability below 1, not {getattr(config, name)}")


def config_dict(config: Any) -> dict[str, Any]:
    """A config as plain values for checkpoints and logs."""
    return asdict(config)
