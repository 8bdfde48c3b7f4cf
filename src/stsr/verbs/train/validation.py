"""Validation during training: loss and correlation of the averaged weights on the validation tiles."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from stsr.diffusion.noise import Noise, TileNoise
from stsr.methods.batch import Batch
from stsr.methods.method import Method
from stsr.progress import Progress
from stsr.verbs.train.job import TrainingJob
from stsr.verbs.train.run_folder import RunFolder, State


@torch.no_grad()
def validate(job: TrainingJob, folder: RunFolder, state: State, progress: Progress) -> None:
    """Log the validation loss, with the same random numbers each time, and keep the best weights."""
    if not job.tiles.validation_count:
        return
    totals: dict[str, float] = {}
    moments = None
    for number, batch in enumerate(job.tiles.validation_batches(job.config.batch)):
        batch = state.ema.completed(batch.to(job.device))
        with job.autocast():
            terms = state.ema.loss(batch, 1.0, job.generator("validation", number))
        for name, term in terms.items():
            totals[name] = totals.get(name, 0.0) + float(term) * len(batch) / job.tiles.validation_count
        if state.ema.knows_mean or not state.ema.samples:  # one prediction costs no more than a loss
            for compared in _compared(_predicted(state.ema, batch), batch):
                moments = add_moments(*compared, moments)
    line = {f"val_{name}": value for name, value in totals.items()}
    if moments is not None:
        line["val_pcc"] = mean_pcc(moments)
    folder.log({"step": state.step, **line, "seconds": round(state.seconds, 3)})
    loss = totals["loss"]
    if math.isfinite(loss) and (state.best is None or loss < state.best):
        state.best, state.best_step = loss, state.step
        state.best_weights = {key: tensor.clone() for key, tensor in state.ema.state_dict().items()}
    shown = f", PCC {line['val_pcc']:.3f}" if "val_pcc" in line else ""
    label = f"step {state.step}/{job.config.steps}, validation {loss:.4f}{shown}"
    progress(state.step, job.config.steps, label)


def _compared(
    predicted: torch.Tensor, batch: Batch
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Predicted and measured counts, and which genes are known, for `add_moments`: per bin, or per validation spot."""
    targets = batch.targets
    if targets is None:
        yield predicted, batch.truth(), batch.known()
        return
    sums = targets.sums(predicted)  # (b, g, s)
    for tile in range(len(batch)):
        chosen = targets.weight[tile] > 0
        both = (values[tile : tile + 1, :, chosen, None] for values in (sums, targets.counts))
        yield (*both, batch.known()[tile : tile + 1])  # type: ignore[misc]  # two values


def _predicted(method: Method, batch: Batch) -> torch.Tensor:
    """Expected counts per bin (b, g, H, W) of a method that needs no sampling for them."""
    features = method.condition(batch)
    if method.knows_mean:
        return method.mean(batch, features)
    noise = TileNoise(Noise(0), tuple((0, 0) for _ in range(len(batch))))
    return method.predict(batch, noise, features, method.draw(batch, features, noise))


def add_moments(
    predicted: torch.Tensor, true: torch.Tensor, known: torch.Tensor, before: torch.Tensor | None
) -> torch.Tensor:
    """Add maps (b, g, H, W) to the sums (6, g) of n, x, y, xx, yy and xy, from which `mean_pcc` follows.

    ``known`` (b, g) is 0 for genes that were not measured in a tile, which are left out.
    """
    weight = known.cpu().double()
    x, y = (maps.flatten(2).cpu().double() for maps in (predicted, true))  # (b, g, H W)
    sums = [torch.full(weight.shape, float(x.shape[2]), dtype=torch.float64)]
    sums += [each.sum(2) for each in (x, y, x * x, y * y, x * y)]
    now = torch.stack([(each * weight).sum(0) for each in sums])
    return now if before is None else before + now


def mean_pcc(moments: torch.Tensor) -> float:
    """Mean Pearson correlation over measured genes with non-zero variance; 0 if there is none."""
    n, x, y, xx, yy, xy = moments
    n = n.clamp_min(1)
    spread = ((xx - x * x / n).clamp_min(0) * (yy - y * y / n).clamp_min(0)).sqrt()
    varies = spread > 1e-12
    return float(((xy - x * y / n)[varies] / spread[varies]).mean()) if bool(varies.any()) else 0.0
