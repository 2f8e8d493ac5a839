"""Ports within gloo's values, and cutting connections."""

import os
import socket
import struct

from sparsecast.pipeline.windows import sockets


def test_ports_are_found_where_the_kernel_puts_them() -> None:
    """A socket address among other bytes, after an occurrence of the address that is none."""
    v4 = struct.pack("=H", socket.AF_INET) + (4711).to_bytes(2, "big") + bytes([10, 1, 2, 3])
    assert sockets.find_port(b"\0" * 7 + v4 + b"\0" * 9, "10.1.2.3") == 4711
    assert sockets.find_port(bytes([10, 1, 2, 3]) + b"\0" * 7 + v4, "10.1.2.3") == 4711
    assert sockets.find_port(v4, "10.1.2.4") is None
    assert sockets.find_port(b"", "10.1.2.3") is None
    packed = socket.inet_pton(socket.AF_INET6, "fd00::7")
    v6 = struct.pack("=H", socket.AF_INET6) + (99).to_bytes(2, "big") + bytes(4) + packed
    assert sockets.find_port(b"\x01" + v6, "fd00::7") == 99


def test_only_the_named_connections_are_cut() -> None:
    """One connection from a listener and one to it are cut; another one is left alone."""
    with (
        socket.create_server(("127.0.0.1", 0)) as first,
        socket.create_server(("127.0.0.1", 0)) as second,
    ):
        one = socket.create_connection(first.getsockname())
        two = socket.create_connection(second.getsockname())
        ends = [one, two, first.accept()[0], second.accept()[0]]
        descriptors = len(os.listdir("/proc/self/fd"))
        listener = {first.getsockname()}
        assert sockets.count(listener, set()) == 1
        assert sockets.count(listener, listener) == 2
        assert sockets.sever(listener, listener) == 2
        assert len(os.listdir("/proc/self/fd")) == descriptors
        one.settimeout(5)
        assert one.recv(1) == b""
        two.sendall(b"x")
        ends[3].settimeout(5)
        assert ends[3].recv(1) == b"x"
        for end in ends:
            end.close()
    assert sockets.count(listener, listener) == 0
