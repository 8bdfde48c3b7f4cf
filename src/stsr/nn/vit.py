"""A plain vision transformer, with parameters named as in timm, for the weights of pathology foundation models."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from stsr.errors import StsrError, UsageError

_NORM_EPS = 1e-6
_IGNORED = ("head.", "head_dist.", "mask_token")  # classifiers and training aids, unused for features


@dataclass(frozen=True)
class VitConfig:
    """Sizes of a vision transformer.

    Parameters
    ----------
    patch_px, image_px
        Sides of a patch and of the image of the position embedding, px.
    width, depth, heads
        Channels, blocks and attention heads.
    mlp
        ``"gelu"``, or ``"swiglu"`` (SiLU of the first half of the hidden channels times the second half).
    hidden
        Channels of the first linear layer of the MLP.
    registers
        Register tokens between the class token and the patches.
    placed
        Tokens before the patches that the position embedding covers: 0, 1 or all.
    layer_scale
        Whether the residual branches are scaled per channel.
    """

    patch_px: int
    image_px: int
    width: int
    depth: int
    heads: int
    mlp: str
    hidden: int
    registers: int
    placed: int
    layer_scale: bool

    def __post_init__(self) -> None:
        if self.heads < 1 or self.width % self.heads:
            raise UsageError(f"{self.heads} heads do not divide a width of {self.width}; correct 'heads'")


class VisionTransformer(nn.Module):
    """Images (b, 3, y, x) to normalised tokens (b, 1 + registers + patches, width).

    Sides are multiples of the patch. The position embedding is resampled for other sizes than ``image_px``, as timm
    does: bicubic with antialiasing.
    """

    def __init__(self, config: VitConfig):
        super().__init__()
        self.config = config
        width, side = config.width, config.image_px // config.patch_px
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        if config.registers:
            self.reg_token = nn.Parameter(torch.zeros(1, config.registers, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.placed + side**2, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, config.patch_px, config.patch_px)})
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, _NORM_EPS)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Compute the tokens after the last norm."""
        patches = self.patch_embed["proj"](image)  # (b, width, h, w)
        shape = patches.shape[-2:]
        prefix = [self.cls_token] + ([self.reg_token] if self.config.registers else [])
        tokens = torch.cat([token.expand(len(image), -1, -1) for token in prefix], 1)
        position, placed = self._position(shape[0], shape[1]), self.config.placed
        tokens = torch.cat([tokens[:, :placed] + position[:, :placed], tokens[:, placed:]], 1)
        x = torch.cat([tokens, patches.flatten(2).transpose(1, 2) + position[:, placed:]], 1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def _position(self, height: int, width: int) -> torch.Tensor:
        """Position embedding (1, placed + height * width, width) of a raster of patches."""
        side, placed = self.config.image_px // self.config.patch_px, self.config.placed
        if (height, width) == (side, side):
            return self.pos_embed
        grid = self.pos_embed[:, placed:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, (height, width), mode="bicubic", antialias=True)
        return torch.cat([self.pos_embed[:, :placed], grid.flatten(2).transpose(1, 2)], 1)


class Block(nn.Module):
    """Attention and MLP, each normalised before and added to its input."""

    def __init__(self, config: VitConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, _NORM_EPS)
        self.attn = Attention(config)
        self.ls1 = LayerScale(config.width) if config.layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(config.width, _NORM_EPS)
        self.mlp = Mlp(config)
        self.ls2 = LayerScale(config.width) if config.layer_scale else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Transform tokens (b, n, width)."""
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class Attention(nn.Module):
    """Multi-head self-attention with one matrix for queries, keys and values."""

    def __init__(self, config: VitConfig):
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Transform tokens (b, n, width)."""
        b, n, width = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (b, heads, n, width / heads)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, width))


class Mlp(nn.Module):
    """Two linear layers around GELU, or around the gate of SwiGLU."""

    def __init__(self, config: VitConfig):
        super().__init__()
        self.gated = config.mlp == "swiglu"
        self.fc1 = nn.Linear(config.width, config.hidden)
        self.fc2 = nn.Linear(config.hidden // 2 if self.gated else config.hidden, config.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Transform tokens (b, n, width)."""
        x = self.fc1(x)
        if not self.gated:
            return self.fc2(F.gelu(x))
        gate, value = x.chunk(2, -1)
        return self.fc2(F.silu(gate) * value)


class LayerScale(nn.Module):
    """A learned factor for each channel."""

    def __init__(self, width: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scale tokens (b, n, width)."""
        return x * self.gamma


def vit_of(tensors: Mapping[str, torch.Tensor], settings: Mapping[str, Any], name: str) -> VisionTransformer:
    """Build a transformer from tensors under timm's names.

    All sizes but the number of heads follow from the tensors; those that the settings name are checked.

    Parameters
    ----------
    tensors
        The weights.
    settings
        ``heads``, and any of ``patch_px``, ``image_px``, ``width``, ``depth``, ``mlp``, ``mlp_ratio``,
        ``registers``, ``layer_scale``.
    name
        Of the file, for messages.

    Raises
    ------
    StsrError
        If tensors are missing, superfluous or of the wrong shape; names the first of them.
    UsageError
        If a setting contradicts the tensors.
    """
    weights = {key: value for key, value in tensors.items() if not key.startswith(_IGNORED)}
    config = _sizes(weights, settings, name)
    found = asdict(config) | {"mlp_ratio": config.hidden / config.width}
    for key in ("patch_px", "image_px", "width", "depth", "mlp", "mlp_ratio", "registers", "layer_scale"):
        same = key not in settings or settings[key] == found[key]
        if key == "mlp_ratio" and not same:  # timm truncates width x ratio
            same = int(config.width * float(settings[key])) == config.hidden
        if not same:
            raise UsageError(
                f"the config of {name} has {key} = {settings[key]!r}, but its tensors have {found[key]!r}; "
                f"correct the config"
            )
    with torch.device("meta"):
        model = VisionTransformer(config)
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    wrong = [key for key, shape in wanted.items() if key not in weights or tuple(weights[key].shape) != shape]
    wrong += [key for key in weights if key not in wanted]
    if wrong:
        raise StsrError(
            f"{name} does not fit a plain vision transformer with timm's parameter names; "
            f"{len(wrong)} tensors are missing, superfluous or of another shape: {', '.join(wrong[:4])}"
        )
    model.load_state_dict({key: value.float() for key, value in weights.items()}, assign=True)
    return model.eval().requires_grad_(False)


def _sizes(weights: Mapping[str, torch.Tensor], settings: Mapping[str, Any], name: str) -> VitConfig:
    """Read the sizes off the tensors."""
    mlp = "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight"
    needed = ("cls_token", "pos_embed", "patch_embed.proj.weight", *mlp)
    missing = [key for key in needed if key not in weights]
    if missing:
        raise StsrError(
            f"{name} is not a plain vision transformer with timm's parameter names: it has no "
            f"{', '.join(missing)}; export the encoder as TorchScript instead"
        )
    width, patch = weights["patch_embed.proj.weight"].shape[0], weights["patch_embed.proj.weight"].shape[-1]
    registers = weights["reg_token"].shape[1] if "reg_token" in weights else 0
    positions = weights["pos_embed"].shape[1]
    side = math.isqrt(positions)
    while side > 1 and positions - side**2 not in (0, 1, 1 + registers):
        side -= 1
    hidden, gated = weights[mlp[0]].shape[0], weights[mlp[1]].shape[1] != weights[mlp[0]].shape[0]
    blocks = {int(key.split(".")[1]) for key in weights if key.startswith("blocks.")}
    if not isinstance(settings.get("heads"), int):
        raise UsageError(f'the config of {name} must give the number of attention heads: {{"heads": 16}}')
    return VitConfig(
        patch_px=patch,
        image_px=side * patch,
        width=width,
        depth=len(blocks),
        heads=settings["heads"],
        mlp="swiglu" if gated else "gelu",
        hidden=hidden,
        registers=registers,
        placed=positions - side**2,
        layer_scale="blocks.0.ls1.gamma" in weights,
    )
