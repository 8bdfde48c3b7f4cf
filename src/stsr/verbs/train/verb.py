"""Train a method on sections with counts per bin: train()."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from stsr import checkpoint
from stsr.errors import UsageError
from stsr.progress import Progress, Report, silent
from stsr.signals import interruptible
from stsr.verbs.train.job import TrainingJob, described, make_job
from stsr.verbs.train.loop import batches_of, initial_state, training_loop, training_step
from stsr.verbs.train.run_folder import RunFolder, State

_TIMED_STEPS = 3  # of a dry run


def train(
    sections: Sequence[str | Path],
    output: str | Path,
    *,
    method: str | None = None,
    config: Mapping[str, Any] | str | Path | None = None,
    settings: Sequence[str] = (),
    steps: int | None = None,
    val: float = 0.15,
    regions: dict | str | Path | None = None,
    device: str = "auto",
    seed: int = 0,
    init: str | Path | None = None,
    features: Sequence[str | Path] = (),
    overwrite: bool = False,
    dry_run: bool = False,
    provenance: dict | None = None,
    progress: Progress | None = None,
    report: Report | None = None,
) -> Path | dict:
    """Train a method and write a checkpoint; after an interruption the same command resumes.

    Parameters
    ----------
    sections
        Stores with counts per bin and an image, as `stsr prepare` makes them from Xenium folders; or stores of which
        only spots were measured (`stsr.verbs.train.slides`).
    output
        The checkpoint to write. Log and state are kept in ``<its stem>.run`` beside it.
    method
        Name of the method; that of the default model by default.
    config
        A mapping or a TOML file of settings of training and of the method, flat or as tables ``[train]`` and
        ``[method]``; see `TrainConfig` and the method's own config.
    settings
        ``"key=value"``; these override ``config``.
    steps
        Number of training steps; overrides both.
    val
        Fraction of each section's tissue, or spots, that is kept for validation. With 0, the last weights are kept.
    regions
        ``{section name: {"exclude": [[x0, y0, x1, y1], ...], "validation": [...]}}``, um, or a JSON file of it.
    device
        As in `stsr.device.resolve_device`.
    seed
        On a CPU, two runs with the same seed and the same number of threads give the same file, bit for bit.
    init
        A checkpoint of the same method, config and panel to start from, for fine-tuning.
    features
        Patch features of the H&E that the method reads beside the image: an encoder (TorchScript or safetensors), a
        folder of arrays named after the sections, or one array (y, x, channels) per section in their order. They are
        computed once and cached in the sections.
    overwrite
        Replace an existing model, discard an unfinished run with other settings, and replace cached features of
        another file of the same name.
    dry_run
        Write nothing, and return what would be done.
    provenance
        Stored in the checkpoint's header: licence and attribution of the data.
    progress
        Called with the steps that are done, their total and a label.
    report
        Called with remarks on the sections.

    Returns
    -------
    Path or dict
        The checkpoint; of a dry run the resolved settings, sizes and estimated seconds per step.

    Raises
    ------
    UsageError
        If a setting is unknown or invalid, or the output exists.
    StsrError
        If a section cannot be used for training, or the loss becomes NaN or infinite.
    Interrupted
        After SIGINT, SIGTERM or SIGUSR1, once the state is saved.
    """
    output, progress = Path(output), progress or silent
    if output.suffix != ".safetensors":
        raise UsageError(
            f"a model is a safetensors file; write {output.with_suffix('.safetensors')} instead of {output}"
        )
    folder = RunFolder(output)
    if not dry_run:
        folder.check(None, overwrite)
    with _own_randomness():
        job = make_job(
            sections,
            method=method,
            config=config,
            settings=settings,
            steps=steps,
            val=val,
            regions=regions,
            device=device,
            seed=seed,
            init=init,
            features=features,
            overwrite=overwrite,
            dry_run=dry_run,
            progress=progress,
            report=report or silent,
        )
        if dry_run:
            return {"output": str(output), **described(job), **_timed(job)}
        with folder.owned():
            _run(job, folder, overwrite, progress, provenance)
    return output


@contextmanager
def _own_randomness() -> Iterator[None]:
    """Restore torch's global random state at the end."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    with torch.random.fork_rng(range(count)):
        yield


def _run(
    job: TrainingJob, folder: RunFolder, overwrite: bool, progress: Progress, provenance: dict | None
) -> None:
    """Start or resume, and train until the last step or a signal."""
    state = initial_state(job)
    if folder.check(job.settings, overwrite):
        folder.resume(state)
        if folder.output.exists() and not overwrite and state.step < job.config.steps:
            raise UsageError(
                f"{folder.output} exists; add --overwrite to replace it or give another --output"
            )
    else:
        folder.begin(job.settings, described(job))
    with interruptible() as interruption:
        training_loop(job, folder, state, interruption, progress)
    _save_model(job, state, folder.output, provenance)
    folder.finish()


def _timed(job: TrainingJob) -> dict:
    """Measure seconds per step, on steps that are then discarded."""
    state = initial_state(job)
    batches = batches_of(job, 0, _TIMED_STEPS)
    step, batch = next(batches)
    training_step(job, state, batch, step)  # not timed: the first step also selects kernels
    start = time.perf_counter()
    for step, batch in batches:
        float(training_step(job, state, batch, step)["loss"])  # waits for the device
    seconds = (time.perf_counter() - start) / (_TIMED_STEPS - 1)
    return {"seconds_per_step": round(seconds, 4), "seconds": round(seconds * job.config.steps, 1)}


def _save_model(job: TrainingJob, state: State, output: Path, provenance: dict | None) -> None:
    """Write the selected averaged weights. Without date and duration, so that equal runs give equal files."""
    best = job.config.select == "best" and bool(state.best_weights)
    if best:
        state.ema.load_state_dict(state.best_weights)
    calibrating = job.tiles.validation_batches(job.config.batch, job.config.spread_from)
    batches = (batch.to(job.device) for batch in calibrating)
    state.ema.finish(state.ema.completed(batch) for batch in batches)
    # Tiles hold a part of the counts; without spots, a prediction has the depth of the whole sections.
    state.ema.reference.div_(torch.from_numpy(job.tiles.depth).to(state.ema.reference.device))
    record = {
        "sections": job.settings["sections"],
        "regions": job.settings["regions"],
        "val": job.settings["val"],
        "gaps_lr": job.tiles.gaps_lr,
        "tiles": job.tiles.count,
        "train": job.settings["train"],
        **({"features": job.settings["features"]} if "features" in job.settings else {}),
        "seed": job.seed,
        "device": job.device.type,
        "step": state.best_step if best else state.step,
        "validation_loss": state.best if best else None,
        **(provenance or {}),
    }
    checkpoint.save(output, state.ema, job.name, record, job.config.storage)
