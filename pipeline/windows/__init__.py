"""The data plane: how one payload travels from the trainer to the members of a window."""

from __future__ import annotations

from ...messages.control import WindowKind
from ...messages.errors import WindowUnavailable
from .base import Courier, Window, WindowFactory, WindowSpec
from .bus import BusWindow
from .gpus import gpu_identity

__all__ = [
    "BusWindow",
    "Courier",
    "Window",
    "WindowFactory",
    "WindowSpec",
    "available_kinds",
    "gpu_identity",
    "open_window",
]


def open_window(spec: WindowSpec, courier: Courier) -> Window:
    """Make the window of `spec.kind` (a WindowFactory); WindowUnavailable if there is none here."""
    kinds = available_kinds(spec.device)
    if spec.kind not in kinds:
        raise WindowUnavailable(
            spec.label, f"no {spec.kind} window here, only {' and '.join(kinds)}"
        )
    # Late: a torch built without gloo has no such module to import, and NCCL is optional.
    if spec.kind == "nccl":
        from .nccl import NcclWindow

        return NcclWindow(spec, courier)
    if spec.kind == "gloo":
        from .gloo import GlooWindow

        return GlooWindow(spec, courier)
    return BusWindow(spec, courier)


def available_kinds(device: str = "cpu") -> tuple[WindowKind, ...]:
    """The kinds of window that this process can open for tensors on `device`, best first.

    The first call for a CUDA device imports nccl4py; CUDA is not initialised.
    """
    import torch.distributed

    kinds: list[WindowKind] = ["bus"]
    if torch.distributed.is_available() and torch.distributed.is_gloo_available():
        kinds.insert(0, "gloo")
    if device.startswith("cuda"):
        from .nccl import probe

        if probe().available:
            kinds.insert(0, "nccl")
    return tuple(kinds)
