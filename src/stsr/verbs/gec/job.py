"""What `stsr gec` was asked to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stsr.errors import UsageError
from stsr.store.places import Region

PLACES = ("bin", "cell")
"""What genes are correlated over."""
TOP = 100


@dataclass(frozen=True, kw_only=True)
class GecJob:
    """Fields are parameters of `stsr.gec`. UsageError if one is out of range or two contradict each other."""

    source: str | None = None
    per: str = "bin"
    genes: Sequence[str] | None = None
    bin_um: float | None = None
    region: Region | None = None
    truth: str | None = None
    beside: Sequence[str] | None = None
    denoise_truth: bool = False
    lags: Sequence[tuple[str, str]] = ()
    top: int = TOP
    name: str | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.per not in PLACES:
            raise UsageError(f"--per {self.per} is unknown; choose one of {', '.join(PLACES)}")
        if self.per == "cell" and self.bin_um is not None:
            raise UsageError("--bin-um is for bins; leave it out with --per cell")
        if self.top < 1:
            raise UsageError(f"--top must be at least 1, not {self.top}")
        if self.truth is None and (self.denoise_truth or self.beside):
            option = "--denoise-truth" if self.denoise_truth else "--beside"
            raise UsageError(f"{option} needs a comparison; name the measured element, as in --truth hr_10um")
