"""Parameters, FLOPs, time and memory of one map of 256 x 256 bins of one gene: python tests/benchmarks/efficiency.py

Every method predicts a panel of `--genes` on one of its own tiles, on one core and random input, as `stsr.superres`
does: what depends on neither gene nor noise once per tile, then the mean, or samples of so many steps. A tile's cost is
multiplied by the tiles, overlap included, that superres lays over 26 x 26 low-resolution pixels (256 bins of 10 um are
25.6 of them), and by (256 / 260)^2. FLOPs are those of convolutions and matrix products, a multiply-add
counted as 2. Each method runs in its own process, to measure its peak memory. Prints markdown.

`--only c3diff.toml` and the like measure the presets in examples/; tiles of 2.6 mm with an image of 0.5 um take minutes
and many GB.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from stsr.checkpoint import default_weights, describe
from stsr.diffusion.noise import Noise, TileNoise
from stsr.geometry.grid import Grid
from stsr.methods import method_class
from stsr.methods.batch import Batch
from stsr.methods.method import Method, configured
from stsr.verbs.superres.tiles import plan
from stsr.verbs.train.config import read_config, resolve

SAMPLES, STEPS = 4, 8  # superres' defaults
MAP_BINS = 256
EXAMPLES = Path(__file__).parents[2] / "examples"
MODELS = ("unet", "corrdiff, packaged model", "c3diff", "diffst")
PRESETS = ("c3diff_small.toml", "diffst_small.toml", "c3diff.toml", "diffst.toml")
SPOT_COUNTS = 20.0  # per spot and gene
REFERENCE_ROWS = (
    "| C3-Diff's released code | 443 | - | - | - | 11,800 | about 300 | - |",
    "| Diff-ST's released code | 13.4 | - | - | - | - | - | - |",
)
"""What is reported of them; of how many steps, is not."""


def main() -> None:
    """Measure each model in its own process, then print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--genes", type=int, default=50, help="of the panel, predicted together")
    parser.add_argument("--only", choices=MODELS + PRESETS, nargs="+", default=MODELS)
    parser.add_argument("--one", choices=MODELS + PRESETS, help="measure this one here and print JSON")
    asked = parser.parse_args()
    if asked.one:
        torch.set_num_threads(1)
        print(json.dumps(measure(asked.one, asked.genes)))
        return
    found = {}
    for name in asked.only:
        print(f"measuring {name}", file=sys.stderr, flush=True)
        command = [sys.executable, __file__, "--one", name, "--genes", str(asked.genes)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            print(f"{name} could not be measured (exit {done.returncode})", file=sys.stderr)
        else:
            found[name] = json.loads(done.stdout)
    print_tables(found, asked.genes)


def measure(name: str, genes: int) -> dict:
    """Costs of a model: FLOPs and seconds of a 256 x 256 map, and bytes."""
    method = make(name, genes)
    before = peak_bytes()
    batch = random_batch(method)
    one = batch.of_genes(torch.arange(1))
    noise = TileNoise(Noise(0), ((0, 0),))
    share = map_share(method)
    found = {
        "parameters": sum(parameter.numel() for parameter in method.parameters()),
        "tile_bins": method.requirements.tile_lr * method.requirements.per_lr,
        "share": share,
    }
    mean_map(method, batch, one)  # finds its kernels
    if method.knows_mean or not method.samples:
        found["mean_seconds"] = share * seconds(lambda: mean_map(method, batch, batch)) / genes
    if method.samples:
        sampled = sampling_only(method)
        sampled.sampling = replace(sampled.sampling, steps=STEPS)
        features = sampled.condition(batch)
        once = seconds(lambda: mean_map(sampled, batch, batch))
        sample = seconds(lambda: draw_map(sampled, batch, batch, noise, features))
        found["sampled_seconds"] = share * (once + SAMPLES * sample) / genes
    found["bytes"] = peak_bytes() - before
    found["together"] = split(method, batch, batch, noise, share)
    found["alone"] = split(method, batch, one, noise, share)
    return found


def make(name: str, genes: int) -> Method:
    """A model with new weights and a panel of so many genes."""
    panel = tuple(f"gene {number}" for number in range(genes))
    method, _, rest = name.partition(",")
    if name.endswith(".toml"):
        chosen = method_class(name.removesuffix(".toml").removesuffix("_small"))
        config, _ = resolve(chosen, read_config(EXAMPLES / name), [])
    else:
        chosen = method_class(method)
        config = configured(chosen.Config, describe(default_weights())["config"] if rest else {})
    return chosen(config, panel).eval().to(memory_format=torch.channels_last)


def sampling_only(method: Method) -> Method:
    """The same as in the papers: the mean is that of samples."""
    if "mean_share" not in {field.name for field in fields(method.config)}:
        return method
    config = replace(method.config, mean_share=0.0)
    return type(method)(config, method.panel).eval().to(memory_format=torch.channels_last)


def random_batch(method: Method) -> Batch:
    """One of the method's tiles."""
    needs, genes = method.requirements, len(method.panel)
    generator = torch.Generator().manual_seed(0)
    pixels = needs.tile_lr * needs.image_per_lr
    return Batch(
        image=torch.randint(256, (1, 3, pixels, pixels), generator=generator, dtype=torch.uint8),
        lr=torch.poisson(torch.full((1, genes, needs.tile_lr, needs.tile_lr), SPOT_COUNTS), generator),
        lr_mask=torch.ones(1, 1, needs.tile_lr, needs.tile_lr),
        has_lr=torch.ones(1, dtype=torch.bool),
        lr_mean=torch.full((1, genes), SPOT_COUNTS),
        genes=torch.eye(genes),
        names=method.panel,
    )


def map_share(method: Method) -> float:
    """Tiles that a map of 256 x 256 bins takes, overlap included."""
    needs = method.requirements
    side = math.ceil(MAP_BINS / needs.per_lr) * needs.per_lr
    bands = plan(Grid(0.0, 0.0, needs.bin_um, side, side), needs.tile_lr, needs.overlap_lr, needs.lr_um)
    return sum(map(len, bands)) * (MAP_BINS / side) ** 2


def split(method: Method, panel: Batch, genes: Batch, noise: TileNoise, share: float) -> dict[str, float]:
    """FLOPs of a map of all ``genes``: `condition`, then the `mean`, or each `sample` beside each `step` of it."""
    sampled = sampling_only(method)
    found = {"condition": flops(lambda: sampled.condition(panel))}
    if method.knows_mean or not method.samples:
        found["mean"] = flops(lambda: mean_map(method, panel, genes)) - found["condition"]
    if method.samples:
        features = sampled.condition(panel)
        walks = []
        for steps in (1, 2):
            sampled.sampling = replace(sampled.sampling, steps=steps)
            walks.append(flops(lambda: draw_map(sampled, panel, genes, noise, features)))
        found["step"] = walks[1] - walks[0]
        found["sample"] = walks[0] - found["step"]
        found["sampled"] = found["condition"] + SAMPLES * (found["sample"] + STEPS * found["step"])
        found["sampled"] += found["mean"] if sampled.knows_mean else 0
    return {part: share * value for part, value in found.items()}


@torch.no_grad()
def mean_map(method: Method, panel: Batch, genes: Batch) -> None:
    """Everything up to the expected counts, of methods that need no samples for them."""
    features = method.condition(panel)
    if method.knows_mean:
        method.mean(genes, features)
    elif not method.samples:
        method.predict(genes, None, features)


@torch.no_grad()
def draw_map(method: Method, panel: Batch, genes: Batch, noise: TileNoise, features) -> None:
    """One sample, given the tile's features."""
    drawn = method.draw(panel, features, noise)
    if method.knows_mean:
        side = method.requirements.tile_lr * method.requirements.per_lr
        method.vary(genes, torch.ones(1, len(genes.names), side, side), drawn)
    else:
        method.predict(genes, noise, features, drawn)


def flops(work: Callable[[], object]) -> int:
    """Of convolutions and matrix products; of attention by its plain kernel, as the counter lacks the CPU's."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def seconds(work: Callable[[], object]) -> float:
    """CPU time on one thread, which other processes hardly change."""
    began = time.process_time()
    work()
    return time.process_time() - began


def peak_bytes() -> int:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# --------------------------------------------------------------------------------------------------- the tables


def print_tables(found: dict[str, dict], genes: int) -> None:
    """Markdown: costs of the parts and of a map."""
    print(f"**Parts**, GFLOP of maps of {MAP_BINS} x {MAP_BINS} bins\n")
    print("| method | tiles | once for all genes | per gene: mean | a sample, beside its steps | a step |")
    print("|---|---|---|---|---|---|")
    for name, one in found.items():
        parts = one["together"]
        cells = [_giga(parts["condition"])] + [_giga(parts.get(p), genes) for p in ("mean", "sample", "step")]
        print(f"| {name} | {one['share']:.1f} of {one['tile_bins']}² | " + " | ".join(cells) + " |")
    print(f"\n**One map of one gene**, in GFLOP: of {genes} predicted together, or alone\n")
    drawn = f"{SAMPLES} samples x {STEPS} steps"
    print(
        f"| method | parameters, M | mean | mean, alone | {drawn} | {drawn}, alone | CPU s: mean; {drawn} | peak |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name, one in found.items():
        together, alone = one["together"], one["alone"]
        cells = [
            f"{one['parameters'] / 1e6:.2f}",
            _giga(_mean_total(together), genes),
            _giga(_mean_total(alone)),
        ]
        cells += [_giga(together.get("sampled"), genes), _giga(alone.get("sampled"))]
        times = (one.get("mean_seconds"), one.get("sampled_seconds"))
        cells.append("; ".join("-" if time is None else f"{time:.3g}" for time in times))
        print(f"| {name} | " + " | ".join(cells) + f" | {one['bytes'] / 2**20:,.0f} MB |")
    print("\n".join(REFERENCE_ROWS))


def _mean_total(parts: dict[str, float]) -> float | None:
    return parts["condition"] + parts["mean"] if "mean" in parts else None


def _giga(value: float | None, genes: int = 1) -> str:
    if value is None:
        return "-"
    giga = value / genes / 1e9
    return f"{giga:,.0f}" if giga >= 100 else f"{giga:.3g}"


if __name__ == "__main__":
    main()
