"""Which address a window listens on, and how its connections are cut.

Gloo by itself resolves the host's name, which on many machines is 127.0.1.1 or nothing at all.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import sys
from collections.abc import Collection, Iterator
from urllib.parse import urlsplit

#: (address, port) of one end of a TCP connection.
Endpoint = tuple[str, int]

_DEFAULT_PORT = 4222
_SIOCGIFADDR = 0x8915


def is_loopback(address: str) -> bool:
    """Whether only this host reaches the address."""
    return address.startswith("127.") or address == "::1"


def route_address(host: str, port: int = _DEFAULT_PORT) -> str:
    """The address by which this host reaches `host`; OSError if it does not. Sends nothing."""
    error: OSError | None = None
    for family, _, _, _, target in socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM):
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(target)
            except OSError as exc:
                error = exc
                continue
            return str(probe.getsockname()[0])
    raise error or OSError(f"{host} has no address")


def broker_address(url: str) -> str:
    """The address by which this host reaches the broker of `url`; OSError, ValueError."""
    first = url.split(",")[0].strip()
    parts = urlsplit(first if "://" in first else f"nats://{first}")
    return route_address(parts.hostname or "127.0.0.1", parts.port or _DEFAULT_PORT)


def interface_address(interface: str) -> str:
    """The IPv4 address of a network interface; OSError if it has none, or off Linux."""
    if sys.platform != "linux":
        raise OSError("looking up an interface's address works on Linux only")
    import fcntl

    request = struct.pack("256s", interface.encode()[:15])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
    return socket.inet_ntoa(answer[20:24])


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
