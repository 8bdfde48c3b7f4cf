"""Bad input through the command line: one sentence, no result, nothing left behind, the section unchanged."""

import ctypes
import hashlib
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from stsr import checkpoint
from stsr.cli.app import app
from stsr.methods.corrdiff import CorrDiff, CorrDiffConfig

TRAINING = ("--method", "unet", "--val", 0, "--steps", 2, "--set", "batch=1", "--set", "train_tile_lr=2")


@pytest.fixture(scope="module")
def made(tissue, visium_folder, visium_section, xenium_section, tmp_path_factory):
    """A folder of a Visium run, two sections and two models; tests work on copies."""
    place = tmp_path_factory.mktemp("made")
    for source, name in (
        (visium_folder, "run"),
        (visium_section, "visium.zarr"),
        (xenium_section, "xenium.zarr"),
    ):
        shutil.copytree(source, place / name)
    _untrained(tissue.genes, place / "model.safetensors")
    _untrained(["NOPE1", "NOPE2", "NOPE3", "NOPE4"], place / "strange.safetensors")
    return place


def _untrained(panel, path):
    torch.manual_seed(0)
    config = CorrDiffConfig(
        widths=(8, 8), factors=4, lr_channels=8, directions=3, denoiser_widths=(8, 8), tile_lr=4, overlap_lr=2
    )
    checkpoint.save(path, CorrDiff(config, tuple(panel), np.full(len(panel), 5.0)), "corrdiff", {})


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    """A working folder with ``s.zarr`` (Visium), ``x.zarr`` (Xenium), ``m.safetensors`` and a Visium run."""
    for source, name in (("visium.zarr", "s.zarr"), ("xenium.zarr", "x.zarr"), ("run", "run")):
        shutil.copytree(made / source, tmp_path / name)
    for source, name in (("model", "m"), ("strange", "strange")):
        shutil.copyfile(made / f"{source}.safetensors", tmp_path / f"{name}.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(here, arguments, *words):
    """Run a command that must fail; check its message, exit code and files."""
    before = _contents(here)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    told = result.stderr.strip()
    assert result.exit_code in (1, 2), result.stdout + told
    assert told.startswith("error: ") and "\n" not in told and "internal" not in told
    for word in words:
        assert word in told
    assert result.stdout == ""
    assert _contents(here) == before


def _contents(folder):
    """{path: digest} of everything below, hidden things too."""
    return {
        str(path.relative_to(folder)): hashlib.md5(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in folder.rglob("*")
    }


def cut(path, size=None):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 if size is None else size])


def spoil_chunks(element):
    for path in element.rglob("*"):
        if path.is_file() and path.suffix != ".json":
            cut(path, 40)


# ----------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--scale", "nan"], "choose one of 10, 5, 2, 1"),
        (["--scale", "inf"], "choose one of 10, 5, 2, 1"),
        (["--scale", "ten"], "--scale"),
        (["--scale", 0.5], "choose one of"),
        (["--seed=-1"], "--seed"),
        (["--scael", 5], "--scale"),
        (["--device", "cuda:99"], "--device auto"),
        (["--region", "nan,0,100,100"], "x0 < x1"),
        (["--genes", "@missing.txt"], "missing.txt"),
        (["--genes", "@s.zarr"], "--genes"),
        (["--model", "nowhere.safetensors"], "stsr train"),
        (["--figure", "s.zarr/f.png/g.png", "--figure-genes", "ERBB2"], "'ERBB2'"),
        (["--figure", "m.safetensors/f.png"], "--figure"),
        (["--output", "run"], "--output"),
        (["--output", "m.safetensors"], "--output"),
        (["--output", "s.zarr/inside.zarr"], "inside"),
        (["--output", "nowhere/o.zarr"], "no folder"),
        (["--output", "x.zarr"], "another section"),
        (["--output", "o.zarr", "--name", "he"], "--name"),
        (["--output", "o.zarr", "--genes", "GATTA3"], "did you mean GATA3"),
    ],
)
def test_superres_options(here, options, word):
    refused(here, ["superres", "s.zarr", "--model", "m.safetensors", "--genes", "GATA3", *options], word)


def test_a_figure_in_the_place_of_a_folder(here):
    (here / "f.png").mkdir()
    refused(here, ["superres", "s.zarr", "--method", "bicubic", "--figure", "f.png"], "--figure")


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--bin-um", "0.001"], "--bin-um"),
        (["--bin-um", "nan"], "100 um"),
        (["--min-qv", "nan"], "--min-qv"),
        (["--output", "nowhere/o.zarr"], "no folder"),
        (["--output", "m.safetensors/o.zarr"], "no folder"),
        (["--output", "m.safetensors", "--overwrite"], "--output"),
        (["--he", "m.safetensors"], "m.safetensors"),
    ],
)
def test_prepare_options(here, options, word):
    refused(here, ["prepare", "run", "--output", "o.zarr", *options], word)


@pytest.mark.parametrize("command", ["superres", "train", "prepare"])
def test_a_missing_argument(here, command):
    refused(here, [command], f"see stsr {command} --help")


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf"])
def test_info_of_an_impossible_unit(here, value):
    refused(here, ["info", "s.zarr", f"--um-per-unit={value}"], "--um-per-unit")


# ----------------------------------------------------------------------------------------------------- stores


@pytest.mark.parametrize(
    "command",
    [
        ["superres", "s.zarr", "--model", "m.safetensors", "--genes", "GATA3"],
        ["info", "s.zarr"],
        ["prepare", "s.zarr", "-o", "o.zarr"],
    ],
    ids=lambda words: words[0],
)
@pytest.mark.parametrize(
    "damage", ["zarr.json", "images/he/zarr.json", "images/he/s0/zarr.json", "shapes/spots/shapes.parquet"]
)
def test_damaged_metadata(here, command, damage):
    cut(here / "s.zarr" / damage, 90)
    refused(here, command, "s.zarr")


@pytest.mark.parametrize(
    ("element", "command"),
    [
        ("images/he", ["superres", "x.zarr", "--model", "m.safetensors"]),
        ("images/he", ["prepare", "x.zarr", "-o", "o.zarr"]),
        ("images/he", ["train", "x.zarr", "-o", "t.safetensors", *TRAINING]),
        ("images/hr_10um", ["gec", "x.zarr", "--from", "hr_10um"]),
        ("images/hr_10um", ["prepare", "x.zarr", "-o", "o.zarr"]),
        ("images/hr_10um", ["train", "x.zarr", "-o", "t.safetensors", *TRAINING]),
        ("tables/spots_table/X", ["superres", "x.zarr", "--method", "bicubic"]),
    ],
)
def test_damaged_values(here, element, command):
    spoil_chunks(here / "x.zarr" / element)
    refused(here, command, "x.zarr")


def test_positions_that_are_cut_short(here):
    positions = next((here / "run" / "spatial").glob("tissue_positions*.csv"))
    cut(positions)
    refused(here, ["prepare", "run", "-o", "o.zarr"], "table of positions")


# ------------------------------------------------------------------------------------------- models and runs


def _flip(path):
    content = bytearray(path.read_bytes())
    content[-400:-300] = bytes(255 - value for value in content[-400:-300])
    path.write_bytes(content)


def _noise(path):
    path.write_bytes(np.random.default_rng(0).bytes(999))


@pytest.mark.parametrize(
    "damage",
    [_flip, _noise, lambda path: cut(path, 100), lambda path: cut(path, 0)],
    ids=["flip", "noise", "cut", "empty"],
)
def test_damaged_models(here, damage):
    damage(here / "m.safetensors")
    refused(here, ["superres", "s.zarr", "--model", "m.safetensors", "--genes", "GATA3"], "damaged")


def test_a_model_that_gives_no_numbers(here):
    header, tensors = checkpoint.read_tensors("m.safetensors")
    broken = {
        key: torch.full_like(value, torch.nan) for key, value in tensors.items() if value.is_floating_point()
    }
    checkpoint.write_tensors("m.safetensors", tensors | broken, header)
    before = _contents(here / "s.zarr")
    result = CliRunner().invoke(
        app, ["superres", "s.zarr", "--model", "m.safetensors", "--genes", "LUM", "-q"]
    )
    assert (
        result.exit_code == 1 and result.stderr.count("\n") == 1 and "NaN or infinite values" in result.stderr
    )
    assert _contents(here / "s.zarr") == before and not list(here.glob(".*"))


def test_a_model_of_strange_genes(here):
    refused(here, ["superres", "s.zarr", "--model", "strange.safetensors"], "--genes")
    refused(
        here, ["superres", "s.zarr", "--model", "strange.safetensors", "--no-lr", "--genes", "LUM"], "LUM"
    )


@pytest.mark.parametrize("output", ["m.safetensors/t.safetensors", "taken.safetensors"])
def test_a_file_in_the_way_of_a_run(here, output):
    (here / "taken.run").write_text("mine")
    refused(here, ["train", "x.zarr", "-o", output, *TRAINING], "--output")


def test_a_damaged_state_names_its_folder(here):
    words = ["train", "x.zarr", "-o", "t.safetensors", *TRAINING]
    assert CliRunner().invoke(app, [str(word) for word in words]).exit_code == 0
    (here / "t.safetensors").unlink()
    record = here / "t.run" / "config.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"finished": False}))
    (here / "t.run" / "state.safetensors").write_bytes(b"half")
    refused(here, words, "remove that folder")


# ------------------------------------------------------------------------------------------------------- disks


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts a disk of a given size in bytes, or changes its size."""
    point = tmp_path / "disk"
    point.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)

    def mount(options, flags=0):
        if libc.mount(b"tmpfs", os.fsencode(point), b"tmpfs", flags, options.encode()) != 0:
            pytest.skip("mounting is not permitted here")
        return point

    yield mount
    while libc.umount(os.fsencode(point)) == 0:
        pass


REMOUNT, READ_ONLY = 32, 1


@pytest.mark.skipif(sys.platform != "linux", reason="mounts as Linux does")
def test_a_full_disk(here, made, small_disk):
    disk = small_disk("size=16m")
    shutil.copytree(made / "visium.zarr", disk / "s.zarr")
    used = int(subprocess.run(["du", "-sk", disk], capture_output=True, text=True).stdout.split()[0])
    small_disk(f"size={used + 60}k", REMOUNT)
    model = here / "m.safetensors"
    refused(here, ["superres", disk / "s.zarr", "--model", model, "--genes", "all", "-q"], "is full")
    refused(here, ["superres", "s.zarr", "--model", model, "-q", "-o", disk / "o.zarr"], "is full")
    refused(here, ["prepare", "run", "-o", disk / "o.zarr"], "is full")
    small_disk(f"size={used + 8}k", REMOUNT)
    refused(here, ["train", "x.zarr", "-o", disk / "t.safetensors", *TRAINING, "-q"], "is full")


@pytest.mark.skipif(sys.platform != "linux", reason="mounts as Linux does")
def test_a_read_only_disk(here, made, small_disk):
    disk = small_disk("size=16m")
    shutil.copytree(made / "visium.zarr", disk / "s.zarr")
    small_disk("", REMOUNT | READ_ONLY)
    baseline = ["superres", "--method", "bicubic", "-q"]
    refused(here, [*baseline, disk / "s.zarr"], "read-only", "--output")
    refused(here, [*baseline, "s.zarr", "--figure", disk / "f.png"], "--figure")
    refused(here, ["prepare", "run", "-o", disk / "o.zarr"], "read-only")
    refused(here, ["train", "x.zarr", "-o", disk / "t.safetensors", *TRAINING, "-q"], "--output")
    assert CliRunner().invoke(app, ["info", str(disk / "s.zarr")]).exit_code == 0
    made_elsewhere = CliRunner().invoke(
        app, [str(w) for w in [*baseline, disk / "s.zarr", "-o", "copy.zarr"]]
    )
    assert made_elsewhere.exit_code == 0 and made_elsewhere.stdout == "superres_x10\n"


# ------------------------------------------------------------------------------------------------------- paths


def test_odd_paths_are_no_bad_input(here):
    (here / "däta set").mkdir()
    (here / "s.zarr").rename(here / "däta set" / "séction 1.zarr")
    (here / "link.zarr").symlink_to("däta set/séction 1.zarr")
    for path, scale in (("däta set/séction 1.zarr", 10), ("link.zarr", 5)):
        result = CliRunner().invoke(
            app, ["superres", path, "--method", "bicubic", "--scale", str(scale), "-q"]
        )
        assert (result.exit_code, result.stdout, result.stderr) == (0, f"superres_x{scale}\n", "")
    assert (here / "link.zarr").is_symlink() and not list(here.rglob(".*stsr*"))


def test_an_earlier_copy_takes_more_maps_of_its_section(here):
    for scale in ("10", "5"):
        words = ["superres", "s.zarr", "--method", "bicubic", "-q", "-o", "copy.zarr", "--scale", scale]
        assert CliRunner().invoke(app, words).exit_code == 0
    assert {"superres_x10", "superres_x5"} <= {
        path.name for path in (here / "copy.zarr" / "images").iterdir()
    }
    refused(here, [*words], "--overwrite")
