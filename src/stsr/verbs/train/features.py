"""Patch features of the training sections, and the settings of the method that follow from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from stsr.errors import UsageError
from stsr.features.cache import Caller, section_features
from stsr.features.files import feature_files
from stsr.methods.method import Method
from stsr.progress import Progress
from stsr.signals import interruptible
from stsr.store.parts import FeatureMap
from stsr.store.section import Section


@dataclass(frozen=True)
class TrainingFeatures:
    """Features of all sections; nothing for methods that read none."""

    maps: dict[str, FeatureMap] = field(default_factory=dict)
    """{section name: features}."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Of the method."""
    record: dict[str, Any] = field(default_factory=dict)
    """For the checkpoint, JSON-able."""


def read_features(
    sections: Sequence[Section],
    paths: Sequence[str | Path],
    method: type[Method],
    *,
    device: torch.device,
    overwrite: bool,
    compute: bool,
    progress: Progress,
) -> TrainingFeatures:
    """Get the features of all sections from their caches, or compute them; parameters are those of `stsr.train`.

    Raises
    ------
    UsageError
        If the method reads no features, or the files do not match the sections.
    StsrError
        As `stsr.features.cache.section_features`.
    """
    if not paths:
        return TrainingFeatures()
    if "features" not in {each.name for each in fields(method.Config)}:
        raise UsageError("this method reads no features; leave out --features, or choose another --method")
    files = feature_files(paths, sections)
    maps: dict[str, FeatureMap] = {}
    channels, pixel_um = 0, None  # those of the first section hold for all
    with interruptible() as interruption:
        for section, file in zip(sections, files, strict=True):
            found = section_features(
                section,
                file,
                device=device,
                channels=channels,
                pixel_um=pixel_um,
                overwrite=overwrite,
                compute=compute,
                caller=Caller(progress, interruption=interruption),
            )
            maps[section.name] = found
            channels, pixel_um = found.channels, found.pixel_um
    named = {file.digest: file.record() for file in files}
    record = {
        "kind": files[0].kind,
        "channels": channels,
        "features_um": pixel_um,
        "files": [*named.values()],
    }
    return TrainingFeatures(maps, {"method.features": channels, "method.features_um": pixel_um}, record)


def check_settings(config: Any, cached: TrainingFeatures) -> None:
    """Refuse settings of the method that contradict the features.

    Raises
    ------
    UsageError
        Names the setting.
    """
    if getattr(config, "features", 0) and not cached.maps:
        raise UsageError(f"features = {config.features} needs the features; add --features FILE")
    for key, value in cached.settings.items():
        name = key.removeprefix("method.")
        if getattr(config, name) != value:
            raise UsageError(
                f"{name} = {getattr(config, name)} contradicts the features, which have {value:g}; leave it out"
            )
