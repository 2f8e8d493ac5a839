"""What a broker is, and whether it will do; what an embedded one would run."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import time
from statistics import median
from typing import TYPE_CHECKING

import msgspec

from ..messages.errors import BusError, BusUnavailable, SparsecastError
from . import findings as f
from .examine import brief

if TYPE_CHECKING:
    from ..pipeline.bus.base import Message
    from ..pipeline.bus.nats import NatsBus

BUS_S = 5.0
PINGS = 21


def server() -> f.Server:
    """The nats-server of an embedded broker, and whether it is new enough."""
    from ..pipeline.bus.broker import server_binary
    from ..pipeline.bus.client import MINIMUM_SERVER, server_version

    try:
        path = server_binary()
    except BusError as exc:
        return f.Server(reason=str(exc))
    try:
        told = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=BUS_S, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError) as exc:
        return f.Server(path=str(path), reason=f"{path} --version: {brief(exc)}")
    version = told.strip().rpartition(" ")[2].removeprefix("v")
    usable = server_version(version) >= MINIMUM_SERVER
    least = ".".join(map(str, MINIMUM_SERVER))
    return f.Server(
        path=str(path),
        version=version,
        usable=usable,
        reason="" if usable else f"{path} is {version}: {least} or newer is needed",
    )


async def look(
    url: str, origin: str, stack: contextlib.AsyncExitStack
) -> tuple[f.Broker, NatsBus | None]:
    """What a broker is; a connection to it if it will do."""
    from ..pipeline.bus.client import redact
    from ..pipeline.bus.nats import connect

    seen = f.Broker(url=redact(url), origin=origin)
    try:
        bus = await connect(url, name="sparsecast-doctor", timeout_s=BUS_S)
    except BusUnavailable as exc:
        return msgspec.structs.replace(seen, reason=exc.reason), None
    stack.push_async_callback(bus.close)
    seen = msgspec.structs.replace(
        seen,
        reachable=True,
        version=_version_of(bus),
        max_payload_nbytes=bus.max_payload,
    )
    try:
        answer = await bus.request("$JS.API.INFO", b"", timeout_s=BUS_S)
        error = msgspec.json.decode(answer).get("error")
        if error:
            raise BusError(str(error.get("description", error)))
        seen = msgspec.structs.replace(seen, jetstream=True)
        p50_ms = await asyncio.wait_for(_ping(bus), BUS_S)
    except (SparsecastError, TimeoutError, msgspec.DecodeError) as exc:
        if seen.jetstream:
            reason = f"no answer came through it: {exc}"
        elif isinstance(exc, BusUnavailable):
            reason = "JetStream is not enabled there: start it with -js"
        else:
            reason = f"JetStream: {exc}"
        return msgspec.structs.replace(seen, reason=reason), None
    return msgspec.structs.replace(seen, request_p50_ms=round(p50_ms, 3)), bus


def _version_of(bus: NatsBus) -> str | None:
    of = bus.client.connected_server_version
    with contextlib.suppress(ValueError):  # a build's own numbering
        return f"{of.major}.{of.minor}.{of.patch}"
    return None


async def _ping(bus: NatsBus) -> float:
    """The middle time of some requests that this process answers itself, in ms."""
    subject = f"sparsecast.doctor-{os.getpid()}.ping"
    answering: set[asyncio.Task[None]] = set()

    def answer(message: Message) -> None:
        task = asyncio.create_task(bus.publish(message.reply, message.data))
        answering.add(task)
        task.add_done_callback(answering.discard)

    subscription = await bus.subscribe(subject, answer)
    await bus.flush(BUS_S)
    times = []
    for _ in range(PINGS):
        began = time.perf_counter()
        await bus.request(subject, b"?", timeout_s=BUS_S)
        times.append((time.perf_counter() - began) * 1e3)
    await subscription.unsubscribe()
    return median(times)
