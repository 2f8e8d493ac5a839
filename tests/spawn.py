"""Real processes for tests: results by rank, every traceback in the parent, nothing left behind.

    results = spawn(3, scenario, 17, timeout_s=20, broker_url=url)      # scenario(context, 17)

    with Processes(3, scenario, 17, timeout_s=20, broker_url=url) as processes:
        processes.wait("receiving", rank=2)
        processes.kill(2)
        results = processes.results()                                   # [..., ..., KILLED]

A target is a function at the top of a module, `async` or not; it gets a `Context` first. Each
child is an operating-system process of its own (forked from a server that has imported torch and
the package and done nothing else, which saves seconds a process), with one torch thread and, for
a coroutine, an event loop of uvloop. A child that outlives its time is killed and named, with the
stacks of its threads.
"""

import asyncio
import faulthandler
import importlib.util
import inspect
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

#: What `results()` has for a process that was killed on purpose.
KILLED = "killed on purpose"

_PRELOAD = ["pytest", "uvloop", "sparsecast.workers.publisher", "sparsecast.workers.replica"]
#: How long the others may still run once one process has failed.
_AFTER_FAILURE_S = 3.0


class ProcessesFailed(AssertionError):
    """One or more processes raised, died or hung; `failures` maps rank to what is known."""

    def __init__(self, failures: dict[int, str]) -> None:
        super().__init__(
            "\n".join(f"---- rank {rank}: {text}" for rank, text in sorted(failures.items()))
        )
        self.failures = failures


# ---- the child's side


class Context:
    """What a target knows of itself, and how it keeps step with the other ranks."""

    def __init__(self, rank: int, size: int, broker_url: str, pipe: Connection) -> None:
        self.rank = rank
        self.size = size
        self.broker_url = broker_url
        self._pipe = pipe
        self._lock = threading.Lock()
        self._marks = _Marks(size)

    def mark(self, name: str) -> None:
        """Tell everyone, the parent too, that this rank has come to `name`."""
        self._send("mark", name)

    def wait(self, name: str, *, rank: int | None = None, timeout_s: float = 30.0) -> None:
        """Wait until `rank` (every rank: None; the parent: -1) has marked `name`; TimeoutError."""
        self._marks.wait(name, rank, timeout_s)

    def barrier(self, name: str, *, timeout_s: float = 30.0) -> None:
        """Mark `name`, and wait for all ranks to do so."""
        self.mark(name)
        self.wait(name, timeout_s=timeout_s)

    async def waiting(self, name: str, *, rank: int | None = None, timeout_s: float = 30.0) -> None:
        """`wait` for a coroutine: the loop goes on."""
        await asyncio.to_thread(self.wait, name, rank=rank, timeout_s=timeout_s)

    async def meeting(self, name: str, *, timeout_s: float = 30.0) -> None:
        """`barrier` for a coroutine: the loop goes on."""
        self.mark(name)
        await self.waiting(name, timeout_s=timeout_s)

    def _send(self, kind: str, value: object) -> None:
        with self._lock:
            self._pipe.send((kind, value))

    def _listen(self) -> None:
        while True:
            try:
                name, rank = self._pipe.recv()
            except (EOFError, OSError):
                os._exit(77)  # the parent is gone: leave no orphan behind
            self._marks.add(name, rank)


class _Marks:
    """Which rank has come to which name."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._seen: set[tuple[str, int]] = set()
        self.changed = threading.Condition()

    def add(self, name: str, rank: int) -> None:
        with self.changed:
            self._seen.add((name, rank))
            self.changed.notify_all()

    def missing(self, name: str, rank: int | None) -> list[int]:
        ranks = range(self._size) if rank is None else [rank]
        return [r for r in ranks if (name, r) not in self._seen]

    def wait(self, name: str, rank: int | None, timeout_s: float) -> None:
        with self.changed:
            if not self.changed.wait_for(lambda: not self.missing(name, rank), timeout_s):
                missing = self.missing(name, rank)
                raise TimeoutError(f"{name!r} not marked by ranks {missing} within {timeout_s:g} s")


def _child(
    pipe: Connection, rank: int, size: int, broker_url: str, target: tuple[str, ...], stacks: str
) -> None:
    context = Context(rank, size, broker_url, pipe)
    threading.Thread(target=context._listen, name="spawn-marks", daemon=True).start()
    # The file stays open until the process ends: the handler writes to it.
    faulthandler.register(signal.SIGUSR1, open(stacks, "w"), all_threads=True)  # noqa: SIM115 - open for life
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        import torch

        torch.set_num_threads(1)
        function, args = _load(*target)
        result = function(context, *args)
        if inspect.iscoroutine(result):
            import uvloop

            result = uvloop.run(result)
        context._send("result", result)
    except BaseException:
        context._send("error", traceback.format_exc())


def _load(file: str, module: str, name: str, args: bytes) -> tuple[Callable[..., Any], Any]:
    """Find the target by its file: under pytest's importlib mode no other process can import it."""
    if module not in sys.modules:
        spec = importlib.util.spec_from_file_location(module, file)
        assert spec is not None, file
        assert spec.loader is not None, file
        sys.modules[module] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[module])
    return getattr(sys.modules[module], name), pickle.loads(args)


# ---- the parent's side


class _Process:
    """One child, and what is known of it."""

    def __init__(self, rank: int, process: Any, pipe: Connection, stacks: str) -> None:
        self.rank = rank
        self.process = process
        self.pipe = pipe
        self.stacks = stacks
        self.done = False
        self.killed = False
        self.result: Any = None
        self.error: str | None = None


class Processes:
    """`size` processes that run `target(context, *args)`; see the module."""

    def __init__(
        self,
        size: int,
        target: Callable[..., Any],
        *args: Any,
        timeout_s: float,
        broker_url: str = "",
    ) -> None:
        self._size = size
        self._deadline_s = time.monotonic() + timeout_s
        self._timeout_s = timeout_s
        self._marks = _Marks(size)
        self._lock = threading.Lock()
        self._folder = tempfile.TemporaryDirectory(prefix="spawn-")
        self._processes: list[_Process] = []
        module = sys.modules[target.__module__]
        assert module.__file__ is not None
        where = (module.__file__, target.__module__, target.__qualname__, pickle.dumps(args))
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOAD)
        for rank in range(size):
            ours, theirs = context.Pipe()
            stacks = str(Path(self._folder.name) / str(rank))
            process = context.Process(
                target=_child, args=(theirs, rank, size, broker_url, where, stacks), daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(_Process(rank, process, ours, stacks))
        self._threads = [
            threading.Thread(target=self._listen, args=(process,), daemon=True)
            for process in self._processes
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.end()

    # ---- keeping step

    def pid(self, rank: int) -> int:
        """The process id of a rank."""
        return int(self._processes[rank].process.pid)

    def mark(self, name: str) -> None:
        """Mark `name` as the parent (rank -1 to the children)."""
        self._tell(name, -1)

    def wait(self, name: str, *, rank: int | None = None) -> None:
        """Wait until `rank` (every rank: None) has marked `name`.

        ProcessesFailed as soon as one of those has failed or ended, or at the deadline.
        """

        def settled() -> bool:
            missing = self._marks.missing(name, rank)
            return not missing or any(self._processes[r].done for r in missing)

        with self._marks.changed:
            self._marks.changed.wait_for(settled, self._remaining_s())
            missing = self._marks.missing(name, rank)
        if missing:
            failures = self._failures()
            for r in missing:
                failures.setdefault(r, f"did not come to {name!r}" + self._state(r))
            raise ProcessesFailed(failures)

    # ---- faults

    def kill(self, rank: int) -> None:
        """SIGKILL, on purpose: `results()` has KILLED for it."""
        process = self._processes[rank]
        process.killed = True
        process.process.kill()
        process.process.join(5)

    def stop(self, rank: int) -> None:
        """SIGSTOP: alive, but it does nothing."""
        os.kill(self.pid(rank), signal.SIGSTOP)

    def resume(self, rank: int) -> None:
        """SIGCONT."""
        os.kill(self.pid(rank), signal.SIGCONT)

    # ---- the end

    def results(self) -> list[Any]:
        """What each rank returned, by rank, once all have ended.

        ProcessesFailed with the traceback of each rank that raised, the signal of each that died,
        and the stacks of each that did not end in time.
        """
        with self._marks.changed:
            self._marks.changed.wait_for(self._settled, self._remaining_s())
            if not all(process.done for process in self._processes) and self._failures():
                wait_s = min(_AFTER_FAILURE_S, self._remaining_s())
                self._marks.changed.wait_for(lambda: all(p.done for p in self._processes), wait_s)
        failures = self._failures()
        for process in self._processes:
            if not process.done:
                failures[process.rank] = (
                    "was still running" if failures else f"did not end within {self._timeout_s:g} s"
                ) + self._state(process.rank)
        if failures:
            self.end()
            raise ProcessesFailed(failures)
        return [KILLED if p.killed else p.result for p in self._processes]

    def end(self) -> None:
        """Kill what still runs. Idempotent."""
        for process in self._processes:
            if process.process.is_alive():
                if process.done and not process.killed:
                    process.process.join(1)
                process.process.kill()
        for process, thread in zip(self._processes, self._threads, strict=True):
            process.process.join(5)
            thread.join(5)
            process.pipe.close()
        self._folder.cleanup()

    # ---- inside

    def _remaining_s(self) -> float:
        return max(0.0, self._deadline_s - time.monotonic())

    def _settled(self) -> bool:
        return all(process.done for process in self._processes) or bool(self._failures())

    def _failures(self) -> dict[int, str]:
        return {p.rank: p.error for p in self._processes if p.error is not None}

    def _state(self, rank: int) -> str:
        """Where a process is: the stacks of its threads."""
        process = self._processes[rank]
        if process.done:
            return ": it has ended"
        stacks = Path(process.stacks)
        if not stacks.exists():
            return ": it has not started"
        try:
            # A stopped process answers no signal; it is killed in any case.
            os.kill(self.pid(rank), signal.SIGCONT)
            os.kill(self.pid(rank), signal.SIGUSR1)
        except ProcessLookupError:
            return ": it is gone"
        time.sleep(0.3)
        return "; killed; its threads:\n" + stacks.read_text()

    def _tell(self, name: str, rank: int) -> None:
        self._marks.add(name, rank)
        with self._lock:
            for process in self._processes:
                try:
                    if not process.done:
                        process.pipe.send((name, rank))
                except OSError:
                    continue  # it has just ended: its own thread says how

    def _listen(self, process: _Process) -> None:
        settled = False
        while True:
            try:
                kind, value = process.pipe.recv()
            except (EOFError, OSError):
                break
            except Exception as exc:
                kind, value = "error", f"its result cannot be unpickled: {exc!r}"
            if kind == "mark":
                self._tell(value, process.rank)
                continue
            settled = True
            if kind == "result":
                process.result = value
            else:
                process.error = value
            break
        if not settled:
            process.process.join(5)
            if not process.killed:
                code = process.process.exitcode
                how = signal.Signals(-code).name if code is not None and code < 0 else code
                process.error = f"died without a word: {how}"
        with self._marks.changed:
            process.done = True
            self._marks.changed.notify_all()


def spawn(
    size: int, target: Callable[..., Any], *args: Any, timeout_s: float, broker_url: str = ""
) -> list[Any]:
    """Run `target(context, *args)` in `size` processes; returns the results by rank.

    ProcessesFailed if any raises, dies, or outlives `timeout_s`.
    """
    with Processes(size, target, *args, timeout_s=timeout_s, broker_url=broker_url) as processes:
        return processes.results()
