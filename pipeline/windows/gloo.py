"""The window over gloo: CPU collectives over TCP, without a torch.distributed world.

A ProcessGroupGloo of its own per window, on a store over the bus. Every call that may block runs
on the window's own thread.
"""

from __future__ import annotations

import asyncio
import math
import os
import struct
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed

from ...messages.errors import WindowAborted, WindowError, WindowTimeout, WindowUnavailable
from .addresses import INTERFACE_VARIABLE, choose_address, reach
from .base import Behind, Courier, WindowSpec
from .lane import Lane
from .lifecycle import GRACE_S, Deadline, Lifecycle
from .rendezvous import Rendezvous
from .sockets import Endpoint, count, find_port, sever
from .store import BusStore

#: Goes ahead of every payload: magic, epoch, window, attempt, nbytes.
_HEADER = struct.Struct("<8sQQQQ")
_MAGIC = b"spcast-1"

#: A payload that is passed on goes in at most so many pieces, none but the last below this size.
_PIECES = 16
_PIECE_NBYTES = 1 << 17

#: How often a wait looks whether it still makes sense.
_SLICE_S = 0.1
#: How long a broadcast may go on after a connection of the window was lost: a rank that has all
#: may close its end in order while another still receives.
_LOST_S = 1.0
#: How long abort() waits for gloo's threads, which by then hold no memory of anyone's.
_DROP_S = 0.5
#: How long a broadcast whose connections were cut gets to notice.
_PATIENCE_S = 0.05

#: Its stubs know little of it.
_Group: Any = torch.distributed.ProcessGroupGloo


class GlooWindow(Lifecycle):
    """One rank's end of a gloo window.

    `address` is the local address to listen on, `interface` the network interface whose address
    that is; by default it is the address by which this host reaches the broker, or, when that is
    the loopback and a rank elsewhere is in the window, reaches that rank. The environment's
    SPARSECAST_GLOO_INTERFACE comes before all of them.

    A payload may be empty: then only the header travels.
    """

    def __init__(
        self,
        spec: WindowSpec,
        courier: Courier,
        *,
        address: str | None = None,
        interface: str | None = None,
    ) -> None:
        super().__init__(spec, courier)
        self._interface = os.environ.get(INTERFACE_VARIABLE) or interface
        self._address = address
        self._rendezvous = Rendezvous(spec, courier)
        self._lane = Lane(f"sparsecast-{spec.label}")
        self._store: BusStore | None = None
        self._group: Any = None
        self._endpoint: Endpoint | None = None
        #: Connections that a whole window has; None where that cannot be seen.
        self._links: int | None = None
        self._deadline = Deadline(0.0)

    # ---- opening

    async def _meet(self, deadline: Deadline) -> None:
        self._deadline = deadline
        label = self._spec.label
        address = choose_address(label, self._courier, self._address, self._interface)
        await self._rendezvous.start()
        addresses = await self._rendezvous.meet(address, deadline)
        if self._interface is None and self._address is None:
            address = reach(label, address, addresses)

        def annotate(key: str, value: bytes) -> dict[str, bytes]:
            # Gloo's listener picks its own port and tells only its peers, within this value.
            port = find_port(value, address)
            if port is None:
                return {}
            self._endpoint = (address, port)
            return {f"endpoint/{self._spec.rank}": f"{address} {port}".encode()}

        loop = asyncio.get_running_loop()
        self._store = store = BusStore(self._rendezvous, deadline, loop, annotate)
        await self._lane.run(lambda: self._connect(store, address, deadline))

    def _connect(self, store: BusStore, address: str, deadline: Deadline) -> None:
        options = _Group._Options()
        options._timeout = _delta(deadline)
        options._threads = 1
        try:
            options._devices = [_Group.create_device(hostname=address)]
        except RuntimeError as exc:
            raise WindowUnavailable(
                self._spec.label, f"gloo cannot listen on {address}: {exc}"
            ) from exc
        try:
            self._group = _Group(store, self._spec.rank, self._spec.size, options)
        except RuntimeError as exc:
            if deadline.passed:
                raise WindowTimeout(
                    self._spec.label, f"the ranks met, but did not connect: {_brief(exc)}"
                ) from exc
            raise
        if self._count_links() == self._spec.size - 1:
            self._links = self._spec.size - 1

    # ---- rounds

    async def _send(self, payload: torch.Tensor, attempt: int, deadline: Deadline) -> None:
        self._deadline = deadline
        await self._lane.run(lambda: self._broadcast_out(payload, attempt, deadline))

    async def _receive(
        self, staging: torch.Tensor, attempt: int, deadline: Deadline, behind: Behind | None
    ) -> None:
        self._deadline = deadline
        await self._lane.run(lambda: self._broadcast_in(staging, attempt, deadline))

    def _broadcast_out(self, payload: torch.Tensor, attempt: int, deadline: Deadline) -> None:
        header = bytearray(self._header(attempt, payload.numel()))
        works = [self._broadcast(torch.frombuffer(header, dtype=torch.uint8), deadline)]
        works += [self._broadcast(piece, deadline) for piece in self._pieces(payload)]
        self._finish(works, deadline)

    def _broadcast_in(self, staging: torch.Tensor, attempt: int, deadline: Deadline) -> None:
        head = torch.zeros(_HEADER.size, dtype=torch.uint8)
        self._finish([self._broadcast(head, deadline)], deadline)
        # Before the payload is asked for: gloo ends the whole process (std::terminate on its own
        # thread) when more bytes come than the receiver has room for.
        self._check_header(head.numpy().tobytes(), attempt, staging.numel())
        self._finish([self._broadcast(p, deadline) for p in self._pieces(staging)], deadline)

    def _pieces(self, body: torch.Tensor) -> Sequence[torch.Tensor]:
        # With more than three ranks some pass on what they get, and gloo begins that when it has
        # the whole of a tensor: in pieces the links are busy at the same time.
        if self._spec.size <= 3 or not body.numel():
            return [body] if body.numel() else []
        size = max(_PIECE_NBYTES, -(-body.numel() // _PIECES))
        return [body[start : start + size] for start in range(0, body.numel(), size)]

    def _broadcast(self, tensor: torch.Tensor, deadline: Deadline) -> Any:
        if self._group is None or self._aborted:
            raise WindowAborted(self._spec.label, "aborted before the broadcast")
        options = torch.distributed.BroadcastOptions()
        options.rootRank = 0
        options.timeout = _delta(deadline, more_s=1.0)
        return self._group.broadcast([tensor], options)

    def _finish(self, works: Sequence[Any], deadline: Deadline) -> None:
        """Wait for all; when this returns or raises, their tensors' memory is in use no more."""
        try:
            for work in works:
                self._wait(work, deadline)
        except WindowError:
            # wait() gave up, gloo's thread has not: it would go on writing into the tensor. With
            # its connections cut nothing can come any more, and it ends; or, if it missed the cut,
            # it sits without a connection until its own timeout. Where none can be cut, wait for
            # that.
            self._sever()
            patience = Deadline(_PATIENCE_S)
            while not all(work.is_completed() for work in works):
                if patience.passed and self._links is not None and self._count_links() == 0:
                    break
                time.sleep(0.002)
            raise

    def _wait(self, work: Any, deadline: Deadline) -> None:
        lost: Deadline | None = None
        while True:
            try:
                work.wait(_delta(deadline, most_s=_SLICE_S))
                return
            except RuntimeError as exc:
                if work.is_completed():
                    self._settle(work, deadline, exc)
                    return
            if self._aborted:
                raise WindowAborted(self._spec.label, "aborted during the broadcast")
            if deadline.passed:
                raise self._timeout(deadline)
            # An operation that starts just as its connection breaks is never woken (seen with
            # torch 2.13), and a rank that is no neighbour in the broadcast's tree hears nothing of
            # a death elsewhere: both would wait out the deadline.
            if self._links is not None and self._count_links() < self._links:
                lost = lost or Deadline(_LOST_S)
                if lost.passed:
                    raise self._error("a connection was lost, and the broadcast does not end")

    def _settle(self, work: Any, deadline: Deadline, error: RuntimeError) -> None:
        try:
            work.wait(timedelta(milliseconds=1))  # it may have ended well just after the slice did
        except RuntimeError:
            if deadline.passed:
                raise self._timeout(deadline) from error
            raise self._error(f"the broadcast failed: {_brief(error)}") from error

    def _timeout(self, deadline: Deadline) -> WindowTimeout:
        return WindowTimeout(
            self._spec.label, f"the broadcast did not end within {deadline.timeout_s:g} s"
        )

    def _header(self, attempt: int, nbytes: int) -> bytes:
        return _HEADER.pack(_MAGIC, self._spec.epoch, self._spec.window, attempt, nbytes)

    def _check_header(self, found: bytes, attempt: int, nbytes: int) -> None:
        if found == self._header(attempt, nbytes):
            return
        magic, epoch, window, its_attempt, its_nbytes = _HEADER.unpack(found)
        if magic != _MAGIC:
            raise self._error(f"rank 0 sent another kind of header: {found[:8]!r}")
        raise self._error(
            f"rank 0 sends attempt {its_attempt} of {epoch}.{window}, {its_nbytes} bytes; this "
            f"rank expects attempt {attempt} of {self._spec.epoch}.{self._spec.window}, "
            f"{nbytes} bytes"
        )

    # ---- the end

    async def _break(self) -> None:
        if self._store is not None:
            self._store.abort()
        self._sever()
        await self._rendezvous.stop(f"the window was aborted ({self._dead or 'on request'})")
        # A round holds its caller's memory: wait until gloo has let go of it, at worst (where no
        # connection can be cut) until gloo's own timeout. An opening holds nothing of anyone's.
        if self._running is not None:
            await asyncio.wait({self._running}, timeout=self._deadline.remaining_s + 3 * GRACE_S)
        await self._lane.stop(self._drop, _DROP_S)

    async def _leave(self) -> None:
        await self._rendezvous.stop("the window was closed")
        await self._lane.stop(self._drop, GRACE_S)

    def _drop(self) -> None:
        self._group = None
        self._store = None

    def _links_of(self) -> tuple[set[Endpoint], set[Endpoint]]:
        """Our own listener, and those of the peers: every connection has one of them at its end."""
        known = self._store.entries if self._store is not None else {}
        peers = {
            (address, int(port))
            for key, value in known.items()
            if key.startswith("endpoint/")
            for address, port in [value.decode().split(" ")]
        }
        mine = {self._endpoint} if self._endpoint is not None else set()
        return mine, peers - mine

    def _count_links(self) -> int:
        return count(*self._links_of())

    def _sever(self) -> None:
        """Cut the connections of this window: pg.abort() does not wake a blocked operation."""
        sever(*self._links_of())


def _delta(deadline: Deadline, *, more_s: float = 0.0, most_s: float = math.inf) -> timedelta:
    # Gloo takes whole milliseconds, and 0 for "no timeout".
    return timedelta(milliseconds=max(1, int(1e3 * min(most_s, deadline.remaining_s + more_s))))


def _brief(error: BaseException) -> str:
    return str(error).split("\n", 1)[0][:200]
