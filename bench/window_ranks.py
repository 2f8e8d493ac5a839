"""The processes of bench/window.py: rank 0 sends, the others receive; one GPU each with nccl."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import torch

import stats
from control import Control, run_rank
from devices import Device
from sparsecast.messages.control import WindowKind
from sparsecast.pipeline.bus.nats import connect
from sparsecast.pipeline.windows import Window, WindowSpec, bounce, open_window

#: No single step takes so long; a window for which one does is broken.
PATIENCE_S = 20.0
#: Each size is sent for about so long, within these bounds.
_SECONDS, _LEAST, _MOST = 0.3, 9, 300
_WARMUP = 3
_AGAIN = 4


@dataclass(frozen=True, slots=True)
class Config:
    """What the parent asks of all ranks."""

    url: str
    window: WindowKind
    ranks: int
    sizes: tuple[int, ...]
    pieces: tuple[int, ...]


def main(control: Control, config: Config) -> Any:
    """Run a rank to its end; what it measured."""
    torch.set_num_threads(1)
    device = Device("cuda" if config.window == "nccl" else "cpu", control.rank)
    try:
        import uvloop
    except ImportError:  # no build for this platform
        loop_factory = None
    else:
        loop_factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        rank = _Rank(control, config, device, runner)
        return rank.run()


class _Rank:
    def __init__(
        self, control: Control, config: Config, device: Device, runner: asyncio.Runner
    ) -> None:
        self._control = control
        self._config = config
        self._device = device
        self._runner = runner
        self._number = 0
        self._attempt = 0

    def run(self) -> dict[str, Any]:
        config = self._config
        largest = max(config.sizes)
        self._memory = torch.full(
            (largest,), self._control.rank, dtype=torch.uint8, device=self._device.torch
        )
        self._device.synchronize()
        self._bus = self._do(
            connect(config.url, name=f"rank-{self._control.rank}", timeout_s=PATIENCE_S)
        )
        found: dict[str, Any] = {}
        window, found["open_first_ms"] = self._open()
        closes, opens = [], []
        for _ in range(_AGAIN):
            closes.append(self._clocked(window.close()))
            window, took = self._open()
            opens.append(took)
        found["close_ms"], found["open_again_ms"] = stats.spread(closes), stats.spread(opens)
        plain = _Plain(self._control, config.ranks) if config.window == "nccl" else None
        found["sizes"] = [self._size(window, nbytes, plain) for nbytes in config.sizes]
        if plain is not None:
            kept = bounce.PIECE_NBYTES
            found["pieces"] = []
            for piece in config.pieces:
                bounce.PIECE_NBYTES = piece
                times = self._rounds(window, self._memory)
                one = {"piece_nbytes": piece, "nbytes": largest, "window_us": stats.spread(times)}
                found["pieces"].append(one)
            bounce.PIECE_NBYTES = kept
            found["host"] = self._through_host(window)
        # Every 4,096th byte: rank 0's are 0, those of each receiver were its rank.
        found["bytes_right"] = bool((self._memory[::4096] == 0).all())
        found["abort_ms"] = self._clocked(window.abort())
        self._do(self._bus.close())
        return found

    def _do(self, work: Any) -> Any:
        return self._runner.run(_of(work))

    def _clocked(self, work: Awaitable[None]) -> float:
        began = time.perf_counter()
        self._do(work)
        return 1e3 * (time.perf_counter() - began)

    def _open(self) -> tuple[Window, float]:
        self._number += 1
        spec = WindowSpec(
            kind=self._config.window,
            prefix=f"sparsecast.bench.w.{self._number}",
            epoch=1,
            window=self._number,
            rank=self._control.rank,
            size=self._config.ranks,
            device=str(self._device.torch),
        )
        window = open_window(spec, self._bus)
        meet(self._control, self._config.ranks)
        took_ms = self._clocked(window.open(PATIENCE_S))
        # As a trainer waits for everyone's word: rank 0 answers the others from its loop, and one
        # that stood still or left would keep them in open() until their deadline.
        self._do(asyncio.to_thread(meet, self._control, self._config.ranks))
        return window, took_ms

    def _size(self, window: Window, nbytes: int, plain: _Plain | None) -> dict[str, Any]:
        memory = self._memory[:nbytes]
        ours = self._rounds(window, memory)
        found = {"nbytes": nbytes, "window_us": stats.spread(ours)}
        if plain is not None:
            meet(self._control, self._config.ranks)
            theirs = plain.times(memory, len(ours))
            found["plain_us"] = stats.spread(theirs)
            found["plain_over_window"] = round(
                stats.percentile(theirs, 0.5) / stats.percentile(ours, 0.5), 3
            )
        return found

    def _rounds(
        self, window: Window, memory: torch.Tensor, count: int | None = None
    ) -> list[float]:
        """µs of each round, by this rank's clock: from the call to its return."""
        count = count or self._agreed(window, memory)
        work = window.receive if self._control.rank else window.send

        async def rounds() -> list[float]:
            times = []
            for _ in range(count):
                self._attempt += 1
                began = time.perf_counter()
                await work(memory, attempt=self._attempt, timeout_s=PATIENCE_S)
                times.append(1e6 * (time.perf_counter() - began))
            return times

        meet(self._control, self._config.ranks)
        found: list[float] = self._runner.run(rounds())
        return found

    def _agreed(self, window: Window, memory: torch.Tensor) -> int:
        """How many rounds: rank 0 decides by those that warm up."""
        took_s = 1e-6 * min(self._rounds(window, memory, _WARMUP))
        if self._control.rank:
            return int(self._control.hear(PATIENCE_S))
        count = max(_LEAST, min(_MOST, int(_SECONDS / took_s)))
        self._control.say(count)
        return count

    def _through_host(self, window: Window) -> list[dict[str, Any]]:
        """From and to host memory, where patches are that outgrow the staging on a GPU."""
        found = []
        nbytes = min(self._memory.numel(), 300 << 20)
        for pinned in (False, True):
            host = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=pinned)
            for way in ("from", "into"):
                at_host = (self._control.rank == 0) is (way == "from")
                memory = host if at_host else self._memory[:nbytes]
                self._rounds(window, memory, 1)
                times = self._rounds(window, memory, 3)
                found.append(
                    {"way": f"{way} {'pinned' if pinned else 'pageable'}", "nbytes": nbytes,
                     "window_us": stats.spread(times)}
                )  # fmt: skip
        return found


class _Plain:
    """One NCCL broadcast of the whole, in a communicator of its own: a window's measure."""

    def __init__(self, control: Control, ranks: int) -> None:
        from sparsecast.pipeline.windows.communicator import Communicator, Library
        from sparsecast.pipeline.windows.lifecycle import Deadline
        from sparsecast.pipeline.windows.side import Side

        library = Library()
        if control.rank == 0:
            identity = library.unique_id()
            control.say(identity)
        else:
            identity = control.hear(PATIENCE_S)
        self._side = Side(control.rank)
        self._deadline: Callable[[], Deadline] = lambda: Deadline(PATIENCE_S)
        self._communicator = Communicator("plain", library)
        self._communicator.connect(control.rank, ranks, identity, self._deadline())

    def times(self, memory: torch.Tensor, count: int) -> list[float]:
        """µs of each of `count` broadcasts, by this rank's clock: from the call to its end."""
        found = []
        for number in range(-_WARMUP, count):
            began = time.perf_counter()
            self._communicator.broadcast(memory, self._side.handle, self._deadline())
            done = self._side.mark()
            while not done.query():  # type: ignore[no-untyped-call]
                if time.perf_counter() - began > PATIENCE_S:
                    raise TimeoutError(f"a plain broadcast did not end within {PATIENCE_S:g} s")
            if number >= 0:
                found.append(1e6 * (time.perf_counter() - began))
        return found


def meet(control: Control, ranks: int) -> None:
    """Return when all ranks have come."""
    if control.rank:
        control.say("here")
        control.hear(PATIENCE_S)
    else:
        for _ in range(ranks - 1):
            control.hear(PATIENCE_S)
        control.say("all here")


async def _of(work: Awaitable[Any]) -> Any:
    return await work


if __name__ == "__main__":
    run_rank(main)
