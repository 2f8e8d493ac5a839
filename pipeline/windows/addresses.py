"""Which of this host's addresses a window listens on.

Gloo by itself resolves the host's name, which on many machines is 127.0.1.1 or nothing at all.
"""

from __future__ import annotations

import socket
import struct
import sys
from collections.abc import Sequence
from urllib.parse import urlsplit

from ...messages.errors import WindowUnavailable

#: Names the network interface to use, before any other choice.
INTERFACE_VARIABLE = "SPARSECAST_GLOO_INTERFACE"

_DEFAULT_PORT = 4222
_SIOCGIFADDR = 0x8915


def choose_address(label: str, courier: object, address: str | None, interface: str | None) -> str:
    """The address of `interface`, else `address`, else that by which the broker is reached, if the
    courier has its `url` (several, separated by commas: the first counts).

    WindowUnavailable, in the name of the window `label`, if there is none.
    """
    try:
        if interface is not None:
            return interface_address(interface)
        if address is not None:
            return address
        url = getattr(courier, "url", None)
        if isinstance(url, str):
            return broker_address(url)
    except (OSError, ValueError) as exc:
        where = f"interface {interface}" if interface else "the broker's network"
        raise WindowUnavailable(
            label, f"no address on {where} ({exc}); set {INTERFACE_VARIABLE}"
        ) from exc
    raise WindowUnavailable(label, f"no address is known to listen on; set {INTERFACE_VARIABLE}")


def reach(label: str, address: str, others: Sequence[str]) -> str:
    """`address`, or one that the other ranks can reach if that is the loopback and they are not.

    A broker on this host is reached by the loopback, but the other ranks may not be here.
    """
    elsewhere = [other for other in others if not is_loopback(other)]
    if not is_loopback(address) or not elsewhere:
        return address
    try:
        return route_address(elsewhere[0])
    except OSError as exc:
        raise WindowUnavailable(label, f"no way to the rank at {elsewhere[0]}: {exc}") from exc


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
