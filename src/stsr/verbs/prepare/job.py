"""The options of one ``stsr prepare``, checked, and its command line for the provenance."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from stsr.errors import UsageError
from stsr.geometry.grid import LR_UM, bins_per_lr
from stsr.platforms.source import Options

SPOT_KINDS = ("square", "visium", "bins")
_HD_BINS_UM = (8.0, 16.0)  # that do not nest in 100 um
_SPACE_RANGER = re.compile(r"^(outs|binned_outputs|square_\d{3}um)$")
_FINEST_UM = 1.0  # bin size; subcellular, and a slide still fits in memory
_UM_PER_PX = (0.01, 1000)


@dataclass(frozen=True, kw_only=True)
class PrepareJob:
    """Input, output and options of one run, as in `stsr.prepare`; ``options`` are those of the platform's reader.

    Raises
    ------
    UsageError
        If an option is impossible, or the output exists and must not be replaced.
    """

    path: Path
    output: Path
    options: Options = field(default_factory=Options)
    spots: str | None = None
    bin_um: float = 10.0
    refine: bool = True
    seed: int = 0
    organ: str | None = None
    overwrite: bool = False

    def __post_init__(self):
        self._check_options()
        self._check_output()

    @property
    def command(self) -> str:
        """The command line: every option that differs from its default, files by their name alone."""
        options = self.options
        words = ["stsr", "prepare", self.path.name]
        if self.output != default_output(self.path):
            words += ["--output", self.output.name]
        if self.spots is not None:
            words += ["--spots", self.spots]
        words += ["--bin-um", f"{self.bin_um:g}", "--min-qv", f"{options.min_qv:g}"]
        if options.um_per_px is not None:
            words += ["--um-per-px", str(options.um_per_px)]
        if options.he is not None:
            words += ["--he", options.he.name]
        if options.alignment is not None:
            words += ["--alignment", options.alignment.name]
        if options.genes:
            words += ["--genes", ",".join(options.genes)]
        if self.seed:
            words += ["--seed", str(self.seed)]
        if self.organ:
            words += ["--organ", self.organ]
        if not self.refine:
            words.append("--no-refine")
        if self.overwrite:
            words.append("--overwrite")
        return shlex.join(words)

    def _check_options(self) -> None:
        options, bin_um = self.options, self.bin_um
        if self.spots not in (None, *SPOT_KINDS):
            raise UsageError(
                f"spots cannot be simulated as {self.spots!r}; choose --spots square, visium or bins"
            )
        if bin_um < _FINEST_UM:
            raise UsageError(f"bins of {bin_um:g} um are too fine; choose 10, 20, 25 or 50 with --bin-um")
        self.check_nests(*_HD_BINS_UM)
        um_per_px = options.um_per_px
        if um_per_px is not None and not _UM_PER_PX[0] <= um_per_px <= _UM_PER_PX[1]:
            raise UsageError(
                f"a pixel size of {um_per_px:g} um is implausible; give --um-per-px in um per pixel"
            )
        if not 0 <= options.min_qv < np.inf:
            raise UsageError(f"--min-qv must be 0 or more (quality values reach 40), not {options.min_qv:g}")
        for file, option in ((options.he, "--he"), (options.alignment, "--alignment")):
            if file is not None and not file.is_file():
                raise UsageError(f"there is no file {file}; check {option}")

    def check_nests(self, *others_um: float) -> None:
        """Refuse bins that do not nest in 100 um, other than those given.

        Raises
        ------
        UsageError
            If they do not.
        """
        if self.bin_um in others_um:
            return
        try:
            bins_per_lr(self.bin_um, LR_UM)
        except ValueError:
            raise UsageError(
                f"{LR_UM:g} um is not a multiple of bins of {self.bin_um:g} um; choose --bin-um 10, 20, 25 or 50 (or, "
                f"for Visium HD, 8 or 16)"
            ) from None

    def _check_output(self) -> None:
        path, output = self.path, self.output
        if output.exists() and path.exists() and output.resolve() == path.resolve():
            raise UsageError(f"{output} is the input itself; choose another path with --output")
        if output.exists() and not self.overwrite:
            raise UsageError(
                f"{output} exists; add --overwrite to replace it, or choose another path with --output"
            )


def default_output(path: Path) -> Path:
    """The default store: the name of the input, in the working directory."""
    folder = path.resolve()
    while _SPACE_RANGER.match(folder.name):  # every run has folders of these names
        folder = folder.parent
    return Path(folder.name.removesuffix(".zarr").removesuffix(".h5ad") + ".zarr")
