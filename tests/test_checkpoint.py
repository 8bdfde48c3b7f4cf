"""Checkpoints are self-contained, and damage is reported in one sentence."""

import json
import os

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import stsr
from stsr import checkpoint
from stsr.errors import StsrError, UsageError
from stsr.methods import method_class

PANEL = ("GATA3", "LUM", "POSTN")


@pytest.fixture
def method():
    torch.manual_seed(0)
    chosen = method_class("unet")
    config = chosen.Config(widths=(8, 8), factors=4, lr_channels=8)
    return chosen(config, PANEL, np.array([3.0, 1e5, 0.1]))


@pytest.fixture
def path(method, tmp_path):
    return checkpoint.save(
        tmp_path / "m.safetensors", method, "unet", {"license": "CC BY 4.0", "sections": ["a"]}
    )


def test_everything_comes_back(method, path):
    loaded = checkpoint.load(path)
    assert loaded.name == "unet" and loaded.provenance == {"license": "CC BY 4.0", "sections": ["a"]}
    assert loaded.method.panel == PANEL and loaded.method.config == method.config
    assert loaded.method.requirements == method.requirements
    assert not loaded.method.training
    for key, tensor in method.state_dict().items():
        assert torch.equal(loaded.method.state_dict()[key], tensor), key


def test_header_says_all_without_weights(method, path):
    header = checkpoint.describe(path)
    assert (
        header["method"] == "unet" and header["panel"] == list(PANEL) and header["stsr"] == stsr.__version__
    )
    assert header["requirements"]["bin_um"] == 10.0 and header["provenance"]["license"] == "CC BY 4.0"


def test_same_method_same_bytes_and_digest(method, path, tmp_path):
    other = checkpoint.save(tmp_path / "n.safetensors", method, "unet", checkpoint.load(path).provenance)
    assert other.read_bytes() == path.read_bytes()
    assert checkpoint.digest(other) == checkpoint.load(path).digest
    assert len(checkpoint.digest(other)) == 12


def test_half_precision_is_half_the_size_and_keeps_statistics(method, path, tmp_path):
    half = checkpoint.save(tmp_path / "half.safetensors", method, "unet", {}, storage="float16")
    weights, small = (sum(t.nbytes for t in load_file(p).values()) for p in (path, half))
    assert small < 0.55 * weights
    loaded = checkpoint.load(half).method
    assert torch.equal(loaded.reference, method.reference)  # 1e5 would be infinite in float16
    assert loaded.loadings.dtype == torch.float32
    torch.testing.assert_close(loaded.loadings, method.loadings, atol=1e-3, rtol=1e-3)
    with pytest.raises(UsageError, match="float32 or float16"):
        checkpoint.save(half, method, "unet", {}, storage="int8")


def test_channels_last_weights_are_kept(method, tmp_path):
    method.to(memory_format=torch.channels_last)
    loaded = checkpoint.load(checkpoint.save(tmp_path / "m.safetensors", method, "unet", {})).method
    for key, tensor in method.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key


def test_files_are_readable_as_others_and_nothing_is_left_beside(path):
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask
    assert [child.name for child in path.parent.iterdir()] == ["m.safetensors"]


def test_a_failed_save_leaves_the_old_file(method, path, monkeypatch):
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StsrError, match="full"):
        checkpoint.save(path, method, "unet", {})
    assert path.read_bytes() == before
    assert [child.name for child in path.parent.iterdir()] == ["m.safetensors"]


def _rewrite(path, change_header=None, change_tensors=None):
    header, tensors = checkpoint.read_tensors(path)
    if change_header:
        change_header(header)
    if change_tensors:
        change_tensors(tensors)
    checkpoint.write_tensors(path, tensors, header)


def _cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def _garble(path):
    path.write_bytes(b"\xff" * 64 + path.read_bytes()[64:])


def _empty(path):
    path.write_bytes(b"")


def _folder(path):
    path.unlink()
    path.mkdir()


def _foreign(path):
    save_file({"x": torch.zeros(3)}, path)


def _text(text):
    return lambda path: save_file({"x": torch.zeros(3)}, path, metadata={"stsr": text})


def _shape(tensors):
    tensors["loadings"] = torch.zeros(2, 2)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.unlink(), "no model at"),
        (_folder, "is a folder, not a model"),
        (_cut, "damaged"),
        (_garble, "damaged"),
        (_empty, "damaged"),
        (_foreign, "not made by stsr"),
        (_text("{"), "header is broken"),
        (_text("[1]"), "header is broken"),
        (_text("{}"), "no version"),
        (_text(json.dumps({"format": checkpoint.FORMAT + 1, "stsr": "9.1"})), "newer stsr .9.1.; upgrade"),
        (lambda p: _rewrite(p, lambda h: h.pop("panel")), "does not fit|do not fit"),
        (lambda p: _rewrite(p, lambda h: h.update(method="unheard")), "upgrade stsr"),
        (lambda p: _rewrite(p, lambda h: h["config"].update(unheard=1)), "upgrade stsr"),
        (lambda p: _rewrite(p, change_tensors=lambda t: t.pop("offsets")), "do not fit"),
        (lambda p: _rewrite(p, change_tensors=_shape), "do not fit"),
    ],
)
def test_damage_is_one_sentence(path, spoil, message):
    spoil(path)
    with pytest.raises(StsrError, match=message) as caught:
        checkpoint.load(path)
    assert "\n" not in str(caught.value)


def test_default_weights_are_there_or_missed(monkeypatch, tmp_path):
    monkeypatch.setattr(checkpoint.resources, "files", lambda _: tmp_path)
    with pytest.raises(StsrError, match="--model"):
        checkpoint.default_weights()
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "default.safetensors").write_bytes(b"")
    assert checkpoint.default_weights().name == "default.safetensors"
