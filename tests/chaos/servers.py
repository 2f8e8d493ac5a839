"""The broker of a chaos run, as the command line starts it, in the hands of the test."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

#: Runs a program of Python in a process that dies with its starter, even while it is stopped.
DYING = (
    "import ctypes, runpy, sys; ctypes.CDLL(None).prctl(1, 9); del sys.argv[0];"
    "runpy.run_path(sys.argv[0], run_name='__main__')"
)
SPARSECAST = Path(sys.executable).with_name("sparsecast")


def command(program: Path, *arguments: str) -> list[str]:
    """A program of Python as a process of this very environment."""
    return [sys.executable, "-c", DYING, str(program), *arguments]


def environment(home: Path) -> dict[str, str]:
    """This process's, without settings of its own, and a private place for advertisements."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("SPARSECAST_")}
    return kept | {"XDG_RUNTIME_DIR": str(home)}


class Server:
    """`sparsecast broker`, which may be killed, stopped, and started again with what it stored."""

    def __init__(self, folder: Path, died: Callable[[str], None]) -> None:
        self._folder = folder
        self._died = died
        self._watching: asyncio.Task[None] | None = None
        self._stores = 0
        self._process: asyncio.subprocess.Process | None = None
        self.url = ""
        #: Of the nats-server: what is killed and stopped is that, as an operator would see it.
        self.pid = 0

    async def start(self, *, forgetful: bool = False) -> None:
        """Start it; `forgetful`: without what was stored before."""
        self._stores += forgetful
        store = self._folder / f"store-{self._stores}"
        self._process = await asyncio.create_subprocess_exec(
            *command(SPARSECAST, "broker", "--store-dir", str(store)),
            env=environment(self._folder),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        assert self._process.stdout is not None
        async with asyncio.timeout(20):
            line = (await self._process.stdout.readline()).decode()
        assert line.startswith("broker: "), line
        self.url = line.removeprefix("broker: ").strip()
        advertised = json.loads((self._folder / "sparsecast-broker.json").read_text())
        self.pid = int(advertised["pid"])
        self._watching = asyncio.create_task(self._watch(self._process))

    async def _watch(self, process: asyncio.subprocess.Process) -> None:
        assert process.stderr is not None
        last_words = (await process.stderr.read()).decode()
        code = await process.wait()
        self._died(f"the broker died by itself ({code}): {last_words}")

    def signal(self, number: signal.Signals) -> None:
        """SIGKILL, SIGSTOP or SIGCONT to the nats-server."""
        os.kill(self.pid, number)

    async def kill(self) -> None:
        """SIGKILL; returns once nothing of it is left. Idempotent."""
        process, self._process = self._process, None
        if process is None or self._watching is None:
            return
        self._watching.cancel()
        for pid in (self.pid, process.pid):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        await process.wait()
