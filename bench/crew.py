"""Worker processes that may die, seen from the trainer: started, told, ended, dead."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_START_S = 90.0
_PROGRAM = Path(__file__).with_name("crew_worker.py")


class WorkerFailed(RuntimeError):
    """A worker raised, or died without having been told to; the message is its traceback."""


@dataclass
class Worker:
    """One worker process: what it was told, and what it has said so far."""

    name: str
    process: subprocess.Popen[bytes]
    pipe: Connection
    #: (version, when its weights held it), in the order of the applies.
    applied: list[tuple[int, float]] = field(default_factory=list)
    #: What it said besides, by kind.
    said: dict[str, Any] = field(default_factory=dict)
    #: That it may die: a fault was ordered.
    doomed: bool = False
    #: Says what it failed with.
    error: str | None = None
    news: threading.Condition = field(default_factory=threading.Condition)

    def tell(self, *what: Any) -> None:
        """Say something to it."""
        self.pipe.send(what)

    def wait(self, kind: str, timeout_s: float) -> Any:
        """The next thing of this kind that it says; TimeoutError, WorkerFailed."""
        with self.news:
            done = self.news.wait_for(lambda: kind in self.said or self.error, timeout_s)
            if kind in self.said:
                return self.said.pop(kind)
        if not done:
            raise TimeoutError(f"{self.name} did not say {kind!r} within {timeout_s:g} s")
        raise WorkerFailed(f"{self.name}: {self.error}")

    def held(self, version: int) -> float | None:
        """When its weights first held this version or a later one (time.monotonic), or None."""
        with self.news:
            return next((at for held, at in self.applied if held >= version), None)

    def settled(self, version: int) -> bool:
        """Whether it has come to this version, or has failed."""
        return self.error is not None or self.held(version) is not None

    def resume(self) -> None:
        """SIGCONT."""
        os.kill(self.process.pid, signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL, and wait for it."""
        self.doomed = True
        self.process.kill()
        self.process.wait(10)

    def listen(self) -> None:
        """Until its pipe breaks: on a thread of its own."""
        while True:
            try:
                kind, what = self.pipe.recv()
            except (EOFError, OSError):
                with self.news:
                    if not self.doomed:
                        self.error = self.error or "died"
                    self.news.notify_all()
                return
            with self.news:
                if kind == "error":
                    self.error = what
                elif kind == "say" and what[0] == "applied":
                    self.applied.append(what[1])
                elif kind == "say":
                    self.said[what[0]] = what[1]
                self.news.notify_all()


class Crew:
    """Starts workers; whatever is left of them ends with this object."""

    def __init__(self) -> None:
        self._all: list[Worker] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.end()

    def start(self, configs: list[tuple[str, Any]]) -> list[Worker]:
        """A process for each (name, config), started at once and waited for until prepared."""
        started: list[Worker] = []
        with tempfile.TemporaryDirectory(prefix="sparsecast-bench-") as folder:
            path = str(Path(folder) / "control")
            with Listener(path, family="AF_UNIX", backlog=len(configs)) as listener:
                processes = [
                    subprocess.Popen(
                        [sys.executable, str(_PROGRAM), path, str(rank + 1)],
                        stdin=subprocess.DEVNULL,
                        env={"TORCH_CPP_LOG_LEVEL": "ERROR", **os.environ},
                        start_new_session=True,
                    )
                    for rank in range(len(configs))
                ]
                try:
                    for pipe, rank in self._accept(listener, processes):
                        name, config = configs[rank - 1]
                        pipe.send(config)
                        worker = Worker(name, processes[rank - 1], pipe)
                        started.append(worker)
                        threading.Thread(target=worker.listen, daemon=True).start()
                except BaseException:
                    for process in processes:
                        process.kill()
                    raise
        self._all += started
        deadline = time.monotonic() + _START_S
        for worker in started:
            worker.wait("prepared", max(deadline - time.monotonic(), 0))
        return sorted(started, key=lambda worker: worker.name)

    def _accept(
        self, listener: Listener, processes: list[subprocess.Popen[bytes]]
    ) -> list[tuple[Connection, int]]:
        found: list[tuple[Connection, int]] = []

        def accept() -> None:
            with contextlib.suppress(OSError, EOFError):
                for _ in processes:
                    pipe = listener.accept()
                    found.append((pipe, pipe.recv()))

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        deadline = time.monotonic() + _START_S
        while len(found) < len(processes):
            thread.join(0.1)
            dead = [p.returncode for p in processes if p.poll() is not None]
            if dead:
                raise WorkerFailed(f"a worker ended with status {dead[0]} before it had begun")
            if time.monotonic() > deadline:
                raise TimeoutError(f"the workers did not start within {_START_S:g} s")
        return found

    def end(self) -> None:
        """End every process: asked first, killed after two seconds. Idempotent."""
        for worker in self._all:
            worker.doomed = True
            if worker.process.poll() is None:
                worker.resume()
                with contextlib.suppress(OSError):
                    worker.tell("end")
        deadline = time.monotonic() + 2.0
        for worker in self._all:
            try:
                worker.process.wait(max(deadline - time.monotonic(), 0.01))
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait(10)
            worker.pipe.close()
        self._all.clear()
