"""The trainer's face for synchronous code: Publisher. AsyncPublisher is in publishing.py."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Self, TypeVar

import torch

from ..messages.control import Tags
from ..messages.errors import Closed, LocalProtocolError, SettingsError
from ..messages.layout import Layout
from ..pipeline.core.policy import Policy
from ..pipeline.delta.tensors import Model
from .connect import LoopThread
from .contributor import Contributor
from .outgoing import ShadowPlace
from .publishing import NOT_OPEN, AsyncPublisher, AsyncUpdate, OnBusy, Resume
from .tiers import DEFAULT_LOG, LogSetting
from .updates import AtLeast, Made, Published, Report
from .views import View

__all__ = ["AsyncPublisher", "AsyncUpdate", "OnBusy", "Publisher", "Report", "Resume", "Update"]

T = TypeVar("T")


class Update(Made):
    """One published update, for synchronous callers."""

    def __init__(self, made: Published, publisher: Publisher) -> None:
        super().__init__(made)
        self._publisher = publisher

    def wait_applied(self, timeout_s: float = 30.0, at_least: AtLeast | None = None) -> Report:
        """Wait until all members, or `at_least` n, hold this version; at the timeout too, return.

        `at_least` None: as Policy.quorum says, which is "all" unless it is set.

        Raises only if the publisher was fenced, closed or broken, and on other ranks than the
        first, which alone hears from the workers.
        """
        inner = self._publisher._first("wait_applied()")
        return self._publisher._call(inner._wait_applied(self.version, timeout_s, at_least))


class Publisher:
    """AsyncPublisher for synchronous training loops: its event loop runs on a thread of its own.

    publish() finds what changed on the caller's thread and returns; all else goes on behind it.

    A trainer of several `ranks` (FSDP, tensor parallelism) makes one on each, with its `rank`, the
    same run and bus: all of them enter, publish() and leave, and each diffs its own shard. DTensors
    say by their placements what each rank holds; a `layout` says it for plain tensors. What
    publish() returns is of this rank's part; the first rank alone hears from the workers, and only
    it has wait_members() and wait_applied().
    """

    def __init__(
        self,
        model: Model,
        *,
        run: str,
        bus: str | None = None,
        dtype: torch.dtype | Mapping[str, torch.dtype] | None = None,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        rename: Callable[[str], str] | Mapping[str, str] | None = None,
        view: View | None = None,
        on_busy: OnBusy = "coalesce",
        device: str | None = None,
        shadow: ShadowPlace = "device",
        policy: Policy | None = None,
        log: LogSetting = DEFAULT_LOG,
        resume: Resume = "auto",
        linger_s: float = 10.0,
        rank: int = 0,
        ranks: int = 1,
        layout: Layout | None = None,
    ) -> None:
        if not 0 <= rank < ranks:
            raise SettingsError(
                f"rank {rank} of a trainer of {ranks} ranks: they are 0 … ranks - 1"
            )
        common: dict[str, Any] = {
            "run": run,
            "dtype": dtype,
            "include": include,
            "exclude": exclude,
            "rename": rename,
            "view": view,
            "layout": layout,
            "device": device,
            "shadow": shadow,
            "policy": policy,
            "log": log,
            "linger_s": linger_s,
        }
        self._inner: AsyncPublisher | Contributor
        if rank == 0:
            self._inner = AsyncPublisher(
                model, bus=bus, on_busy=on_busy, resume=resume, ranks=ranks, **common
            )
        elif bus is None:
            raise SettingsError(f"rank {rank} of the trainer needs bus=, the first rank's")
        else:
            self._inner = Contributor(model, bus=bus, rank=rank, **common)
        self._thread: LoopThread | None = None

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self) -> None:
        """Claim the run: RunBusy, BusUnavailable, CannotResume. Entering the context does this."""
        if self._thread is not None:
            return
        self._thread = LoopThread("sparsecast-publisher")
        try:
            self._call(self._inner.__aenter__())
        except BaseException:
            self._thread.stop()
            self._thread = None
            raise

    def close(self) -> None:
        """Let the log take what was published, then leave the run. Idempotent."""
        if self._thread is None:
            return
        thread, self._thread = self._thread, None
        try:
            thread.call(self._inner.close())
        finally:
            thread.stop()

    @property
    def run(self) -> str:
        """The run's name."""
        return self._inner.run

    @property
    def bus(self) -> str:
        """The URL of the bus."""
        return self._inner.bus

    @property
    def version(self) -> int:
        """The newest version that publish() has made, or the one that the run starts from."""
        return self._inner.version

    @property
    def window(self) -> str | None:
        """The kind of the open window, or None while none is open."""
        return self._first("window").window

    def publish(self, step: int | None = None, tags: Tags | None = None) -> Update:
        """Publish what changed since the last call; returns once the weights may change again.

        Never waits for workers or the bus (unless on_busy="wait"). `step` and `tags` travel in
        announcements, metrics and samples. Fenced, Closed, PublisherBusy, UnsupportedTensor,
        ManifestMismatch, and what a view raises: nothing was published.
        """
        return Update(self._inner._publish(step, tags), self)

    def rollback(self, version: int, step: int | None = None, tags: Tags | None = None) -> Update:
        """Publish the contents of an old version, from the log, under a new number.

        Workers get what differs, as with publish(). The trainer's own weights are left alone: they
        are the caller's to set back, and the next publish() brings what they differ in from what
        was published here. Takes as long as reading the log, and one full copy in host memory.
        Of a trainer of several ranks each has to call it, as with publish(); other ranks than the
        first wait for that one, up to Policy.gather_s and resume_s (WaitTimeout), and hear why it
        did not (LogError). LogHole if the log does not lead to exactly that version (any more, or
        yet), LogError, BusError, Fenced, Closed, PublisherBusy: nothing was changed.
        """
        rolled = self._call(self._inner.rollback(version, step, tags))
        return Update(rolled._made, self)

    def wait_members(self, n: int, timeout_s: float = 60.0) -> list[str]:
        """Wait until `n` workers are in and current; their names. WaitTimeout says who is not."""
        return self._call(self._first("wait_members()").wait_members(n, timeout_s))

    def _first(self, what: str) -> AsyncPublisher:
        """The first rank's, which alone hears from the workers (LocalProtocolError)."""
        if isinstance(self._inner, Contributor):
            raise LocalProtocolError(
                f"{what} on rank {self._inner.rank} of the trainer: its first rank alone knows"
            )
        return self._inner

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        if self._thread is None:
            coroutine.close()
            raise Closed(NOT_OPEN)
        return self._thread.call(coroutine)
