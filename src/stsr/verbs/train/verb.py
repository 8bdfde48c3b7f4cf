"""From sections with known high resolution to a checkpoint: train()."""

from __future__ import annotations

import copy
import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from stsr import checkpoint
from stsr.diffusion.noise import Noise, TileNoise
from stsr.errors import StsrError, UsageError
from stsr.methods.batch import Batch
from stsr.methods.method import Method
from stsr.progress import Progress, silent
from stsr.signals import Interruption, interruptible
from stsr.verbs.train.config import TrainConfig
from stsr.verbs.train.job import Job, described, make_job
from stsr.verbs.train.run_folder import Run, State

_TIMED_STEPS = 3  # of a dry run


def train(
    sections: Sequence[str | Path],
    output: str | Path,
    *,
    method: str | None = None,
    config: dict | str | Path | None = None,
    settings: Sequence[str] = (),
    steps: int | None = None,
    val: float = 0.15,
    regions: dict | str | Path | None = None,
    device: str = "auto",
    seed: int = 0,
    init: str | Path | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    provenance: dict | None = None,
    progress: Progress | None = None,
) -> Path | dict:
    """Train a method; the same command goes on after a signal or a kill.

    Parameters
    ----------
    sections
        Stores with counts per bin and an image, as `stsr prepare` makes them from Xenium folders.
    output
        The checkpoint to write. Log and state are kept in ``<its stem>.run`` beside it.
    method
        Its name; the default model's by default.
    config
        A mapping or a TOML file of settings of training and of the method, flat or as tables ``[train]`` and
        ``[method]``; see `TrainConfig` and the method's own config.
    settings
        ``"key=value"``, stronger than ``config``.
    steps
        Stronger than both.
    val
        Part of each section's tissue that is kept for validation; 0 for none, then the last weights are kept.
    regions
        ``{section name: {"exclude": [[x0, y0, x1, y1], ...], "validation": [...]}}``, um, or a JSON file of it.
    device
        As in `stsr.device.resolve_device`.
    seed
        Two runs of one seed on one CPU give the same file, bit for bit.
    init
        A checkpoint of the same method, config and panel whose weights are the start, for fine-tuning.
    overwrite
        Replace a model that is there, and drop an unfinished run with other settings.
    dry_run
        Write nothing, and return what would be done.
    provenance
        Goes into the checkpoint's header: licence and attribution of the data.
    progress
        Called with a sentence and the part that is done (0..1).

    Returns
    -------
    Path or dict
        The checkpoint; of a dry run the resolved settings, sizes and an estimate of seconds per step.

    Raises
    ------
    UsageError
        If a setting is unknown or impossible, or something is in the way of the output.
    StsrError
        If nothing can be learned from a section, or the loss is no longer a number.
    Interrupted
        After SIGINT, SIGTERM or SIGUSR1, once the state is saved.
    """
    output, progress = Path(output), progress or silent
    if output.suffix != ".safetensors":
        raise UsageError(
            f"a model is a safetensors file; write {output.with_suffix('.safetensors')} instead of {output}"
        )
    run = Run(output)
    if not dry_run:
        run.check(None, overwrite)
    with _own_randomness():
        job = make_job(sections, method, config, settings, steps, val, regions, device, seed, init, progress)
        if dry_run:
            return {"output": str(output), **described(job), **_timed(job)}
        with run.owned():
            _run(job, run, overwrite, progress, provenance)
    return output


@contextmanager
def _own_randomness() -> Iterator[None]:
    """Leave torch's global random numbers to the caller as they were."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    with torch.random.fork_rng(range(count)):
        yield


def _run(job: Job, run: Run, overwrite: bool, progress: Progress, provenance: dict | None) -> None:
    """Begin or go on, to the end or the next signal."""
    state = _fresh(job)
    if run.check(job.settings, overwrite):
        run.resume(state)
        if run.output.exists() and not overwrite and state.step < job.config.steps:
            raise UsageError(f"{run.output} exists; add --overwrite to replace it or give another --output")
    else:
        run.begin(job.settings, described(job))
    with interruptible() as interruption:
        _loop(job, run, state, interruption, progress)
    _save_model(job, state, run.output, provenance)
    run.finish()


def _timed(job: Job) -> dict:
    """Seconds per step, of steps that are then thrown away."""
    state = _fresh(job)
    batches = _batches(job, 0, _TIMED_STEPS)
    step, batch = next(batches)
    _step(job, state, batch, step)  # the first also finds its kernels
    start = time.perf_counter()
    for step, batch in batches:
        float(_step(job, state, batch, step)["loss"])
    seconds = (time.perf_counter() - start) / (_TIMED_STEPS - 1)
    return {"seconds_per_step": round(seconds, 4), "seconds": round(seconds * job.config.steps, 1)}


# ------------------------------------------------------------------------------------------------------ the loop


def _fresh(job: Job) -> State:
    """Everything at step 0."""
    torch.manual_seed(job.number("weights", 0))
    method = job.method(job.method_config, job.tiles.panel, job.tiles.reference)
    if job.init is not None:
        checkpoint.start_from(method, job.init)
    method = method.to(job.device).to(memory_format=torch.channels_last).train()
    ema = copy.deepcopy(method).eval().requires_grad_(False)
    if job.config.compile and job.device.type == "cuda":
        for part in method.children():
            part.compile()
    decayed = [parameter for parameter in method.parameters() if parameter.ndim >= 2]
    plain = [parameter for parameter in method.parameters() if parameter.ndim < 2]
    groups = [
        {"params": decayed, "weight_decay": job.config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return State(
        method, ema, torch.optim.AdamW([group for group in groups if group["params"]], betas=(0.9, 0.99))
    )


def _loop(job: Job, run: Run, state: State, interruption: Interruption, progress: Progress) -> None:
    """Train until the last step or a signal."""
    config = job.config
    saved = started = time.monotonic()
    before = state.seconds
    for step, batch in _batches(job, state.step, config.steps):
        terms = _step(job, state, batch, step)
        state.step = step + 1
        state.seconds = before + time.monotonic() - started
        _gather(state, terms)
        last = state.step == config.steps
        if state.step % config.log_every == 0 or last:
            _log(job, run, state, progress)
        if state.step % config.validate_every == 0 or last:
            _validate(job, run, state, progress)
        due = state.step % config.save_every == 0 or time.monotonic() - saved > config.save_seconds
        if due or last or interruption.requested:
            state.save(run.state_path)
            saved = time.monotonic()
        if not last:
            interruption.stop(
                f"stopped after step {state.step} of {config.steps}; the same command goes on from there"
            )


def _batches(job: Job, first: int, last: int) -> Iterator[tuple[int, Batch]]:
    """(step, batch on the device) for steps ``first`` to ``last - 1``, made ahead in a thread."""

    def made(step: int) -> Batch:
        return job.tiles.batch(job.config.batch, job.generator("tiles", step, "cpu"))

    if not job.config.prefetch:
        for step in range(first, last):
            yield step, made(step).to(job.device)
        return
    pool = ThreadPoolExecutor(1, "stsr-tiles")
    try:
        ahead = deque(
            pool.submit(made, step) for step in range(first, min(first + job.config.prefetch, last))
        )
        for step in range(first, last):
            batch = ahead.popleft().result().to(job.device)
            if step + job.config.prefetch < last:
                ahead.append(pool.submit(made, step + job.config.prefetch))
            yield step, batch
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _step(job: Job, state: State, batch: Batch, step: int) -> dict[str, torch.Tensor]:
    """One step of the optimiser; the loss's terms."""
    config = job.config
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(config, step)
    torch.manual_seed(job.number("dropout", step))  # nn.Dropout knows no other door
    with _autocast(job):
        terms = state.method.loss(batch, step / max(config.steps - 1, 1), job.generator("loss", step))
    state.optimizer.zero_grad(set_to_none=True)
    terms["loss"].backward()
    if config.grad_clip:
        nn.utils.clip_grad_norm_(state.method.parameters(), config.grad_clip)
    state.optimizer.step()
    _average(state.ema, state.method, ema_decay(config, step))
    return {name: term.detach() for name, term in terms.items()}


def learning_rate(config: TrainConfig, step: int) -> float:
    """AdamW's rate: a straight rise, then half a cosine."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    part = (step - config.warmup) / max(config.steps - config.warmup, 1)
    cosine = (1 + math.cos(math.pi * min(part, 1.0))) / 2
    return config.learning_rate * (config.final_rate + (1 - config.final_rate) * cosine)


def ema_decay(config: TrainConfig, step: int) -> float:
    """Decay of the running mean, shorter at the start so that the first weights are soon forgotten."""
    return min(config.ema_decay, (1 + step) / (10 + step))


@torch.no_grad()
def _average(ema: Method, method: Method, decay: float) -> None:
    """Move the running mean towards the weights; buffers are taken over."""
    torch._foreach_lerp_(list(ema.parameters()), list(method.parameters()), 1 - decay)
    for mean, value in zip(ema.buffers(), method.buffers(), strict=True):
        mean.copy_(value)


def _autocast(job: Job) -> torch.autocast:
    on = job.device.type == "cuda" and job.config.bf16
    return torch.autocast(job.device.type, dtype=torch.bfloat16, enabled=on)


# --------------------------------------------------------------------------------------- log, validation, the end


def _gather(state: State, terms: dict[str, torch.Tensor]) -> None:
    """Add to the sums since the last line of the log, without waiting for the device."""
    terms = {**terms, "steps": torch.ones(())}
    state.pending = {name: state.pending.get(name, 0) + term.float() for name, term in terms.items()}


def _log(job: Job, run: Run, state: State, progress: Progress) -> None:
    """Write the mean terms since the last line."""
    count = float(state.pending["steps"])
    means = {name: float(total) / count for name, total in state.pending.items() if name != "steps"}
    state.pending = {}
    if not math.isfinite(means["loss"]):
        lower = job.config.learning_rate / 3
        raise StsrError(
            f"the loss was no longer a number at step {state.step}; "
            f"start anew: --overwrite --set learning_rate={lower:.1g}"
        )
    rate = learning_rate(job.config, state.step - 1)
    run.log({"step": state.step, **means, "lr": rate, "seconds": round(state.seconds, 3)})
    known = "" if state.best is None else f", best validation {state.best:.4f}"
    label = f"step {state.step}/{job.config.steps}, loss {means['loss']:.4f}{known}"
    progress(state.step, job.config.steps, label)


@torch.no_grad()
def _validate(job: Job, run: Run, state: State, progress: Progress) -> None:
    """Loss of the running mean on the validation tiles, with the same random numbers each time; keep the best."""
    if not job.tiles.validation_count:
        return
    totals: dict[str, float] = {}
    moments = None
    for number, batch in enumerate(job.tiles.validation_batches(job.config.batch)):
        batch = batch.to(job.device)
        with _autocast(job):
            terms = state.ema.loss(batch, 1.0, job.generator("validation", number))
        for name, term in terms.items():
            totals[name] = totals.get(name, 0.0) + float(term) * len(batch) / job.tiles.validation_count
        if state.ema.knows_mean or not state.ema.samples:  # one prediction costs no more than a loss
            moments = _moments(_predicted(state.ema, batch), batch.hr, moments)
    line = {f"val_{name}": value for name, value in totals.items()}
    if moments is not None:
        line["val_pcc"] = _mean_pcc(moments)
    run.log({"step": state.step, **line, "seconds": round(state.seconds, 3)})
    loss = totals["loss"]
    if math.isfinite(loss) and (state.best is None or loss < state.best):
        state.best, state.best_step = loss, state.step
        state.best_weights = {key: tensor.clone() for key, tensor in state.ema.state_dict().items()}
    shown = f", PCC {line['val_pcc']:.3f}" if "val_pcc" in line else ""
    label = f"step {state.step}/{job.config.steps}, validation {loss:.4f}{shown}"
    progress(state.step, job.config.steps, label)


def _predicted(method: Method, batch: Batch) -> torch.Tensor:
    """Expected counts per bin (b, g, H, W) of a method that needs no sampling for them."""
    features = method.condition(batch)
    if method.knows_mean:
        return method.mean(batch, features)
    noise = TileNoise(Noise(0), tuple((0, 0) for _ in range(len(batch))))
    return method.predict(batch, noise, features, method.draw(batch, features, noise))


def _moments(predicted: torch.Tensor, true: torch.Tensor, before: torch.Tensor | None) -> torch.Tensor:
    """Sums (6, g) that correlations are made of: n, x, y, xx, yy, xy."""
    x, y = (maps.transpose(0, 1).flatten(1).cpu().double() for maps in (predicted, true))  # (g, b H W)
    sums = [torch.full((len(x),), float(x.shape[1])), *(each.sum(1) for each in (x, y, x * x, y * y, x * y))]
    now = torch.stack([each.double() for each in sums])
    return now if before is None else before + now


def _mean_pcc(moments: torch.Tensor) -> float:
    """Mean Pearson correlation over the genes that vary; 0 if none does."""
    n, x, y, xx, yy, xy = moments
    spread = ((xx - x * x / n).clamp_min(0) * (yy - y * y / n).clamp_min(0)).sqrt()
    varies = spread > 1e-12
    return float(((xy - x * y / n)[varies] / spread[varies]).mean()) if bool(varies.any()) else 0.0


def _save_model(job: Job, state: State, output: Path, provenance: dict | None) -> None:
    """Write the running mean that was asked for. No date and no duration: the same run gives the same file."""
    best = job.config.select == "best" and bool(state.best_weights)
    if best:
        state.ema.load_state_dict(state.best_weights)
    state.ema.finish(batch.to(job.device) for batch in job.tiles.validation_batches(job.config.batch))
    record = {
        "sections": job.settings["sections"],
        "regions": job.settings["regions"],
        "val": job.settings["val"],
        "gaps_lr": job.tiles.gaps_lr,
        "tiles": job.tiles.count,
        "train": job.settings["train"],
        "seed": job.seed,
        "device": job.device.type,
        "step": state.best_step if best else state.step,
        "validation_loss": state.best if best else None,
        **(provenance or {}),
    }
    checkpoint.save(output, state.ema, job.name, record, job.config.storage)
