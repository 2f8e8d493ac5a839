"""The training loop of bench/recovery.py, which faults in workers must not hold up."""

from __future__ import annotations

import threading
import time

import torch

from models import change
from sparsecast import Publisher

#: publish() that takes longer hangs.
PATIENCE_S = 60.0


class Loop:
    """A training loop on a thread of its own: change, publish(), and how long that took."""

    def __init__(
        self,
        publisher: Publisher,
        tensors: dict[str, torch.Tensor],
        density: float,
        interval_s: float,
        seed: int,
    ) -> None:
        self._publisher = publisher
        self._tensors = tensors
        self._density = density
        self._interval_s = interval_s
        self._device = next(iter(tensors.values())).device
        self._random = torch.Generator(self._device).manual_seed(seed + 1)
        self._going = threading.Event()
        self._resting = threading.Event()
        self._over = False
        self._error: BaseException | None = None
        #: (began, seconds, version, bytes), in order.
        self.calls: list[tuple[float, float, int, int]] = []
        self._thread = threading.Thread(target=self._run, name="training-loop", daemon=True)
        self._thread.start()

    def go(self) -> None:
        """Train."""
        self._resting.clear()
        self._going.set()

    def pause(self) -> None:
        """Stop after the step that runs: the weights are those of the last publish."""
        self._going.clear()
        if not self._resting.wait(PATIENCE_S):
            raise TimeoutError(f"publish() did not return within {PATIENCE_S:g} s")
        self.check()

    def check(self) -> None:
        """Raise what publish() raised."""
        if self._error is not None:
            raise RuntimeError("the trainer's loop broke") from self._error

    def end(self) -> None:
        """No more steps."""
        self._over = True
        self._going.set()
        self._thread.join(PATIENCE_S)

    def _run(self) -> None:
        try:
            self._steps()
        except BaseException as exc:
            self._error = exc
        finally:
            self._resting.set()

    def _steps(self) -> None:
        device = self._device
        if device.type == "cuda":
            torch.cuda.set_device(device)
        due = time.monotonic()
        while True:
            if not self._going.is_set():
                self._resting.set()
                self._going.wait()
                due = time.monotonic()
            if self._over:
                return
            change(self._tensors, self._density, self._random)
            if device.type == "cuda":
                # The step's own work is no part of publish(). Not the whole device: a collective
                # that waits for a dead worker is pending there.
                torch.cuda.current_stream(device).synchronize()
            began = time.monotonic()
            update = self._publisher.publish()
            took = time.monotonic() - began
            self.calls.append((began, took, update.version, update.nbytes))
            due = max(due + self._interval_s, time.monotonic())
            time.sleep(max(due - time.monotonic(), 0))
