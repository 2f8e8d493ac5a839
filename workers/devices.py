"""Devices as the command line names them: cpu, cuda, cuda:N."""

from __future__ import annotations

import re

from ..messages.errors import SettingsError

_CUDA = re.compile(r"cuda(?::(\d{1,3}))?")


def index_of(device: str) -> int | None:
    """The GPU's index ("cuda" is GPU 0), or None for "cpu"; SettingsError for anything else."""
    if device == "cpu":
        return None
    found = _CUDA.fullmatch(device)
    if found is None:
        raise SettingsError(f"device {device!r}: expected cpu, cuda or cuda:N")
    return int(found[1] or 0)


def resolve(device: str, gpus: int) -> str:
    """The device with its index, on a machine where torch sees `gpus` GPUs; SettingsError if it is
    not there, with those that are."""
    index = index_of(device)
    if index is None:
        return device
    if not gpus:
        raise SettingsError(
            f"device {device!r}: torch sees no GPU here; use --device cpu, "
            "or let `sparsecast doctor` say why"
        )
    if index >= gpus:
        there = "cuda:0" if gpus == 1 else f"cuda:0 to cuda:{gpus - 1}"
        raise SettingsError(f"device {device!r} is not there: torch sees {there}")
    return f"cuda:{index}"


def several(text: str) -> tuple[str, ...]:
    """One device, or two with a comma between; none for "auto"; SettingsError for anything else."""
    if text == "auto":
        return ()
    devices = tuple(part.strip() for part in text.split(","))
    if len(devices) > 2:
        raise SettingsError(f"device {text!r}: one, or two with a comma between")
    for device in devices:
        index_of(device)
    return devices


def count() -> int:
    """How many GPUs torch sees. Imports torch; makes no CUDA context."""
    import torch

    return torch.cuda.device_count()
