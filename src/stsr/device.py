"""Choose the device that tensors live on."""

from __future__ import annotations

import torch

from stsr.errors import UsageError


def resolve_device(name: str = "auto") -> torch.device:
    """Find a device by name.

    Parameters
    ----------
    name
        ``"auto"`` (cuda if available, else mps, else cpu), ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"``.

    Raises
    ------
    UsageError
        If the device is not available.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise UsageError(f"no device is called {name!r}; choose auto, cpu, cuda, cuda:N or mps with --device")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            have = f"{count} CUDA device{'s' if count > 1 else ''}" if count else "no CUDA device"
            raise UsageError(f"{name} is not available, this machine has {have}; use --device auto")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError("mps is not available, this machine has no Apple GPU; use --device auto")
    return device
