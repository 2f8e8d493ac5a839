"""Real servers in the hands of a test: one with a configuration of the test's own, and a TCP proxy
before any of them, which cuts, stalls and rewrites what passes."""

import asyncio
import contextlib
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

from sparsecast.pipeline.bus.broker import server_binary


async def until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    """Wait until something has happened elsewhere."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event of its own
            await asyncio.sleep(0.005)


@contextlib.contextmanager
def nats_server(folder: Path, config: str) -> Iterator[str]:
    """A nats-server with this configuration (port and store are added); yields host:port."""
    path = folder / "server.conf"
    path.write_text(f'port: -1\nhost: 127.0.0.1\nports_file_dir: "{folder}"\n{config}\n')
    server = subprocess.Popen([server_binary(), "-c", path], stderr=subprocess.DEVNULL)
    try:
        yield _address(server, folder)
    finally:
        server.terminate()
        server.wait(5)


def _address(server: "subprocess.Popen[bytes]", folder: Path) -> str:
    end = time.monotonic() + 10
    while time.monotonic() < end:
        for path in folder.glob("*.ports"):
            with contextlib.suppress(ValueError):  # half written
                url: str = json.loads(path.read_text())["nats"][0]
                return url.removeprefix("nats://")
        assert server.poll() is None, "the configuration was refused"
        time.sleep(0.01)
    raise TimeoutError("no nats-server within 10 s")


class Proxy:
    """`async with Proxy(url) as proxy:` clients connect to `proxy.url` instead of `url`.

    `from_server` and `from_client` may be set to functions that see and rewrite what passes.
    """

    def __init__(self, url: str) -> None:
        self.lead_to(url)
        self.from_server: Callable[[bytes], bytes] = bytes
        self.from_client: Callable[[bytes], bytes] = bytes
        #: Each piece that passes waits so long.
        self.delay_s = 0.0
        self._down, self._up = asyncio.Event(), asyncio.Event()
        self.flow()
        self._refusing = False
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.url = ""

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"nats://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self.cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self, *, refuse: bool = False) -> None:
        """Break every connection; with `refuse`, new ones too, until accept()."""
        self._refusing = refuse
        for writer in list(self._writers):
            writer.transport.abort()

    def accept(self) -> None:
        """Take new connections again."""
        self._refusing = False

    def stall(self, *, both: bool = False) -> None:
        """Hold back what the server says; what the client says goes on, unless `both`."""
        self._down.clear()
        if both:
            self._up.clear()

    def flow(self) -> None:
        """Let it pass again."""
        self._down.set()
        self._up.set()

    def lead_to(self, url: str) -> None:
        """Connect who comes from now on to this server."""
        parts = urlsplit(url)
        self._target = (parts.hostname, parts.port)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._refusing:
            writer.transport.abort()
            return
        try:
            upstream, out = await asyncio.open_connection(*self._target)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, out}
        both = [
            asyncio.ensure_future(self._pump(reader, out, up=True)),
            asyncio.ensure_future(self._pump(upstream, writer, up=False)),
        ]
        self._tasks.update(both)
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        for end in (writer, out):
            end.transport.abort()
            self._writers.discard(end)

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, up: bool
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                await (self._up if up else self._down).wait()
                writer.write(self.from_client(data) if up else self.from_server(data))
                await writer.drain()
