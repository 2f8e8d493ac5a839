"""The window over gloo: CPU collectives over TCP, without a torch.distributed world.

A ProcessGroupGloo of its own per window, on a store over the bus. Every call that may block runs
on the window's own thread. Device tensors go through pinned host memory.
"""

from __future__ import annotations

import asyncio
import os
import struct
from datetime import timedelta
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed

from ...messages.errors import WindowAborted, WindowTimeout, WindowUnavailable
from .base import Courier, WindowSpec
from .lane import Lane
from .lifecycle import GRACE_S, Deadline, Lifecycle
from .rendezvous import Rendezvous
from .sockets import (
    Endpoint,
    broker_address,
    find_port,
    interface_address,
    is_loopback,
    route_address,
    sever,
)
from .store import BusStore

#: Names the network interface to use, before any other choice.
INTERFACE_VARIABLE = "SPARSECAST_GLOO_INTERFACE"

#: Goes ahead of every payload: magic, epoch, window, attempt, nbytes.
_HEADER = struct.Struct("<8sQQQQ")
_MAGIC = b"spcast-1"

#: Its stubs know little of it.
_Group: Any = torch.distributed.ProcessGroupGloo


@runtime_checkable
class _Located(Protocol):
    @property
    def url(self) -> str: ...


class GlooWindow(Lifecycle):
    """One rank's end of a gloo window.

    `address` is the local address to listen on, `interface` the network interface whose address
    that is; by default it is the address by which this host reaches the broker, or, when that is
    the loopback and a rank elsewhere is in the window, reaches that rank. The environment's
    SPARSECAST_GLOO_INTERFACE comes before all of them.

    A payload may be empty: then only the header travels. A device payload must be complete (its
    writer's stream synchronised) before send().
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
        self._deadline = Deadline(0.0)
        self._host = torch.empty(0, dtype=torch.uint8)

    # ---- opening

    async def _meet(self, deadline: Deadline) -> None:
        self._deadline = deadline
        address = self._choose_address()
        await self._rendezvous.start()
        addresses = await self._rendezvous.meet(address, deadline)
        if self._interface is None and self._address is None:
            address = self._reach(address, addresses)

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
        if self._aborted:
            # abort() did not wait for this thread: nobody else drops the group.
            self._group = None

    def _choose_address(self) -> str:
        try:
            if self._interface is not None:
                return interface_address(self._interface)
            if self._address is not None:
                return self._address
            if isinstance(self._courier, _Located):
                return broker_address(self._courier.url)
        except (OSError, ValueError) as exc:
            where = f"interface {self._interface}" if self._interface else "the broker's network"
            raise WindowUnavailable(
                self._spec.label, f"no address on {where} ({exc}); set {INTERFACE_VARIABLE}"
            ) from exc
        raise WindowUnavailable(
            self._spec.label, f"no address is known to listen on; set {INTERFACE_VARIABLE}"
        )

    def _reach(self, address: str, addresses: tuple[str, ...]) -> str:
        """A broker on this host is reached by the loopback, but the other ranks may not be here."""
        elsewhere = [other for other in addresses if not is_loopback(other)]
        if not is_loopback(address) or not elsewhere:
            return address
        try:
            return route_address(elsewhere[0])
        except OSError as exc:
            raise WindowUnavailable(
                self._spec.label, f"no way to the rank at {elsewhere[0]}: {exc}"
            ) from exc

    # ---- rounds

    async def _send(self, payload: torch.Tensor, attempt: int, deadline: Deadline) -> None:
        self._deadline = deadline
        await self._lane.run(lambda: self._broadcast_out(payload, attempt, deadline))

    async def _receive(self, staging: torch.Tensor, attempt: int, deadline: Deadline) -> None:
        self._deadline = deadline
        await self._lane.run(lambda: self._broadcast_in(staging, attempt, deadline))

    def _broadcast_out(self, payload: torch.Tensor, attempt: int, deadline: Deadline) -> None:
        body = payload
        if payload.device.type != "cpu":
            body = self._host_buffer(payload.numel())
            body.copy_(payload)
        head = torch.frombuffer(bytearray(self._header(attempt, body.numel())), dtype=torch.uint8)
        works = [self._broadcast(head, deadline)]
        if body.numel():
            works.append(self._broadcast(body, deadline))
        for work in works:
            self._finish(work, deadline)

    def _broadcast_in(self, staging: torch.Tensor, attempt: int, deadline: Deadline) -> None:
        head = torch.zeros(_HEADER.size, dtype=torch.uint8)
        self._finish(self._broadcast(head, deadline), deadline)
        # Before the payload is asked for: gloo ends the whole process (std::terminate on its own
        # thread) when more bytes come than the receiver has room for.
        self._check_header(head.numpy().tobytes(), attempt, staging.numel())
        if staging.numel() == 0:
            return
        body = staging if staging.device.type == "cpu" else self._host_buffer(staging.numel())
        self._finish(self._broadcast(body, deadline), deadline)
        if body is not staging:
            staging.copy_(body)
            torch.cuda.synchronize(staging.device)

    def _broadcast(self, tensor: torch.Tensor, deadline: Deadline) -> Any:
        if self._group is None or self._aborted:
            raise WindowAborted(self._spec.label, "aborted before the broadcast")
        options = torch.distributed.BroadcastOptions()
        options.rootRank = 0
        options.timeout = _delta(deadline, GRACE_S)
        return self._group.broadcast([tensor], options)

    def _finish(self, work: Any, deadline: Deadline) -> None:
        """Wait for `work`; when this returns or raises, gloo uses its tensor no more."""
        try:
            work.wait(_delta(deadline))
        except RuntimeError as exc:
            if work.is_completed():
                if deadline.passed:
                    raise self._timeout(deadline) from exc
                raise
        else:
            return
        # wait() gave up, gloo's thread has not: it would go on writing into the tensor. With its
        # connections cut it ends within milliseconds; where they cannot be, by its own timeout.
        self._sever()
        try:
            work.wait(timedelta(seconds=2 * GRACE_S))
        except RuntimeError as exc:
            raise self._timeout(deadline) from exc

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

    def _host_buffer(self, nbytes: int) -> torch.Tensor:
        if self._host.numel() < nbytes:
            self._host = torch.empty(
                nbytes, dtype=torch.uint8, pin_memory=torch.cuda.is_available()
            )
        return self._host[:nbytes]

    # ---- the end

    async def _break(self) -> None:
        if self._store is not None:
            self._store.abort()
        self._sever()
        await self._rendezvous.stop("the window was aborted")
        # A round holds its caller's memory: wait until gloo has let go of it, at worst (where no
        # connection can be cut) until gloo's own timeout. An opening holds nothing of anyone's.
        opening = self._opening is not None and not self._opening.done()
        await self._lane.stop(
            self._drop, 0.0 if opening else self._deadline.remaining_s + 3 * GRACE_S
        )

    async def _leave(self) -> None:
        await self._rendezvous.stop("the window was closed")
        await self._lane.stop(self._drop, GRACE_S)

    def _drop(self) -> None:
        self._group = None
        self._store = None

    def _sever(self) -> int:
        """Cut the connections of this window: pg.abort() does not wake a blocked operation."""
        known = self._store.entries if self._store is not None else {}
        peers = {
            (address, int(port))
            for key, value in known.items()
            if key.startswith("endpoint/")
            for address, port in [value.decode().split(" ")]
        }
        mine = {self._endpoint} if self._endpoint is not None else set()
        return sever(mine, peers - mine)


def _delta(deadline: Deadline, more_s: float = 0.0) -> timedelta:
    # Gloo takes whole milliseconds, and 0 for "no timeout".
    return timedelta(milliseconds=max(1, int(1e3 * (deadline.remaining_s + more_s))))


def _brief(error: BaseException) -> str:
    return str(error).split("\n", 1)[0][:200]
