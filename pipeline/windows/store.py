"""The rendezvous as a torch.distributed.Store: what a collective library asks its questions of."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from torch._C._distributed_c10d import Store

from ...messages.errors import WindowAborted
from .lifecycle import GRACE_S, Deadline
from .rendezvous import Rendezvous

_T = TypeVar("_T")


class BusStore(Store):
    """The dictionary as torch's collectives want it: called on their threads, where it may block.

    `annotate` may add entries to what this rank sets; `entries` is all that is known here. Every
    call ends by the deadline, or at once after abort().
    """

    def __init__(
        self,
        rendezvous: Rendezvous,
        deadline: Deadline,
        loop: asyncio.AbstractEventLoop,
        annotate: Callable[[str, bytes], dict[str, bytes]],
    ) -> None:
        super().__init__()
        self._rendezvous = rendezvous
        self._deadline = deadline
        self._loop = loop
        self._annotate = annotate
        self._calls: set[concurrent.futures.Future[Any]] = set()
        self._aborted = False
        self.entries: dict[str, bytes] = {}

    def abort(self) -> None:
        """Make the pending and all later calls raise WindowAborted. From any thread."""
        self._aborted = True
        for call in list(self._calls):
            call.cancel()

    def set(self, key: str, value: bytes | str) -> None:
        """Set a key for all ranks."""
        data = value.encode() if isinstance(value, str) else bytes(value)
        mine = {key: data, **self._annotate(key, data)}
        self.entries.update(self._call(lambda: self._rendezvous.put(mine, self._deadline)))

    def get(self, key: str) -> bytes:
        """The value of a key, once a rank has set it."""
        self.wait([key])
        return self.entries[key]

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Return once all keys are set."""
        if not all(key in self.entries for key in keys):
            found = self._call(lambda: self._rendezvous.want(keys, self._deadline))
            self.entries.update(found)

    def _call(self, work: Callable[[], Awaitable[_T]]) -> _T:
        call = asyncio.run_coroutine_threadsafe(_settled(work), self._loop)
        self._calls.add(call)
        try:
            if self._aborted:
                call.cancel()
            # The work keeps the deadline itself; this bound is for a loop that stands still.
            settled = call.result(self._deadline.remaining_s + GRACE_S)
        except concurrent.futures.CancelledError:
            raise WindowAborted(self._rendezvous.label, "aborted while the ranks met") from None
        finally:
            self._calls.discard(call)
        if isinstance(settled, _Failed):
            raise settled.error
        return settled


@dataclass(frozen=True, slots=True)
class _Failed:
    error: Exception


async def _settled(work: Callable[[], Awaitable[_T]]) -> _T | _Failed:
    """An error comes as a value: raised by a task whose call abort() has just cancelled, it would
    be collected by nobody, and asyncio would complain of it."""
    try:
        return await work()
    except Exception as exc:
        return _Failed(exc)
