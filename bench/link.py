"""A link of a known rate between processes of one machine: network namespaces, veth, tc.

Every rank gets a namespace with one interface, whose way out is shaped by a token bucket; one more
namespace holds the bridge between them, so that nothing is added to the machine's own network.
Needs root and iproute2. All of it goes when the context ends, by an error or an interrupt too;
what a killed bench left behind, the next one removes.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from contextlib import suppress
from types import TracebackType
from typing import Self

_NAME = "sparsecast-bench"
_NETWORK = "10.213.77"
_CHUNK = 1 << 18
_SAMPLE_NBYTES = 16 << 20
#: The fastest of so many counts: a busy machine is slower than its link, never faster.
_SAMPLES = 3
_PINGS = 200


class LinkError(RuntimeError):
    """The link cannot be made here, or is not what it should be."""


class Link:
    """Namespaces for ranks 0 … size - 1, each with `rate` (as tc has it: 1gbit) to the others."""

    def __init__(self, rate: str, size: int) -> None:
        if not re.fullmatch(r"\d+(?:\.\d+)?[kmg]bit", rate):
            raise LinkError(f"a link is 'none' or a rate such as 1gbit or 200mbit, not {rate!r}")
        self.rate = rate
        self._size = size
        self._name = f"{_NAME}-{os.getpid()}"

    @property
    def bits_per_s(self) -> float:
        """The rate as a number."""
        unit = {"k": 1e3, "m": 1e6, "g": 1e9}[self.rate[-4]]
        return float(self.rate[:-4]) * unit

    @property
    def shape(self) -> str:
        """What tc was told."""
        return f"tbf rate {self.rate} burst 256kb latency 50ms"

    def address(self, rank: int) -> str:
        """Where a rank listens."""
        return f"{_NETWORK}.{rank + 1}"

    def prefix(self, rank: int) -> list[str]:
        """What to put before a command that is to run as a rank."""
        return ["ip", "netns", "exec", f"{self._name}-{rank}"]

    def __enter__(self) -> Self:
        missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
        if missing:
            raise LinkError(
                f"a shaped link needs {' and '.join(missing)}: install the package iproute2"
            )
        if os.geteuid() != 0:
            raise LinkError("a shaped link needs root (network namespaces): run this with sudo")
        _sweep()
        try:
            self._make()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._remove()

    def _make(self) -> None:
        switch = f"{self._name}-switch"
        _do("ip", "netns", "add", switch)
        _do("ip", "-n", switch, "link", "add", "bridge0", "type", "bridge")
        _do("ip", "-n", switch, "link", "set", "bridge0", "up")
        for rank in range(self._size):
            space, port = f"{self._name}-{rank}", f"rank{rank}"
            _do("ip", "netns", "add", space)
            _do(
                *("ip", "-n", switch, "link", "add", port, "type", "veth"),
                *("peer", "name", "eth0", "netns", space),
            )
            _do("ip", "-n", switch, "link", "set", port, "master", "bridge0", "up")
            _do("ip", "-n", space, "addr", "add", f"{self.address(rank)}/24", "dev", "eth0")
            _do("ip", "-n", space, "link", "set", "eth0", "up")
            _do("ip", "-n", space, "link", "set", "lo", "up")
            _do("tc", "-n", space, "qdisc", "add", "dev", "eth0", "root", *self.shape.split())

    def _remove(self) -> None:
        held = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in held:  # a second Ctrl-C must not leave half of it behind
            signal.signal(number, signal.SIG_IGN)
        try:
            _delete([f"{self._name}-{rank}" for rank in (*range(self._size), "switch")])
        finally:
            for number, handler in held.items():
                signal.signal(number, handler)


def serve_sample(listener: socket.socket) -> dict[str, float]:
    """The trainer's end of a plain transfer over the link, both ways; what it measured.

    Payload bits a second from here to there and back, and the round trip of one byte in ms.
    """
    listener.settimeout(30)
    end, _ = listener.accept()
    with end:
        end.settimeout(60)
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        trips = []
        for _ in range(_PINGS):
            began = time.perf_counter()
            end.sendall(b"p")
            _read(end, 1)
            trips.append(time.perf_counter() - began)
        there_s, back_s = [], []
        for _ in range(_SAMPLES):
            began = time.perf_counter()
            _write(end, _SAMPLE_NBYTES)
            _read(end, 1)
            there_s.append(time.perf_counter() - began)
            began = time.perf_counter()
            end.sendall(b"g")
            _read(end, _SAMPLE_NBYTES)
            back_s.append(time.perf_counter() - began)
    return {
        "there_mbit_s": round(8e-6 * _SAMPLE_NBYTES / min(there_s), 1),
        "back_mbit_s": round(8e-6 * _SAMPLE_NBYTES / min(back_s), 1),
        "round_trip_ms": round(1e3 * sorted(trips)[_PINGS // 2], 3),
    }


def take_sample(address: str, port: int) -> None:
    """The worker's end of serve_sample()."""
    with socket.create_connection((address, port), timeout=30) as end:
        end.settimeout(60)
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(_PINGS):
            _read(end, 1)
            end.sendall(b"p")
        for _ in range(_SAMPLES):
            _read(end, _SAMPLE_NBYTES)
            end.sendall(b"d")
            _read(end, 1)
            _write(end, _SAMPLE_NBYTES)


def _write(end: socket.socket, nbytes: int) -> None:
    chunk = bytes(_CHUNK)
    for _ in range(nbytes // _CHUNK):
        end.sendall(chunk)


def _read(end: socket.socket, nbytes: int) -> None:
    buffer = bytearray(_CHUNK)
    while nbytes:
        got = end.recv_into(buffer, min(nbytes, _CHUNK))
        if not got:
            raise LinkError("the other end of the plain transfer left")
        nbytes -= got


def _do(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, timeout=20)
    if done.returncode:
        raise LinkError(f"{' '.join(words)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def _delete(names: list[str]) -> None:
    there = set(_spaces())
    for name in names:
        if name in there:
            with suppress(LinkError, subprocess.TimeoutExpired):
                _do("ip", "netns", "del", name)


def _spaces() -> list[str]:
    return [line.split()[0] for line in _do("ip", "netns", "list").splitlines() if line.strip()]


def _sweep() -> None:
    """Remove what a bench that was killed has left."""
    for name in _spaces():
        found = re.fullmatch(rf"{_NAME}-(\d+)-\w+", name)
        if found and not os.path.exists(f"/proc/{found[1]}"):
            _delete([name])
