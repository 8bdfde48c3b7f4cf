"""The training loop: steps, learning rate, averaged weights, log and state."""

from __future__ import annotations

import copy
import math
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

from stsr import checkpoint
from stsr.errors import StsrError
from stsr.methods.batch import Batch
from stsr.methods.method import Method, channels_last
from stsr.progress import Progress
from stsr.signals import Interruption
from stsr.verbs.train.config import TrainConfig
from stsr.verbs.train.job import TrainingJob
from stsr.verbs.train.run_folder import RunFolder, State
from stsr.verbs.train.validation import validate


def training_loop(
    job: TrainingJob, folder: RunFolder, state: State, interruption: Interruption, progress: Progress
) -> None:
    """Train until the last step or a signal.

    Raises
    ------
    StsrError
        If the loss becomes NaN or infinite.
    Interrupted
        After a signal, once the state is saved.
    """
    config = job.config
    saved = started = time.monotonic()
    before = state.seconds
    for step, batch in batches_of(job, state.step, config.steps):
        terms = training_step(job, state, batch, step)
        state.step = step + 1
        state.seconds = before + time.monotonic() - started
        _accumulate(state, terms)
        last = state.step == config.steps
        if state.step % config.log_every == 0 or last:
            _log(job, folder, state, progress)
        if state.step % config.validate_every == 0 or last:
            validate(job, folder, state, progress)
        due = state.step % config.save_every == 0 or time.monotonic() - saved > config.save_seconds
        if due or last or interruption.requested:
            state.save(folder.state_path)
            saved = time.monotonic()
        if not last:
            interruption.stop(
                f"stopped after step {state.step} of {config.steps}; run the same command again to resume"
            )


def initial_state(job: TrainingJob) -> State:
    """Network, averaged weights and optimiser at step 0."""
    torch.manual_seed(job.number("weights", 0))
    method = job.method(job.method_config, job.tiles.panel, job.tiles.reference)
    if job.init is not None:
        checkpoint.start_from(method, job.init)
        method.reference.copy_(torch.from_numpy(job.tiles.reference))
    method = channels_last(method.to(job.device)).train()
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


def batches_of(job: TrainingJob, first: int, last: int) -> Iterator[tuple[int, Batch]]:
    """Yield (step, batch on the device) for steps ``first`` to ``last - 1``, prepared ahead in a thread."""

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


def training_step(job: TrainingJob, state: State, batch: Batch, step: int) -> dict[str, torch.Tensor]:
    """Take one step of the optimiser and return the terms of the loss."""
    config = job.config
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(config, step)
    torch.manual_seed(job.number("dropout", step))  # nn.Dropout takes no generator
    with job.autocast():
        batch = state.method.completed(batch)
        terms = state.method.loss(batch, step / max(config.steps - 1, 1), job.generator("loss", step))
    state.optimizer.zero_grad(set_to_none=True)
    terms["loss"].backward()
    if config.grad_clip:
        nn.utils.clip_grad_norm_(state.method.parameters(), config.grad_clip)
    state.optimizer.step()
    _average(state.ema, state.method, ema_decay(config, step))
    return {name: term.detach() for name, term in terms.items()}


def learning_rate(config: TrainConfig, step: int) -> float:
    """Learning rate of AdamW: a linear rise, then half a cosine."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    part = (step - config.warmup) / max(config.steps - config.warmup, 1)
    cosine = (1 + math.cos(math.pi * min(part, 1.0))) / 2
    return config.learning_rate * (config.final_rate + (1 - config.final_rate) * cosine)


def ema_decay(config: TrainConfig, step: int) -> float:
    """Decay of the averaged weights, smaller at the start so that the initial weights are soon forgotten."""
    return min(config.ema_decay, (1 + step) / (10 + step))


@torch.no_grad()
def _average(ema: Method, method: Method, decay: float) -> None:
    """Update the averaged weights; buffers are copied."""
    torch._foreach_lerp_(list(ema.parameters()), list(method.parameters()), 1 - decay)
    for mean, value in zip(ema.buffers(), method.buffers(), strict=True):
        mean.copy_(value)


def _accumulate(state: State, terms: dict[str, torch.Tensor]) -> None:
    """Add to the sums since the last log line, without waiting for the device."""
    terms = {**terms, "steps": torch.ones(())}
    state.pending = {name: state.pending.get(name, 0) + term.float() for name, term in terms.items()}


def _log(job: TrainingJob, folder: RunFolder, state: State, progress: Progress) -> None:
    """Log the mean terms since the last line."""
    count = float(state.pending["steps"])
    means = {name: float(total) / count for name, total in state.pending.items() if name != "steps"}
    state.pending = {}
    if not math.isfinite(means["loss"]):
        lower = job.config.learning_rate / 3
        raise StsrError(
            f"the loss became NaN or infinite by step {state.step}; "
            f"train again with a lower learning rate: --overwrite --set learning_rate={lower:.1g}"
        )
    rate = learning_rate(job.config, state.step - 1)
    folder.log({"step": state.step, **means, "lr": rate, "seconds": round(state.seconds, 3)})
    known = "" if state.best is None else f", best validation {state.best:.4f}"
    label = f"step {state.step}/{job.config.steps}, loss {means['loss']:.4f}{known}"
    progress(state.step, job.config.steps, label)
