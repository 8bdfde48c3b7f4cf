"""What `stsr celltype` was asked to do."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

from stsr.errors import UsageError

MIN_PROBABILITY = 0.3
MIN_COUNTS = 5.0


@dataclass(frozen=True, kw_only=True)
class CelltypeJob:
    """Fields are parameters of `stsr.celltype`. UsageError if one is out of range or two contradict each other."""

    markers: str | Path | None = None
    reference: str | Path | None = None
    label_key: str | None = None
    source: str | None = None
    per: str = "bin"
    min_probability: float = MIN_PROBABILITY
    min_counts: float = MIN_COUNTS
    draws: int = 10
    resolution: float = 1.0
    name: str | None = None
    seed: int = 0
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.markers is not None and self.reference is not None:
            raise UsageError("--markers and --reference cannot be combined; give one of them")
        if self.label_key is not None and self.reference is None:
            raise UsageError("--label-key names a column of the reference; add --reference FILE.h5ad")
        if self.per not in ("bin", "cell"):
            raise UsageError(f"--per is bin or cell, not {self.per!r}")
        if not 0 <= self.min_probability <= 1:
            raise UsageError(f"--min-probability is from 0 to 1, not {self.min_probability:g}")
        if not 0 <= self.min_counts < math.inf:
            raise UsageError(f"--min-counts is 0 or more, not {self.min_counts:g}")
        if self.draws < 0:
            raise UsageError(f"--draws is 0 or more, not {self.draws}")
        if not 0 < self.resolution < math.inf:
            raise UsageError(f"--resolution is above 0, not {self.resolution:g}")

    def signature_source(self) -> dict:
        """Where signatures come from, for the provenance."""
        file = self.reference if self.markers is None else self.markers
        if file is None:
            return {"method": "clusters", "resolution": self.resolution}
        path = Path(file)
        source = {
            "method": "markers" if self.reference is None else "reference",
            "file": path.name,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest()[:12],
        }
        return source | ({"label_key": self.label_key} if self.label_key else {})
