"""flush() means that the server has everything: nothing may be written behind its PING."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from sparsecast.pipeline.bus.client import DIRECT_NBYTES
from sparsecast.pipeline.bus.nats import NatsBus


async def test_ping_of_a_flush_is_written_last(
    bus: NatsBus, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A subscription and a message are handed over and flushed at once: the server reads both
    before the PING whose answer ends the flush. (Else a worker that has flushed its subscription
    misses the request that comes next.)"""
    await bus.flush(2.0)
    transport: Any = bus.client._transport
    written: list[bytes] = []
    write, writelines = transport.write, transport.writelines

    def keep(data: bytes) -> None:
        written.append(bytes(data))
        write(data)

    def keep_lines(lines: list[bytes]) -> None:
        written.extend(bytes(line) for line in lines)
        writelines(lines)

    monkeypatch.setattr(transport, "write", keep)
    monkeypatch.setattr(transport, "writelines", keep_lines)
    await bus.subscribe(f"{run}.heard", lambda message: None)
    await bus.publish(f"{run}.said", b"first")
    await bus.flush(2.0)
    commands = [part.split()[0] for part in b"".join(written).split(b"\r\n") if part]
    assert commands == [b"SUB", b"PUB", b"first", b"PING"]


async def test_a_message_is_written_at_once(
    bus: NatsBus, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a round says goes to the socket within publish(), and in order, not when a task of the
    client's own has its turn; unless much waits for the socket already, which that task bounds."""
    await bus.flush(2.0)
    transport: Any = bus.client._transport
    written: list[bytes] = []
    writelines = transport.writelines

    def keep_lines(lines: list[bytes]) -> None:
        written.extend(bytes(line) for line in lines)
        writelines(lines)

    monkeypatch.setattr(transport, "writelines", keep_lines)
    await bus.publish(f"{run}.said", b"first")
    await bus.publish(f"{run}.said", b"second")
    assert b"".join(written).split(b"\r\n")[1::2] == [b"first", b"second"]
    await bus.publish(f"{run}.said", bytes(DIRECT_NBYTES))
    await bus.publish(f"{run}.said", b"last")
    assert len(written) == 2
    await bus.flush(2.0)
    assert b"".join(written).split(b"\r\n")[-2] == b"last"


async def test_a_message_to_a_socket_that_is_gone_breaks_nothing(
    bus: NatsBus, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The write fails before the client has noticed: publish() only queues, the client connects
    anew, and the next message arrives."""
    heard: asyncio.Queue[bytes] = asyncio.Queue()
    await bus.subscribe(f"{run}.said", lambda message: heard.put_nowait(message.data))
    await bus.flush(2.0)
    transport: Any = bus.client._transport

    writelines, failures = transport.writelines, [OSError("it is gone"), OSError("it is gone")]

    def broken(lines: list[bytes]) -> None:
        if failures:
            raise failures.pop()
        writelines(lines)

    monkeypatch.setattr(transport, "writelines", broken)
    await bus.publish(f"{run}.said", b"lost, or not")
    assert len(failures) == 1
    for _ in range(500):
        await asyncio.sleep(0.01)
        if not failures:
            break
    assert not failures, "the client has not noticed"
    async with asyncio.timeout(10.0):
        await bus.flush(5.0)
        await bus.publish(f"{run}.said", b"next")
        while await heard.get() != b"next":
            pass
