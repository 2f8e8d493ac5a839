"""The seam to an inference engine: what a replica asks of it, so that any engine fits.

`ModuleEngine` is the plain one, around a module whose owner computes inside the guard;
`huggingface` has one that generates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, Protocol

from ..messages.rollouts import Generate, Sample
from ..pipeline.delta import Lookup
from .guard import Guard

if TYPE_CHECKING:
    import torch

#: abort: end running requests now, with the tokens they have. wait: let them finish, start none.
#: keep: freeze them where they are until resume().
PauseMode = Literal["abort", "wait", "keep"]


class Engine(Protocol):
    """Weights that a replica patches in place, and the engine that computes with them.

    The replica calls tensors() and after_apply() on one thread of its own, never on the event
    loop's, and guard() on any. An engine may compute on any thread, but only inside
    guard().reading().
    """

    def tensors(self) -> Mapping[str, torch.Tensor]:
        """The live weights by name, looked up anew in every call (offloading moves storage).

        Names, dtypes and shapes are the trainer's manifest and never change; tied tensors come
        once. Called inside the guard whenever contents are read or written; the caller writes
        through what it gets, so views of the real storage, never copies.
        """

    def guard(self) -> Guard:
        """The one guard of these weights: the same object in every call."""

    def pause(self, mode: PauseMode, *, timeout_s: float = 30.0) -> None:
        """Stop generating, in this manner; requests that come meanwhile start after resume().

        Returns when no forward runs (keep) or no request (abort, wait), or raises WaitTimeout and
        stays paused. Any thread but a generating one, never inside the guard. Idempotent.
        """

    def resume(self) -> None:
        """Generate again. Any thread. Idempotent."""

    def after_apply(self, version: int, changed: Sequence[str]) -> None:
        """The weights now hold `version`; these tensors changed.

        Called inside writing(), before the version flips and before any forward of it: drop or
        rebuild here whatever was derived from the old weights (prefix caches, fused or quantised
        copies). Must not enter the guard. An exception makes the replica torn.
        """


class Generator(Protocol):
    """The generating side of an engine."""

    def generate(self, request: Generate, *, cancelled: Callable[[], bool]) -> list[Sample]:
        """Answer each prompt `request.samples` times, in the order of the prompts.

        Blocks; called on one generation thread, one request at a time. Enters the guard by itself,
        for as short as it can, and records the version of every token in the samples' spans
        (-1: the weights' version was not known). Asks `cancelled` between tokens and whenever it
        waits; once true, it ends soon, with finish "aborted" ("stop" and "length" are the others).
        `worker` and `step` of the samples are the caller's to fill. EngineError for a request that
        this engine cannot answer, ReplicaTorn or WaitTimeout if the guard does not let it in.
        """


class ModuleEngine:
    """The plain engine: a module (or a mapping of tensors) whose owner computes inside the guard.

    pause() and resume() have nothing to stop here: the owner's own reading() blocks do that.
    """

    def __init__(
        self,
        model: torch.nn.Module | Mapping[str, torch.Tensor],
        *,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        rename: Callable[[str], str] | Mapping[str, str] | None = None,
    ) -> None:
        self._lookup = Lookup(model, include, exclude, rename)
        self._guard = Guard()

    def tensors(self) -> Mapping[str, torch.Tensor]:
        """The model's tensors by name, looked up anew."""
        return self._lookup.tensors()

    def guard(self) -> Guard:
        """The guard that the owner's forwards run in."""
        return self._guard

    def pause(self, mode: PauseMode, *, timeout_s: float = 30.0) -> None:
        """Nothing runs here by itself."""

    def resume(self) -> None:
        """Nothing runs here by itself."""

    def after_apply(self, version: int, changed: Sequence[str]) -> None:
        """A module keeps nothing derived from its weights."""
