"""The window over NCCL: from GPU to GPU, without a torch.distributed world.

Every call that may block runs on the window's own thread, on a stream of its own; abort() comes
from another one. Nobody enters NCCL before every rank has come to the rendezvous, and whatever
loads kernels or allocates comes before the first collective: beside one that waits for a peer,
such a call may freeze the process's work on the GPU.
"""

from __future__ import annotations

import asyncio
import functools
import importlib.metadata
import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from ...messages.errors import WindowAborted, WindowError, WindowTimeout, WindowUnavailable
from .base import Behind, Courier, WindowSpec
from .bounce import Bounce, pieces
from .communicator import Communicator, Library
from .envelope import CAPACITY, Envelope
from .gpus import enter_gpu, gpu_identity
from .lane import Lane, sharpen_sleeps
from .lifecycle import GRACE_S, Deadline, Lifecycle
from .rendezvous import Rendezvous
from .side import Side

_T = TypeVar("_T")

log = logging.getLogger("sparsecast.windows")

#: Goes ahead of every payload: magic, epoch, window, attempt, nbytes.
_HEADER = struct.Struct("<8sQQQQ")
_MAGIC = b"spcast-n"
#: Under which rank 0 leaves the communicator's identity at the rendezvous.
_IDENTITY = "nccl"

#: A wait for the GPU spins for so long, since a small round is over by then; then it sleeps between
#: two looks, for a 64th of what it has waited, and asks NCCL now and then.
_SPIN_S = 0.00015
_POLL_S, _POLL_MOST_S = 0.00002, 0.0001
_SHARE = 64
_ASK_S = 0.02
#: By how much the window's thread may miss a deadline before it is taken to be stuck.
_LATE_S = 0.5
#: How long leaving in order may take before it becomes an abort.
_LEAVE_S = 2.0
#: How long abort() waits for the window's thread when nobody's memory is in its hands.
_DROP_S = 0.5

#: Held by rank 0 from the identity to the first broadcast. Two windows that open at once would meet
#: their peers in different orders, one's allocations waiting for the other's pending collective.
_turn = threading.Lock()
#: Memory that a stream which did not end may still write: kept for good, rather than given away.
_lost: list[object] = []


@dataclass(frozen=True, slots=True)
class Probe:
    """Whether this process can open nccl windows; if not, why, and what to do. Versions: "" if
    unknown."""

    available: bool
    reason: str
    nccl: str
    nccl4py: str


@functools.cache
def probe() -> Probe:
    """Look for nccl4py, NCCL and a GPU, once a process. CUDA is not initialised."""
    try:
        nccl4py = importlib.metadata.version("nccl4py")
    except importlib.metadata.PackageNotFoundError:
        reason = "nccl4py is not installed: pip install 'sparsecast[nccl]'"
        return Probe(False, reason, "", "")
    try:
        nccl = Library().version()
    except (ImportError, OSError, RuntimeError) as exc:
        reason = (
            f"nccl4py {nccl4py} does not load ({exc}): install the cuda-bindings of torch's CUDA "
            f"version (torch {torch.__version__}), as in pip install 'cuda-bindings~=13.0'"
        )
        return Probe(False, reason, "", nccl4py)
    if not nccl:
        reason = f"nccl4py {nccl4py} finds no NCCL library: pip install nvidia-nccl-cu13 (or -cu12)"
        return Probe(False, reason, "", nccl4py)
    if not torch.cuda.is_available():
        return Probe(False, "torch finds no NVIDIA GPU here", nccl, nccl4py)
    return Probe(True, "", nccl, nccl4py)


class NcclWindow(Lifecycle):
    """One rank's end of an nccl window; `spec.device` is its GPU, which no other rank is on.

    A small payload goes in the envelope that precedes every one. A larger payload or staging on
    that GPU is sent from or received into where it is; host memory and memory of other GPUs goes
    through a bounded buffer.
    """

    _places = ("cpu", "cuda")
    _in_caller = True

    def __init__(self, spec: WindowSpec, courier: Courier) -> None:
        super().__init__(spec, courier)
        self._rendezvous = Rendezvous(spec, courier)
        self._lane = Lane(f"sparsecast-{spec.label}")
        self._breaker = Lane(f"sparsecast-{spec.label}-abort")
        self._index = 0
        self._deadline = Deadline(0.0)
        self._communicator: Communicator | None = None
        self._library: Library | None = None
        self._side: Side | None = None
        self._bounce: Bounce | None = None
        self._envelope: Envelope | None = None
        #: The caller's, and what it has queued behind it, while an operation may touch them.
        self._memory: torch.Tensor | None = None
        self._behind: Behind | None = None
        self._has_turn = False

    # ---- opening

    async def _meet(self, deadline: Deadline) -> None:
        self._deadline = deadline
        await self._rendezvous.start()
        where = await self._run(self._prepare, deadline)
        self._check_apart(await self._rendezvous.meet(where, deadline))
        if self._spec.rank == 0:
            identity = await self._run(self._mint, deadline)
            await self._rendezvous.put({_IDENTITY: identity}, deadline)
        else:
            found = await self._rendezvous.want([_IDENTITY], deadline)
            identity = found[_IDENTITY]
        await self._run(lambda: self._connect(identity), deadline)

    def _prepare(self) -> str:
        """Load and allocate all that rounds need; returns where this rank is."""
        label = self._spec.label
        try:
            self._library = Library()
        except (ImportError, OSError, RuntimeError) as exc:
            raise WindowUnavailable(label, probe().reason or str(exc)) from exc
        if not torch.cuda.is_available():
            raise WindowUnavailable(label, "torch finds no NVIDIA GPU here")
        device = torch.device(self._spec.device)
        if device.type != "cuda":
            raise WindowUnavailable(label, f"{device} is no NVIDIA GPU")
        # Without an index torch means the current device.
        named = ":" in self._spec.device
        self._index = device.index if named else torch.cuda.current_device()
        enter_gpu(self._index)
        sharpen_sleeps()
        self._side = side = Side(self._index)
        side.enter()
        self._bounce = Bounce(side, self._wait)
        self._envelope = Envelope(side)
        self._wait(side.mark())
        self._communicator = Communicator(label, self._library)
        return f"{socket.gethostname()} {gpu_identity(f'cuda:{self._index}')}"

    def _check_apart(self, places: Sequence[str]) -> None:
        first: dict[str, int] = {}
        for rank, place in enumerate(places):
            host, _, gpu = place.partition(" ")
            if gpu and first.setdefault(gpu, rank) != rank:
                raise WindowUnavailable(
                    self._spec.label,
                    f"ranks {first[gpu]} and {rank} are both on {gpu} of {host}, and NCCL takes "
                    "one rank a GPU: give each a GPU of its own, or open a gloo or bus window",
                )

    def _mint(self) -> bytes:
        while not _turn.acquire(timeout=0.05):
            self._look("its turn did not come (this process opens another window)")
        self._has_turn = True
        assert self._library is not None
        try:
            return self._library.unique_id()
        except self._library.errors as exc:
            raise WindowUnavailable(self._spec.label, f"NCCL gives no identity: {exc}") from exc

    def _connect(self, identity: bytes) -> None:
        spec = self._spec
        communicator, side = self._parts()
        communicator.connect(spec.rank, spec.size, identity, self._deadline)
        # Connections are made by the first broadcast.
        self._enqueue_envelope(0, 0, None)
        self._finish(side.mark())
        self._check_header(0, 0)
        self._end_turn()

    # ---- rounds

    def alert(self, seconds: float) -> None:
        """Let the window's thread sleep but lightly."""
        self._lane.alert(seconds)

    async def _send(self, payload: torch.Tensor, attempt: int, deadline: Deadline) -> None:
        self._deadline, self._memory = deadline, payload
        await self._run(lambda: self._broadcast_out(payload, attempt), deadline)

    async def _receive(
        self, staging: torch.Tensor, attempt: int, deadline: Deadline, behind: Behind | None
    ) -> None:
        self._deadline, self._memory = deadline, staging
        await self._run(lambda: self._broadcast_in(staging, attempt, behind), deadline)

    def _broadcast_out(self, payload: torch.Tensor, attempt: int) -> None:
        communicator, side = self._parts()
        nbytes = payload.numel()
        bounce = self._bounce_for(payload)
        self._enqueue_envelope(attempt, nbytes, payload)
        for start, end in pieces(nbytes) if nbytes > CAPACITY else ():
            piece = payload[start:end]
            if bounce is not None:
                bounce.fill(piece)
                piece = bounce.buffer(end - start)
            communicator.broadcast(piece, side.handle, self._deadline)
        self._finish(side.mark())
        self._memory = None

    def _broadcast_in(self, staging: torch.Tensor, attempt: int, behind: Behind | None) -> None:
        communicator, side = self._parts()
        nbytes = staging.numel()
        bounce = self._bounce_for(staging)
        if staging.device != torch.device("cuda", self._index):
            behind = None
        if behind is not None:
            try:
                behind.prepare()
            except torch.cuda.OutOfMemoryError as exc:
                log.warning("window %s: nothing follows the payload: %s", self._spec.label, exc)
                behind = None
        self._behind = behind
        envelope = self._enqueue_envelope(attempt, nbytes, staging)
        headed = done = side.mark()
        # The payload is asked for before the header is looked at: it would cost a small round half
        # as much again. Another attempt's bytes come to this rank's own staging, or do not come at
        # all; the header tells, and the window is dead then.
        for start, end in pieces(nbytes) if nbytes > CAPACITY else ():
            piece = staging[start:end]
            if bounce is None:
                communicator.broadcast(piece, side.handle, self._deadline)
            else:
                communicator.broadcast(bounce.buffer(end - start), side.handle, self._deadline)
                self._wait(headed)
                self._check_header(attempt, nbytes)
                bounce.drain(piece)
            done = side.mark()
        if behind is not None:
            behind.enqueue()
            done = side.mark()
        self._wait(headed)
        self._check_header(attempt, nbytes)
        if nbytes <= CAPACITY:
            envelope.land(staging)
        self._finish(done)
        self._memory = self._behind = None

    def _bounce_for(self, memory: torch.Tensor) -> Bounce | None:
        """What memory that is not on this GPU goes through; ready for it."""
        if memory.device == torch.device("cuda", self._index):
            return None
        if not memory.numel() or (memory.numel() <= CAPACITY and not memory.is_cuda):
            return None
        assert self._bounce is not None
        self._bounce.reserve(memory)
        return self._bounce

    def _enqueue_envelope(self, attempt: int, nbytes: int, memory: torch.Tensor | None) -> Envelope:
        communicator, side = self._parts()
        envelope = self._envelope
        assert envelope is not None
        inside = memory if 0 < nbytes <= CAPACITY else None
        if self._spec.rank == 0:
            envelope.seal(self._header(attempt, nbytes), inside)
        communicator.broadcast(envelope.buffer, side.handle, self._deadline)
        if self._spec.rank != 0:
            envelope.open(_HEADER.size, inside)
        return envelope

    def _header(self, attempt: int, nbytes: int) -> bytes:
        return _HEADER.pack(_MAGIC, self._spec.epoch, self._spec.window, attempt, nbytes)

    def _check_header(self, attempt: int, nbytes: int) -> None:
        expected = self._header(attempt, nbytes)
        if self._spec.rank == 0:
            return
        assert self._envelope is not None
        found = self._envelope.header(len(expected))
        if found == expected:
            return
        magic, epoch, window, its_attempt, its_nbytes = _HEADER.unpack(found)
        if magic != _MAGIC:
            raise self._error(f"rank 0 sent another kind of header: {magic!r}")
        raise self._error(
            f"rank 0 sends attempt {its_attempt} of {epoch}.{window}, {its_nbytes} bytes; this "
            f"rank expects attempt {attempt} of {self._spec.epoch}.{self._spec.window}, "
            f"{nbytes} bytes"
        )

    # ---- waiting

    async def _run(self, job: Callable[[], _T], deadline: Deadline) -> _T:
        """Run `job` on the window's thread; it keeps the deadline, unless a CUDA call is stuck."""
        running = self._lane.submit(job)

        def give_up() -> None:
            if not running.done():
                reason = f"no call to the GPU returned within {deadline.timeout_s:g} s"
                running.set_exception(WindowTimeout(self._spec.label, reason))
                running.exception()  # marked as seen: the caller may be cancelled just now

        loop = asyncio.get_running_loop()
        late = loop.call_later(deadline.remaining_s + _LATE_S, give_up)
        try:
            return await running
        finally:
            late.cancel()

    def _wait(self, event: torch.cuda.Event) -> None:
        """Wait until the GPU has come to `event`; by the deadline, and not after abort()."""
        began, asked = time.monotonic(), Deadline(_ASK_S)
        while not event.query():  # type: ignore[no-untyped-call]
            self._look("the broadcast did not end")
            if asked.passed and self._communicator is not None:
                self._communicator.check()
                asked = Deadline(_ASK_S)
            waited_s = time.monotonic() - began
            if waited_s < _SPIN_S:
                os.sched_yield()  # time.sleep(0) takes some 70 µs
            else:
                time.sleep(min(max(_POLL_S, waited_s / _SHARE), _POLL_MOST_S))
        # What is aborted returns as if it were done.
        if self._aborted:
            raise WindowAborted(self._spec.label, "aborted during the broadcast")

    def _finish(self, event: torch.cuda.Event) -> None:
        self._wait(event)
        communicator, _ = self._parts()
        communicator.check()

    def _look(self, trouble: str) -> None:
        if self._aborted:
            raise WindowAborted(self._spec.label, "aborted meanwhile")
        if self._deadline.passed:
            raise WindowTimeout(
                self._spec.label, f"{trouble} within {self._deadline.timeout_s:g} s"
            )

    def _parts(self) -> tuple[Communicator, Side]:
        if self._communicator is None or self._side is None or self._aborted:
            raise WindowAborted(self._spec.label, "aborted before the broadcast")
        return self._communicator, self._side

    # ---- the end

    async def _break(self) -> None:
        cutting = asyncio.ensure_future(self._breaker.run(self._cut))
        cutting.add_done_callback(_seen)
        await self._rendezvous.stop(f"the window was aborted ({self._dead or 'on request'})")
        done, _ = await asyncio.wait({cutting}, timeout=GRACE_S)
        if not done or cutting.exception() is not None:
            why = cutting.exception() if done else f"not within {GRACE_S:g} s"
            log.error("window %s: its communicator was not aborted: %s", self._spec.label, why)
        await self._breaker.stop(lambda: None, _DROP_S)
        await self._lane.stop(self._drop, _DROP_S if self._memory is None else GRACE_S)

    def _cut(self) -> None:
        communicator, side = self._communicator, self._side
        if communicator is None or side is None:
            return
        enter_gpu(self._index)
        communicator.abort()
        patience = Deadline(GRACE_S)
        while not side.idle() and not patience.passed:
            time.sleep(_POLL_S)

    async def _leave(self) -> None:
        await self._rendezvous.stop("the window was closed")
        communicator = self._communicator
        if communicator is not None:
            deadline = Deadline(_LEAVE_S)
            try:
                await self._run(lambda: communicator.leave(deadline), deadline)
            except WindowError as exc:
                log.warning("%s; it is aborted instead", exc)
                return await self._break()
        await self._lane.stop(self._drop, GRACE_S)

    def _drop(self) -> None:
        self._end_turn()
        side, self._side = self._side, None
        if side is not None:
            if side.idle():
                side.give_back()
            else:
                log.error("window %s: its stream did not end", self._spec.label)
                _lost.append((side, self._memory, self._behind, self._bounce, self._envelope))
        self._memory = self._behind = None
        self._bounce = self._envelope = self._communicator = None

    def _end_turn(self) -> None:
        if self._has_turn:
            self._has_turn = False
            _turn.release()


def _seen(task: asyncio.Task[object]) -> None:
    """Take note of a task's error: whoever waited for it may have gone."""
    if not task.cancelled():
        task.exception()
