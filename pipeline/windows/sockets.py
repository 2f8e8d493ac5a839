"""The TCP connections of a collective library: found, counted and cut from outside."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Collection, Iterator

#: (address, port) of one end of a TCP connection.
Endpoint = tuple[str, int]


def find_port(blob: bytes, address: str) -> int | None:
    """The port of the socket address (as the kernel lays it out) of `address` within `blob`."""
    v6 = ":" in address
    packed = socket.inet_pton(socket.AF_INET6 if v6 else socket.AF_INET, address)
    family = int(socket.AF_INET6 if v6 else socket.AF_INET).to_bytes(2, sys.byteorder)
    before = 8 if v6 else 4  # family and port, and for IPv6 the flow label
    at = blob.find(packed)
    while at >= 0:
        if at >= before and blob[at - before : at - before + 2] == family:
            return int.from_bytes(blob[at - before + 2 : at - before + 4], "big")
        at = blob.find(packed, at + 1)
    return None


def count(local: Collection[Endpoint], remote: Collection[Endpoint]) -> int:
    """How many TCP connections this process has from a `local` or to a `remote` endpoint.

    Off Linux it finds none.
    """
    return sum(1 for _ in _connections(local, remote))


def sever(local: Collection[Endpoint], remote: Collection[Endpoint]) -> int:
    """Shut down this process's TCP connections from a `local` or to a `remote` endpoint.

    Whoever blocks on one sees the end of the stream at once; the descriptors stay their owner's.
    Returns how many were cut. Off Linux it cuts none.
    """
    cut = 0
    for end in _connections(local, remote):
        with contextlib.suppress(OSError):  # its owner was faster
            end.shutdown(socket.SHUT_RDWR)
            cut += 1
    return cut


def _connections(
    local: Collection[Endpoint], remote: Collection[Endpoint]
) -> Iterator[socket.socket]:
    """Each connection as a duplicate, closed when the next is asked for."""
    try:
        descriptors = os.listdir("/proc/self/fd")
    except OSError:
        return
    for name in descriptors:
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            # A duplicate: the number may be closed and given to another socket at any moment, so
            # ask and act on what cannot change hands.
            end = socket.socket(fileno=os.dup(int(name)))
        except OSError:
            continue
        with end:
            try:
                if end.type != socket.SOCK_STREAM or end.family not in _FAMILIES:
                    continue
                here, there = end.getsockname()[:2], end.getpeername()[:2]
            except OSError:
                continue  # it listens, or has just been closed
            if here in local or there in remote:
                yield end


_FAMILIES = (socket.AF_INET, socket.AF_INET6)
