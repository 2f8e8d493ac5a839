"""The data plane: how one payload travels from the trainer to the members of a window."""

from __future__ import annotations

import importlib.util

from ...messages.control import WindowKind
from ...messages.errors import WindowUnavailable
from .base import Courier, Window, WindowFactory, WindowSpec

__all__ = ["Courier", "Window", "WindowFactory", "WindowSpec", "available_kinds", "open_kind"]


def open_kind(spec: WindowSpec, courier: Courier) -> Window:
    """Make the window of `spec.kind` (a WindowFactory); WindowUnavailable if there is none here."""
    match spec.kind:
        case "gloo" if _has_gloo():
            from .gloo import GlooWindow

            return GlooWindow(spec, courier)
        case _:
            raise WindowUnavailable(
                spec.label, f"no {spec.kind} window here, only {', '.join(available_kinds())}"
            )


def available_kinds(device: str = "cpu") -> tuple[WindowKind, ...]:
    """The kinds of window that this process can open for tensors on `device`, best first."""
    return ("gloo", "bus") if _has_gloo() else ("bus",)


def _has_gloo() -> bool:
    import torch.distributed

    return torch.distributed.is_available() and torch.distributed.is_gloo_available()
