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
    if spec.kind == "gloo":
        # Late: a torch built without gloo has no such module to import.
        from .gloo import GlooWindow

        return GlooWindow(spec, courier)
    return BusWindow(spec, courier)


def available_kinds(device: str = "cpu") -> tuple[WindowKind, ...]:
    """The kinds of window that this process can open for tensors on `device`, best first."""
    import torch.distributed

    if torch.distributed.is_available() and torch.distributed.is_gloo_available():
        return ("gloo", "bus")
    return ("bus",)
