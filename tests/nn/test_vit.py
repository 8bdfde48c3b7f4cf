"""The vision transformer against torch's own layers, and encoders from files."""

import json
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from stsr.errors import StsrError, UsageError
from stsr.nn.frozen import load_encoder
from stsr.nn.vit import Block, VisionTransformer, VitConfig, vit_of

CPU = torch.device("cpu")


def sizes(**changes):
    known = dict(patch_px=8, image_px=32, width=24, depth=2, heads=3, mlp="gelu", hidden=48)
    return VitConfig(**{**known, "registers": 0, "placed": 1, "layer_scale": False, **changes})


def random_vit(**changes):
    torch.manual_seed(0)
    model = VisionTransformer(sizes(**changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return model


@pytest.fixture
def tokens():
    return torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_a_block_equals_torchs_encoder_layer(tokens):
    block = random_vit().blocks[0]
    theirs = nn.TransformerEncoderLayer(
        24, 3, 48, 0.0, "gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True
    ).eval()
    names = {"self_attn.in_proj_": "attn.qkv.", "self_attn.out_proj.": "attn.proj."}
    names |= {"linear1": "mlp.fc1", "linear2": "mlp.fc2"}
    own = block.state_dict()
    copied = {}
    for key in theirs.state_dict():
        renamed = key
        for old, new in names.items():
            renamed = renamed.replace(old, new)
        copied[key] = own[renamed]
    theirs.load_state_dict(copied)
    assert torch.allclose(block(tokens), theirs(tokens), atol=1e-5)


@torch.no_grad()
def test_swiglu_and_layer_scale_follow_their_equations(tokens):
    block: Block = random_vit(mlp="swiglu", layer_scale=True).blocks[0]
    mlp = block.mlp
    gate, value = F.linear(tokens, mlp.fc1.weight, mlp.fc1.bias).split(24, -1)
    wanted = F.linear(gate * torch.sigmoid(gate) * value, mlp.fc2.weight, mlp.fc2.bias)
    assert torch.allclose(mlp(tokens), wanted, atol=1e-5)
    middle = tokens + block.ls1.gamma * block.attn(block.norm1(tokens))
    assert torch.allclose(block(tokens), middle + block.ls2.gamma * mlp(block.norm2(middle)), atol=1e-5)


@pytest.mark.parametrize(("registers", "placed"), [(0, 1), (0, 0), (4, 0), (4, 1), (4, 5)])
@torch.no_grad()
def test_tokens_are_class_registers_and_patches(registers, placed):
    model = random_vit(registers=registers, placed=placed, depth=1)
    image = torch.randn(2, 3, 32, 32)
    model.blocks, model.norm = nn.ModuleList(), nn.Identity()  # what is left is the embedding
    found = model(image)
    assert found.shape == (2, 1 + registers + 16, 24)
    position = model.pos_embed[0]
    first = model.cls_token[0, 0] + (position[0] if placed else 0)
    assert torch.allclose(found[:, 0], first.expand(2, -1))
    if registers:
        third = model.reg_token[0, 2] + (position[3] if placed == 5 else 0)
        assert torch.allclose(found[0, 3], third)
    proj = model.patch_embed["proj"]
    patch = F.conv2d(image[:, :, 8:16, 16:24], proj.weight, proj.bias)[..., 0, 0]  # row 1, column 2 of 4 x 4
    assert torch.allclose(found[:, 1 + registers + 6], patch + position[placed + 6], atol=1e-5)


@torch.no_grad()
def test_positions_are_interpolated_for_other_sizes():
    model = random_vit()
    assert model._position(4, 4) is model.pos_embed
    ramp = torch.arange(4.0)[:, None].expand(4, 4).reshape(16, 1).expand(16, 24)
    model.pos_embed[0, 1:] = ramp
    wide = model._position(8, 12)
    assert wide.shape == (1, 1 + 96, 24)
    assert torch.equal(wide[:, 0], model.pos_embed[:, 0])
    rows = wide[0, 1:, 0].reshape(8, 12)
    assert torch.allclose(rows, rows[:, :1].expand(8, 12), atol=1e-5)
    assert torch.allclose(
        rows[3:5, 0], torch.tensor([1.25, 1.75]), atol=1e-4
    )  # centres at 3.5 / 2 - 0.5, ...
    assert model(torch.randn(1, 3, 64, 96)).shape == (1, 97, 24)


@pytest.mark.parametrize(
    "changes",
    [{}, {"mlp": "swiglu", "registers": 4, "placed": 0, "layer_scale": True}, {"registers": 4, "placed": 5}],
)
@torch.no_grad()
def test_a_file_gives_the_same_transformer(tmp_path, changes):
    model = random_vit(**changes)
    weights = {**model.state_dict(), "head.weight": torch.zeros(5, 24)}
    save_file(weights, tmp_path / "vit.safetensors")
    settings = {
        "architecture": "vit",
        "heads": 3,
        "depth": 2,
        "um_per_px": 1.0,
        "mean": [0, 0, 0],
        "std": [1] * 3,
    }
    (tmp_path / "vit.json").write_text(json.dumps(settings))
    encoder = load_encoder(tmp_path / "vit.safetensors", CPU)
    assert encoder.settings.image_px == 32 and encoder.settings.side_um == 32
    rgb = np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32), dtype=np.uint8)
    found = encoder.encode(rgb)
    wanted = model(torch.from_numpy(rgb) / 255)[:, -16:].reshape(2, 4, 4, 24)
    assert np.allclose(found, wanted, atol=1e-5)
    (tmp_path / "vit.json").write_text(json.dumps({**settings, "tokens": "class"}))
    one = load_encoder(tmp_path / "vit.safetensors", CPU).encode(rgb)
    assert one.shape == (2, 1, 1, 24) and not np.allclose(one[:, 0, 0], found[:, 0, 0])


@pytest.mark.parametrize(("width", "arguments"), [(24, {"num_heads": 3}), (192, {})])
def test_settings_by_timm_are_read(tmp_path, width, arguments):
    model = random_vit(width=width)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    theirs = {"architecture": "vit_tiny_patch8_32", "model_args": arguments}
    theirs["pretrained_cfg"] = {"mean": [0.7, 0.6, 0.7], "std": [0.2, 0.2, 0.2], "license": "?"}
    (tmp_path / "config.json").write_text(json.dumps(theirs))
    encoder = load_encoder(tmp_path / "model.safetensors", CPU)
    assert encoder.settings.mean == (0.7, 0.6, 0.7) and encoder.settings.um_per_px == 0.5


@pytest.mark.parametrize(
    ("settings", "changes", "words"),
    [
        ({"heads": 3, "depth": 3}, {}, "depth = 3"),
        ({"heads": 3, "registers": 4}, {}, "registers = 4"),
        ({"heads": 3, "mlp": "swiglu"}, {}, "mlp = 'swiglu'"),
        ({"heads": 3, "mlp_ratio": 4}, {}, "mlp_ratio = 4"),
        ({"heads": 5}, {}, "5 heads"),
        ({}, {}, "attention heads"),
        ({"heads": 3}, {"norm.weight": None}, "norm.weight"),
        ({"heads": 3}, {"blocks.1.attn.q_norm.weight": torch.zeros(8)}, "blocks.1.attn.q_norm.weight"),
        ({"heads": 3}, {"blocks.1.mlp.fc1.weight": torch.zeros(40, 24)}, "blocks.1.mlp.fc1.weight"),
        ({"heads": 3}, {"cls_token": None}, "cls_token"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(settings, changes, words):
    weights = {**random_vit().state_dict(), **changes}
    with pytest.raises(StsrError) as refused:
        vit_of({key: value for key, value in weights.items() if value is not None}, settings, "vit")
    assert words in str(refused.value)


PLAIN = {"image_px": 224, "layer_scale": True}
GATED = {**PLAIN, "mlp": "swiglu", "heads": 24, "width": 1536, "hidden": 8192}
MODELS = {
    "UNI": (303, sizes(**PLAIN, patch_px=16, width=1024, depth=24, heads=16, hidden=4096)),
    "UNI2-h": (681, sizes(**GATED, patch_px=14, depth=24, registers=8, placed=0)),
    "Virchow2": (631, sizes(**{**GATED, "width": 1280, "heads": 16, "hidden": 6832}, patch_px=14, depth=32)),
    "H-optimus-0": (1135, sizes(**GATED, patch_px=14, depth=40, registers=4, placed=0)),
    "GigaPath": (1135, sizes(**GATED, patch_px=16, depth=40)),
}


@pytest.mark.parametrize("name", MODELS)
def test_published_models_have_their_number_of_parameters(name):
    millions, config = MODELS[name]
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in VisionTransformer(config).parameters())
    assert round(count / 1e6) == millions


# ------------------------------------------------------------------------------------------------- TorchScript


class Means(nn.Module):
    """Mean colours of 8 x 8 px, as maps, tokens after two others, or one vector."""

    def __init__(self, shape: str):
        super().__init__()
        self.shape = shape

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = F.avg_pool2d(x, 8)
        tokens = maps.flatten(2).transpose(1, 2)
        if self.shape == "maps":
            return maps
        if self.shape == "tokens":
            return torch.cat([tokens[:, :2] * 0, tokens], 1)
        return tokens.mean(1)


def scripted(path, module, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(module), path)
    path.with_suffix(".json").write_text(
        json.dumps({"image_px": 32, "mean": [0] * 3, "std": [1] * 3, **settings})
    )
    return path


def test_outputs_of_torchscript(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32), dtype=np.uint8)
    wanted = rgb.reshape(2, 3, 4, 8, 4, 8).mean((3, 5)).transpose(0, 2, 3, 1) / 255
    for shape in ("maps", "tokens"):
        found = load_encoder(scripted(tmp_path / f"{shape}.pt", Means(shape)), CPU).encode(rgb)
        assert np.allclose(found, wanted, atol=1e-5), shape
    one = load_encoder(scripted(tmp_path / "one.ts", Means("one")), CPU).encode(rgb)
    assert one.shape == (2, 1, 1, 3) and np.allclose(one[:, 0, 0], wanted.mean((1, 2)), atol=1e-5)
    first = load_encoder(scripted(tmp_path / "class.pt", Means("tokens"), tokens="class"), CPU).encode(rgb)
    assert first.shape == (2, 1, 1, 3) and (first == 0).all()


class Pair(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, x


class Broken(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(x, 8) / 0 * 0


class Choosy(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(-1, 3 * 224 * 224)


@pytest.mark.parametrize(
    ("module", "words"),
    [(Pair(), "returns tuple"), (Broken(), "NaN"), (Choosy(), "cannot encode images of 32 px")],
)
def test_encoders_that_fail_are_named(tmp_path, module, words):
    encoder = load_encoder(scripted(tmp_path / "e.pt", module), CPU)
    with pytest.raises(StsrError, match=words):
        encoder.encode(np.zeros((1, 3, 32, 32), np.uint8))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"um_per_pixel": 0.5}, "did you mean um_per_px"),
        ({"um_per_px": 0}, "must be positive"),
        ({"um_per_px": "fine"}, "must be positive"),
        ({"mean": [0.5]}, "three numbers"),
        ({"tokens": "all"}, "patch or class"),
    ],
)
def test_settings_that_are_wrong(tmp_path, settings, words):
    with pytest.raises(UsageError, match=words):
        load_encoder(scripted(tmp_path / "e.pt", Means("maps"), **settings), CPU)


def test_files_that_are_no_encoders(tmp_path):
    torch.save({"a": torch.zeros(3)}, tmp_path / "pickled.pt")
    with pytest.raises(StsrError, match="not a TorchScript file"):
        load_encoder(tmp_path / "pickled.pt", CPU)
    with pytest.raises(StsrError, match="no encoder"):
        load_encoder(tmp_path / "absent.pt", CPU)
    (tmp_path / "cut.safetensors").write_bytes(b"12345678")
    with pytest.raises(UsageError, match="needs a config"):
        load_encoder(tmp_path / "cut.safetensors", CPU)
    (tmp_path / "cut.json").write_text('{"heads": 3}')
    with pytest.raises(StsrError, match="not a complete safetensors"):
        load_encoder(tmp_path / "cut.safetensors", CPU)
