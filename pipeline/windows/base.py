"""The contract of a window: one payload from rank 0 to every other rank, under a deadline.

A window is a communicator of one epoch over a fixed list of ranks; rank 0 is the trainer. It is
opened once, carries any number of rounds one after the other, and is closed or aborted once. It is
for one event loop; what blocks runs on threads of its own. Every window passes the suite in
tests/pipeline/windows/test_contract.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ...messages.control import WindowKind

if TYPE_CHECKING:
    import torch


class Subscription(Protocol):
    """A live subscription of a Courier."""

    async def unsubscribe(self) -> None:
        """End it."""


class Received(Protocol):
    """A message as a Courier hands it over."""

    @property
    def subject(self) -> str: ...
    @property
    def data(self) -> bytes: ...
    @property
    def reply(self) -> str: ...


class Courier(Protocol):
    """What a window asks of the bus: for its rendezvous, or for the payload itself."""

    @property
    def max_payload(self) -> int: ...
    async def publish(self, subject: str, data: bytes, *, reply: str = "") -> None: ...
    async def flush(self, timeout_s: float) -> None: ...
    async def subscribe(
        self,
        subject: str,
        handler: Callable[[Received], None],
        *,
        queue: str = "",
        pending_nbytes: int = 0,
    ) -> Subscription: ...
    async def request(self, subject: str, data: bytes, *, timeout_s: float) -> bytes: ...


@dataclass(frozen=True, slots=True)
class WindowSpec:
    """Which window this is, and who is in it. `prefix` is the subject prefix of its own traffic."""

    kind: WindowKind
    prefix: str
    epoch: int
    window: int
    rank: int
    size: int
    device: str = "cpu"

    @property
    def label(self) -> str:
        """How messages and errors name it."""
        return f"{self.kind}:{self.epoch}.{self.window}"


class Behind(Protocol):
    """Work on the device that follows a payload there: what is queued before the host has heard
    that the payload came costs no wait of its own."""

    def prepare(self) -> None:
        """Make all memory for it. Called with the window's stream current, before anything on it
        waits for another rank: to allocate afterwards might freeze the device. Without memory
        (torch.cuda.OutOfMemoryError) the payload comes all the same, and nothing follows it."""

    def enqueue(self) -> None:
        """Queue it on the current stream, behind the payload. Waits for nothing, and touches
        nothing that must not be touched if the payload is garbage."""


class Window(Protocol):
    """One rank's end of a window."""

    @property
    def spec(self) -> WindowSpec: ...

    async def open(self, timeout_s: float) -> None:
        """Meet the other ranks. All of them call it; twice on one window opens once.

        WindowTimeout at the deadline, WindowAborted if abort() came first, WindowUnavailable if
        this kind cannot work here. After an error the window is dead: abort() it.
        """

    async def send(self, payload: torch.Tensor, *, attempt: int, timeout_s: float) -> None:
        """Rank 0: send `payload` (uint8, 1-d, contiguous) to all other ranks.

        It is in host memory; for an nccl window it may be on a GPU. It is whole by now: no window
        waits for a stream of the caller's, on which a training step or a forward pass may run.

        Returns when the payload's memory may be reused: not a proof that anyone has it (NCCL comes
        to an end as well when a receiver aborts); members acknowledge over the bus. WindowTimeout,
        WindowAborted, WindowError as in open().
        """

    async def receive(
        self,
        staging: torch.Tensor,
        *,
        attempt: int,
        timeout_s: float,
        behind: Behind | None = None,
    ) -> None:
        """Other ranks: fill `staging` (uint8, 1-d, contiguous, of the announced size).

        It lies as in send(), and is idle: nothing that is queued on any stream touches it, nor what
        its memory was before. A fresh tensor of torch's caching allocator is so only on a stream on
        which nothing is queued. When this returns it is whole, for every stream.

        That it returns is no proof either: if another receiver that passes the payload on aborts
        meanwhile, NCCL may bring what it happened to have. Check the bytes.

        `behind` is for windows that receive into memory of a device, on a thread of their own: its
        work is over as well when this returns. Others, and staging on the host, leave it alone.

        Until this returns, `staging` belongs to the window; after an error it holds garbage, and
        may be reused only once abort() has returned.
        """

    def alert(self, seconds: float) -> None:
        """A send or receive is likely within the next seconds: have nothing to wake up for it."""

    async def abort(self) -> None:
        """Break the window off, whatever it is doing: a pending open, send or receive raises
        WindowAborted. Returns, within a bounded time, when no memory is in use any more.
        Idempotent."""

    async def close(self) -> None:
        """Leave an idle window in order. Idempotent; after abort() it does nothing."""


#: Makes the window of a spec; the driver takes it as an argument, which simulation replaces.
WindowFactory = Callable[[WindowSpec, Courier], Window]
