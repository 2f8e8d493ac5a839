"""How the processes of a bench keep step: pipes to the parent, which relays. No part of a round."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Client, Connection, Listener, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_START_S = 60.0


class RankFailed(RuntimeError):
    """A process of the bench raised or died; its traceback is the message."""


class Control:
    """A rank's end. Rank 0 (the trainer) speaks to all workers, a worker to the trainer."""

    def __init__(self, pipe: Connection, rank: int) -> None:
        self._pipe = pipe
        self._lock = threading.Lock()
        self._heard: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.rank = rank
        threading.Thread(target=self._listen, daemon=True).start()

    def say(self, what: Any) -> None:
        """To the trainer, or to all workers."""
        self.send("say", what)

    def hear(self, timeout_s: float) -> Any:
        """The next thing said to this rank; TimeoutError."""
        try:
            return self._heard.get(timeout=timeout_s)
        except queue.Empty:
            raise TimeoutError(f"rank {self.rank} heard nothing for {timeout_s:g} s") from None

    def answers(self, expected: str, n: int, timeout_s: float) -> list[Any]:
        """What `n` workers say to the trainer, one (kind, what) or (kind,) each, in their order.

        RuntimeError if one says anything else than `expected`; TimeoutError.
        """
        found: dict[int, Any] = {}
        while len(found) < n:
            rank, (kind, *rest) = self.hear(timeout_s)
            if kind != expected:
                raise RuntimeError(f"rank {rank} says {kind}, expected was {expected}")
            found[rank] = rest[0] if rest else None
        return [found[rank] for rank in sorted(found)]

    def send(self, kind: str, what: Any) -> None:
        """To the parent: say, progress, result or error."""
        with self._lock:
            self._pipe.send((kind, what))

    def _listen(self) -> None:
        while True:
            try:
                self._heard.put(self._pipe.recv())
            except (EOFError, OSError):
                os._exit(77)  # the parent is gone: leave no orphan behind


def run_rank(main: Callable[[Control, Any], Any]) -> None:
    """The main of a rank's process: connect to the parent, run, report."""
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    path, rank = sys.argv[1], int(sys.argv[2])
    pipe = Client(path, family="AF_UNIX")
    pipe.send(rank)
    config = pipe.recv()
    control = Control(pipe, rank)
    try:
        control.send("result", main(control, config))
    except BaseException:
        control.send("error", traceback.format_exc())


def go_first() -> None:
    """Let this process, and all that it starts from now on, run before all others (SCHED_RR).

    PermissionError without root. Niceness would count within the session alone: to the scheduler
    a session is a group of its own.
    """
    os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))


class Ranks:
    """The parent's end: starts `size` processes of `program`, relays, and ends what is left."""

    def __init__(
        self,
        program: Path,
        size: int,
        config: Any,
        *,
        prefix: Callable[[int], Sequence[str]] = lambda rank: (),
        on_progress: Callable[[Any], None] = lambda what: None,
    ) -> None:
        self._program = program
        self._size = size
        self._config = config
        self._prefix = prefix
        self._on_progress = on_progress
        self._processes: list[subprocess.Popen[bytes]] = []
        self._pipes: dict[Connection, int] = {}

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._end()

    def run(self, timeout_s: float) -> dict[int, Any]:
        """Relay until every rank has ended; their results. RankFailed, TimeoutError."""
        results: dict[int, Any] = {}
        deadline = time.monotonic() + timeout_s
        while len(results) < self._size:
            ready = wait(list(self._pipes), timeout=max(deadline - time.monotonic(), 0))
            if not ready:
                raise TimeoutError(f"the bench did not end within {timeout_s:g} s")
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = self._pipes[pipe]
                try:
                    kind, what = pipe.recv()
                except (EOFError, OSError):
                    if rank in results:
                        del self._pipes[pipe]
                        continue
                    code = self._processes[rank].wait(5)
                    raise RankFailed(f"rank {rank} died with status {code}") from None
                if kind == "say":
                    for other, its in self._pipes.items():
                        if (its == 0) != (rank == 0):
                            other.send(what if rank == 0 else (rank, what))
                elif kind == "progress":
                    self._on_progress(what)
                elif kind == "result":
                    results[rank] = what
                else:
                    raise RankFailed(f"rank {rank}:\n{what}")
        return results

    def _start(self) -> None:
        with tempfile.TemporaryDirectory(prefix="sparsecast-bench-") as folder:
            path = str(Path(folder) / "control")
            with Listener(path, family="AF_UNIX") as listener:
                for rank in range(self._size):
                    words = [sys.executable, str(self._program), path, str(rank)]
                    self._processes.append(
                        subprocess.Popen(
                            [*self._prefix(rank), *words],
                            stdin=subprocess.DEVNULL,
                            # c10d warns that an address of a namespace has no host name.
                            env={"TORCH_CPP_LOG_LEVEL": "ERROR", **os.environ},
                            start_new_session=True,  # an interrupt at the terminal is the parent's
                        )
                    )
                accepted: queue.SimpleQueue[Connection] = queue.SimpleQueue()

                def accept() -> None:
                    with contextlib.suppress(OSError):
                        for _ in range(self._size):
                            accepted.put(listener.accept())

                threading.Thread(target=accept, daemon=True).start()
                deadline = time.monotonic() + _START_S
                for _ in range(self._size):
                    pipe = self._accepted(accepted, deadline)
                    self._pipes[pipe] = pipe.recv()
                    pipe.send(self._config)

    def _accepted(self, accepted: queue.SimpleQueue[Connection], deadline: float) -> Connection:
        while time.monotonic() < deadline:
            with contextlib.suppress(queue.Empty):
                return accepted.get(timeout=0.2)
            dead = [p.returncode for p in self._processes if p.poll() is not None]
            if dead:
                raise RankFailed(f"a rank ended with status {dead[0]} before it had begun")
        raise TimeoutError(f"the ranks did not start within {_START_S:g} s")

    def _end(self) -> None:
        for pipe in self._pipes:
            pipe.close()  # a rank that still runs leaves by itself
        for process in self._processes:
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(5)
