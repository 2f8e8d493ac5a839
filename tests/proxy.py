"""A TCP proxy before a real server: cuts, stalls and rewrites what passes."""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Self
from urllib.parse import urlsplit


class Proxy:
    """`async with Proxy(url) as proxy:` clients connect to `proxy.url` instead of `url`.

    `from_server` may be set to a function that rewrites (or swallows) the server's bytes.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._target = (parts.hostname, parts.port)
        self.from_server: Callable[[bytes], bytes] = bytes
        self._down = asyncio.Event()
        self._down.set()
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

    def stall(self) -> None:
        """Hold back what the server says; what the client says goes on."""
        self._down.clear()

    def flow(self) -> None:
        """Let it pass again."""
        self._down.set()

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
                if not up:
                    await self._down.wait()
                    data = self.from_server(data)
                writer.write(data)
                await writer.drain()
