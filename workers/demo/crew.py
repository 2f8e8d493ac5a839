"""The demo's workers: started as anyone would start them, and never left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self


@dataclass(slots=True)
class _Hand:
    name: str
    process: subprocess.Popen[bytes]
    log: Path
    told: bool = False


class Crew:
    """Worker processes of one run. Leaving the context ends them all, whatever happened.

    Each holds the reading end of a pipe as its stdin and ends when that closes, so that a killed
    demo leaves none behind.
    """

    def __init__(self, *, run: str, bus: str, model: Path, window: str, logs: Path) -> None:
        self._run = run
        self._bus = bus
        self._model = model
        self._window = window
        self._logs = logs
        self._hands: list[_Hand] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, name: str, device: str) -> int:
        """Start one worker on a device; its process id."""
        log = self._logs / f"{name}.log"
        # One thread: two generate nine times slower on a busy two-core machine.
        environment = os.environ | {
            "SPARSECAST_BUS": self._bus,
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONUNBUFFERED": "1",
        }
        for settings in ("SPARSECAST_CONFIG", "SPARSECAST_MAX_LAG", "SPARSECAST_OFFLINE_S"):
            environment.pop(settings, None)
        with log.open("wb") as file:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "sparsecast.workers.cli", "worker"),
                    *("--run", self._run, "--name", name, "--model", str(self._model)),
                    *("--device", device, "--window", self._window, "--until-stdin-closes"),
                ],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                # Ctrl-C is the demo's to answer: it ends them in order.
                start_new_session=True,
            )
        self._hands.append(_Hand(name, process, log))
        return process.pid

    def newly_dead(self) -> list[tuple[str, str]]:
        """The workers that ended since the last call, each with how and its last words."""
        found = []
        for hand in self._hands:
            code = hand.process.poll()
            if code is not None and not hand.told:
                hand.told = True
                how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
                words = hand.log.read_text(errors="replace").strip().splitlines()[-15:]
                found.append((hand.name, "\n".join([f"ended with {how}", *words])))
        return found

    def last_words(self) -> list[str]:
        """The last line that each worker wrote."""
        found = []
        for hand in self._hands:
            lines = hand.log.read_text(errors="replace").strip().splitlines()
            found.append(f"{hand.name}: {lines[-1] if lines else 'starting'}")
        return found

    @property
    def alive(self) -> list[str]:
        """The names of the workers that run."""
        return [hand.name for hand in self._hands if hand.process.poll() is None]

    def stop(self, timeout_s: float = 8.0) -> list[str]:
        """End all: SIGTERM, and SIGKILL after `timeout_s`. The names of those that needed it."""
        for hand in self._hands:
            hand.told = True
            if hand.process.poll() is None:
                hand.process.terminate()
        deadline = time.monotonic() + timeout_s
        killed = []
        for hand in self._hands:
            try:
                hand.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                hand.process.kill()
                hand.process.wait()
                killed.append(hand.name)
            if hand.process.stdin is not None:
                hand.process.stdin.close()
        return killed
