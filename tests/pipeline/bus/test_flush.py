"""flush() means that the server has everything: nothing may be written behind its PING."""

from __future__ import annotations

from typing import Any

import pytest

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
