"""Patch features for a run of superres: from the section's cache, or computed from the given file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from stsr.errors import StsrError, UsageError
from stsr.features.cache import Caller, section_features
from stsr.features.files import FeatureFile, feature_file
from stsr.progress import Progress, Report
from stsr.signals import interruptible
from stsr.store.parts import FeatureMap
from stsr.verbs.superres.job import SuperresJob


def with_features(
    job: SuperresJob, path: str | Path | None, *, overwrite: bool, progress: Progress, report: Report
) -> SuperresJob:
    """Add the features that the job's method reads.

    Parameters
    ----------
    job
        The job.
    path
        As ``features`` of `stsr.superres`.
    overwrite, progress, report
        As in `stsr.superres`.

    Raises
    ------
    UsageError
        If the method reads no features, or those of the file do not fit it.
    StsrError
        If they are neither cached nor given.
    Interrupted
        After a signal; what is done is kept for the same command.
    """
    needs = job.requirements
    if not needs.features:
        if path is not None:
            raise UsageError(f"the model {job.loaded.model} reads no features; leave out --features")
        return job
    found = _cached(job) if path is None else None
    if path is not None:
        with interruptible() as interruption:
            found = section_features(
                job.section,
                _checked(job, path),
                device=job.loaded.device,
                channels=needs.features,
                pixel_um=needs.features_um,
                overwrite=overwrite,
                caller=Caller(progress, report, interruption),
            )
    if found is None:
        name = _trained_on(job)
        raise StsrError(
            f"the model {job.loaded.model} reads features of {name}, which {job.section.path.name} does not have "
            f"yet; add --features FILE"
        )
    return replace(job, features=found, provenance={**job.provenance, "features": found.element})


def _cached(job: SuperresJob) -> FeatureMap | None:
    """Features of a file that the model was trained with."""
    for file in job.loaded.features.get("files", ()):
        found = job.section.features(file["digest"], job.requirements.features_um)
        if found is not None:
            return found
    return None


def _checked(job: SuperresJob, path: str | Path) -> FeatureFile:
    """The file, if it is not another encoder than that of the training."""
    file = feature_file(path, job.section)
    trained = job.loaded.features
    digests = [each["digest"] for each in trained.get("files", ())]
    if file.kind == "encoder" and trained.get("kind") == "encoder" and file.digest not in digests:
        raise UsageError(
            f"{file.path.name} is not the encoder that the model {job.loaded.model} was trained with; "
            f"give {_trained_on(job)} with the same config"
        )
    return file


def _trained_on(job: SuperresJob) -> str:
    files = job.loaded.features.get("files", ())
    if job.loaded.features.get("kind") != "encoder" or not files:
        return "an array (y, x, channels)"
    return files[0]["file"]
