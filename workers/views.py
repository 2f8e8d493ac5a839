"""What a trainer publishes in place of its own tensors: a function of them, say quantised ones."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping

import torch

from ..messages.errors import SettingsError
from ..pipeline.delta import named_tensors
from ..pipeline.delta.bits import quiet
from .streams import own

#: From the trainer's tensors by name to those that are published.
View = Callable[[Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]]


def viewed(view: View, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a view makes of a trainer's tensors, as named_tensors() gives it.

    What it gives is to be read in the order of this thread's current streams, from any memory: it
    may be let go of once that is queued. SettingsError if it is no mapping, UnsupportedTensor, and
    whatever the view itself raises.
    """
    found = named_tensors(called(view, tensors))
    # A view may have made them on streams of its own, whose allocator would give their memory out
    # again before the diff has read it.
    own(*found.values())
    return found


def called(view: View, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """What a view gives, as it is (SettingsError if it is no mapping).

    The view is called on this thread and its devices' current streams, without autograd, inference
    mode or autocast.
    """
    with contextlib.ExitStack() as entered:
        entered.enter_context(quiet())
        # publish() may be called under autocast, entering never is: the same weights would give
        # other bits.
        for kind in sorted({tensor.device.type for tensor in tensors.values()}):
            entered.enter_context(torch.autocast(kind, enabled=False))
        given = view(tensors)
    if not isinstance(given, Mapping):
        raise SettingsError(
            f"the view returned a {type(given).__name__}: it has to return a mapping of names to "
            "tensors, those that the workers hold"
        )
    return given
