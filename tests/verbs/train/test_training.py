"""Training: it learns, resumes after any interruption, and checks its settings."""

import json
import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from stsr import checkpoint
from stsr.device import resolve_device
from stsr.errors import StsrError, UsageError
from stsr.methods import method_class
from stsr.signals import Interrupted, interruptible
from stsr.simulate import simulate_tissue, write_xenium
from stsr.store.section import open_section
from stsr.verbs.prepare.verb import prepare
from stsr.verbs.train.config import TrainConfig, read_config, resolve
from stsr.verbs.train.loop import ema_decay, learning_rate
from stsr.verbs.train.run_folder import RunFolder
from stsr.verbs.train.validation import add_moments, mean_pcc
from stsr.verbs.train.verb import train

SMALL = {
    "method": {"widths": [8, 8], "factors": 4, "lr_channels": 8, "genes_per_step": 6},
    "train": {
        "steps": 12,
        "batch": 2,
        "train_tile_lr": 3,
        "warmup": 2,
        "validate_every": 4,
        "log_every": 1,
        "save_every": 3,
        "genes": 6,
        "phases": 1,
    },
}


@pytest.fixture(scope="module")
def section(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tissue")
    tissue = simulate_tissue(900, 800, genes=8, seed=1)
    return prepare(write_xenium(tissue, folder / "xenium", image_um_per_px=5.0), folder / "one.zarr")


def small(section, output, **options):
    return train([section], output, **{"method": "unet", "config": SMALL, "device": "cpu", **options})


@pytest.fixture(scope="module")
def whole(section, tmp_path_factory):
    """An uninterrupted run."""
    return small(section, tmp_path_factory.mktemp("whole") / "m.safetensors")


def lines(output):
    return [json.loads(line) for line in (output.with_suffix(".run") / "log.jsonl").read_text().splitlines()]


def test_a_run_leaves_a_checkpoint_and_a_log(whole):
    loaded = checkpoint.load(whole)
    assert loaded.name == "unet" and len(loaded.method.panel) == 6
    assert (loaded.method.reference > 1).all()
    assert loaded.provenance["sections"] == ["one"] and loaded.provenance["train"]["steps"] == 12
    written = lines(whole)
    assert [line["step"] for line in written if "loss" in line] == list(range(1, 13))
    assert [line["step"] for line in written if "val_loss" in line] == [4, 8, 12]
    assert all({"poisson", "lr", "seconds"} <= set(line) for line in written if "loss" in line)
    assert all(-1 <= line["val_pcc"] <= 1 for line in written if "val_pcc" in line)
    assert sorted(p.name for p in whole.with_suffix(".run").iterdir()) == ["config.json", "lock", "log.jsonl"]


def test_a_model_has_the_depth_of_whole_sections(whole, section):
    """Tiles are trained on half of the counts; a prediction without spots should not be half as deep."""
    opened = open_section(section)
    method = checkpoint.load(whole).method
    tissue = opened.tissue.read(opened.hr.grid)
    density = opened.hr.read(list(method.panel))[:, tissue].mean(1) * 100  # per 100 um pixel of 10 um bins
    np.testing.assert_allclose(method.reference.sum(), density.sum(), rtol=0.25)


def test_loss_falls(section, tmp_path):
    output = small(section, tmp_path / "m.safetensors", steps=40, val=0, settings=["learning_rate=0.01"])
    losses = [line["loss"] for line in lines(output) if "loss" in line]
    assert np.mean(losses[-8:]) < np.mean(losses[:4])
    assert checkpoint.load(output).provenance["step"] == 40


def test_best_weights_are_kept(whole):
    values = {line["step"]: line["val_loss"] for line in lines(whole) if "val_loss" in line}
    best = min(values, key=values.get)
    provenance = checkpoint.load(whole).provenance
    assert provenance["step"] == best and provenance["validation_loss"] == values[best]


def test_same_command_same_bytes(whole, section, tmp_path):
    again = small(section, tmp_path / "m.safetensors", settings=["prefetch=0", "save_every=100"])
    assert again.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(("number", "code"), [("SIGTERM", 143), ("SIGUSR1", 143), ("SIGINT", 130)])
def test_a_signal_saves_and_the_same_command_goes_on(whole, section, tmp_path, number, code):
    output = tmp_path / "m.safetensors"

    def stop_at_5(done, total, sentence):
        if sentence.startswith("step 5/"):
            os.kill(os.getpid(), getattr(signal, number))

    with pytest.raises(Interrupted, match="step 5 of 12") as caught:
        small(section, output, progress=stop_at_5)
    assert caught.value.exit_code == code
    assert not output.exists() and (tmp_path / "m.run" / "state.safetensors").exists()
    small(section, output)
    assert output.read_bytes() == whole.read_bytes()
    without_time = [
        [{k: v for k, v in line.items() if k != "seconds"} for line in lines(o)] for o in (output, whole)
    ]
    assert without_time[0] == without_time[1]


def test_a_training_on_denoised_spots_resumes_exactly(section, tmp_path):
    own = {"settings": ["denoised=0.7", "realisations=2", "spot_counts=40"], "steps": 6, "seed": 3}
    whole = small(section, tmp_path / "whole.safetensors", **own)
    output, labels = tmp_path / "m.safetensors", []

    def stop_at_3(done, total, sentence):
        labels.append(sentence)
        if sentence.startswith("step 3/"):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="step 3 of 6"):
        small(section, output, progress=stop_at_3, **own)
    assert labels.count("denoising simulated spots of one") == 4  # two for training, and one of each kind
    small(section, output, **own)
    assert output.read_bytes() == whole.read_bytes()
    assert checkpoint.load(output).provenance["train"]["denoised"] == 0.7
    other = small(section, tmp_path / "other.safetensors", **{**own, "settings": own["settings"][1:]})
    assert other.read_bytes() != whole.read_bytes()


def test_a_kill_loses_nothing_but_time(whole, section, tmp_path):
    output = tmp_path / "m.safetensors"
    script = f"""
import os, signal
import torch
from stsr.verbs.train.verb import train
torch.set_num_threads({torch.get_num_threads()})  # sums depend on how threads share the work
def kill(done, total, sentence):
    if sentence.startswith("step 8/"):
        os.kill(os.getpid(), signal.SIGKILL)
train([{str(section)!r}], {str(output)!r}, method="unet", config={SMALL!r}, device="cpu", progress=kill)
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == -signal.SIGKILL
    assert lines(output)[-1]["step"] == 8 and not output.exists()  # saved at 6
    small(section, output)
    assert output.read_bytes() == whole.read_bytes()
    steps = [line["step"] for line in lines(output) if "loss" in line]
    assert steps == list(range(1, 13))


def test_done_is_done(whole, section):
    before = whole.read_bytes()
    with pytest.raises(UsageError, match=r"already trained.*--overwrite"):
        small(section, whole)
    with pytest.raises(UsageError, match="exists; add --overwrite"):
        small(section, whole, seed=1)
    assert whole.read_bytes() == before


def test_a_kill_between_model_and_end_is_mended(section, tmp_path, monkeypatch):
    output = tmp_path / "m.safetensors"

    def killed(self):
        raise SystemExit(137)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(RunFolder, "finish", killed)
        small(section, output, steps=2)
    assert output.exists()
    small(section, output, steps=2)
    assert not (tmp_path / "m.run" / "state.safetensors").exists()


def test_overwrite_trains_anew(section, tmp_path):
    output = tmp_path / "m.safetensors"
    first = small(section, output, steps=2).read_bytes()
    assert small(section, output, steps=2, seed=1, overwrite=True).read_bytes() != first


def test_another_run_in_the_way_is_named(section, tmp_path):
    output = tmp_path / "m.safetensors"

    def stop(done, total, sentence):
        if sentence.startswith("step 3/"):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        small(section, output, progress=stop)
    with pytest.raises(UsageError, match="unfinished run with other seed, learning_rate; add --overwrite"):
        small(section, output, seed=3, settings=["learning_rate=0.5"])
    small(section, output, seed=3, steps=2, overwrite=True)
    assert checkpoint.load(output).provenance["seed"] == 3


def test_a_model_of_others_is_not_replaced(section, tmp_path):
    output = tmp_path / "m.safetensors"
    output.write_text("mine")
    with pytest.raises(UsageError, match="exists"):
        small(section, output)
    assert output.read_text() == "mine" and not (tmp_path / "m.run").exists()


def test_dry_run_writes_nothing(section, tmp_path):
    told = small(section, tmp_path / "m.safetensors", dry_run=True)
    assert told["panel"] == 6 and told["tiles"] > 2 and told["validation_tiles"] > 0
    assert told["parameters"] > 1000 and told["seconds_per_step"] > 0
    assert told["config"]["train"]["steps"] == 12 and told["config"]["method"]["factors"] == 4
    json.dumps(told)
    assert not list(tmp_path.iterdir())


def test_an_image_coarser_than_the_model_reads_is_reported(section, tmp_path):
    said = []
    small(section, tmp_path / "m.safetensors", dry_run=True, settings=["image_um=5"], report=said.append)
    assert not said
    small(section, tmp_path / "m.safetensors", dry_run=True, settings=["image_um=2"], report=said.append)
    assert said == ["the H&E of one has 5 um per pixel, and the model reads 2 um: detail is missing"]


@pytest.mark.parametrize(("name", "own"), [("corrdiff", {"directions": 4}), ("c3diff", {}), ("diffst", {})])
def test_other_methods_train_too(section, tmp_path, name, own):
    tiny = {"train": {**SMALL["train"], "steps": 2}, "method": own}
    output = small(section, tmp_path / "m.safetensors", method=name, config=tiny)
    assert checkpoint.load(output).name == name


EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.mark.parametrize("preset", ["c3diff", "c3diff_small", "diffst", "diffst_small"])
def test_presets_train_at_a_smaller_size(section, tmp_path, preset):
    method, training = resolve(
        method_class(preset.split("_")[0]), read_config(EXAMPLES / f"{preset}.toml"), []
    )
    if not preset.endswith("small"):
        assert training.train_tile_lr == method.tile_lr == 26 and method.image_um == 0.5
        assert method.schedule == "ddpm" and method.beta_steps == 1000
    smaller = ["train.steps=1", "train_tile_lr=2", "batch=2", "tile_lr=2", "overlap_lr=1", "genes=4"]
    narrower = ["widths=8,8", "image_widths=8,8", "feature_channels=8", "gene_channels=4", "validate_every=1"]
    output = small(
        section,
        tmp_path / "m.safetensors",
        method=preset.split("_")[0],
        config=EXAMPLES / f"{preset}.toml",
        settings=smaller + narrower,
    )
    assert checkpoint.load(output).method.config.schedule == method.schedule


def test_global_randomness_is_left_alone(section, tmp_path):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    small(section, tmp_path / "m.safetensors", steps=1)
    assert torch.equal(torch.rand(3), expected)


def test_a_loss_that_is_not_finite_ends_training(section, tmp_path):
    with pytest.raises(StsrError, match=r"NaN or infinite.*learning_rate=3e\+19"):
        small(section, tmp_path / "m.safetensors", settings=["learning_rate=1e20", "grad_clip=0", "warmup=0"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"settings": ["factrs=3"]}, "did you mean factors"),
        ({"settings": ["learning_rat=3"]}, "did you mean learning_rate"),
        ({"settings": ["steps"]}, "key=value"),
        ({"settings": ["steps=many"]}, "whole number"),
        ({"settings": ["steps=0"]}, "must be positive"),
        ({"settings": ["train.steps=1", "method.steps=1"]}, "steps"),
        ({"method": "bicubic"}, "no parameters to train"),
        ({"method": "unett"}, "did you mean unet"),
        ({"device": "cuda:99"}, "--device auto"),
        ({"device": "abacus"}, "no device is called"),
        ({"config": "nowhere.toml"}, "no config at"),
        ({"regions": "nowhere.json"}, "not a JSON file of regions"),
    ],
)
def test_refusals_come_before_anything_is_written(section, tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        small(section, tmp_path / "m.safetensors", **options)
    assert not list(tmp_path.iterdir())


def test_outputs_are_safetensors(section, tmp_path):
    with pytest.raises(UsageError, match=r"m\.safetensors"):
        small(section, tmp_path / "m.pt")
    with pytest.raises(UsageError, match="at least one section"):
        train([], tmp_path / "m.safetensors", method="unet")


def test_settings_find_their_config(tmp_path):
    unet, c3diff = method_class("unet"), method_class("c3diff")
    method, training = resolve(
        unet, {"factors": 5, "train": {"steps": 7}}, ["widths=4,8", "depths=1.0,0.5", "flips=false"]
    )
    assert method.factors == 5 and method.widths == (4, 8)
    assert training.steps == 7 and training.depths == (1.0, 0.5) and training.flips is False
    assert resolve(unet, {}, ["genes=A,B"])[1].genes == ("A", "B")
    assert resolve(unet, {}, ["spots=visium"])[1].spots == ("visium",)
    assert isinstance(resolve(unet, {}, ["learning_rate=1"])[1].learning_rate, float)
    with pytest.raises(UsageError, match=r"train\.steps or method\.steps"):
        resolve(c3diff, {}, ["steps=3"])
    file = tmp_path / "c.toml"
    file.write_text("factors = 3\n[train]\nsteps = 9\n")
    method, training = resolve(unet, read_config(file), ["steps=10"])
    assert method.factors == 3 and training.steps == 10
    file.write_text("factors 3")
    with pytest.raises(UsageError, match="not a TOML file"):
        read_config(file)


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch": 0}, {"ema_decay": 1.0}, {"tissue": 2.0}, {"spots": ()}, {"depths": (2.0,)},
        {"select": "worst"}, {"storage": "int8"}, {"warmup": -1}, {"genes": -1}, {"denoised": 1.5},
        {"realisations": 0}, {"spot_counts": -1}, {"depths": (0.5,), "spot_counts": 200},
    ],
)  # fmt: skip
def test_config_is_checked_at_birth(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TrainConfig(**wrong)


def test_rates_rise_and_fall():
    config = TrainConfig(steps=100, warmup=10, learning_rate=1.0, final_rate=0.1, ema_decay=0.9)
    rates = [learning_rate(config, step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == 1.0
    assert rates[-1] == pytest.approx(0.1)
    assert all(before >= after for before, after in pairwise(rates[10:]))
    assert ema_decay(config, 0) == 0.1 and ema_decay(config, 1000) == 0.9


def test_correlation_of_parts_is_that_of_the_whole():
    rng = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 6, 3, 5, 5, generator=rng)
    b[:, 2] = 0  # a gene without counts has no effect
    known = torch.ones(6, 3)
    moments = add_moments(a[4:], b[4:], known[4:], add_moments(a[:4], b[:4], known[:4], None))
    expected = [np.corrcoef(a[:, g].ravel(), b[:, g].ravel())[0, 1] for g in range(2)]
    assert mean_pcc(moments) == pytest.approx(np.mean(expected), abs=1e-6)
    known[:3, 0] = 0  # the first gene was not measured in three tiles, the second nowhere
    known[:, 1] = 0
    expected = np.corrcoef(a[3:, 0].ravel(), b[3:, 0].ravel())[0, 1]
    assert mean_pcc(add_moments(a, b, known, None)) == pytest.approx(expected, abs=1e-6)


def test_signals_are_noted_and_handlers_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with interruptible() as interruption:
        interruption.stop()
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.requested
        with pytest.raises(Interrupted) as caught:
            interruption.stop("stopped")
        assert caught.value.exit_code == 143 and str(caught.value) == "stopped"
        with pytest.raises(SystemExit):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


def test_devices():
    assert resolve_device("cpu").type == "cpu"
    assert resolve_device().type in ("cpu", "cuda", "mps")


def test_a_model_can_be_the_start_of_another(whole, section, tmp_path):
    gentle = ["learning_rate=1e-9", "weight_decay=0"]
    output = small(section, tmp_path / "m.safetensors", init=whole, steps=1, settings=gentle)
    before, after = (checkpoint.load(path).method.state_dict() for path in (whole, output))
    for key in before:
        torch.testing.assert_close(after[key], before[key], atol=1e-4, rtol=1e-4)
    with pytest.raises(UsageError, match="another config"):
        small(section, tmp_path / "n.safetensors", init=whole, settings=["factors=5"])
    with pytest.raises(UsageError, match="another panel"):
        small(section, tmp_path / "n.safetensors", init=whole, settings=["genes=5"])
    with pytest.raises(UsageError, match="is a unet"):
        small(
            section, tmp_path / "n.safetensors", init=whole, method="c3diff", config={"train": SMALL["train"]}
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.run", "m.safetensors"]
