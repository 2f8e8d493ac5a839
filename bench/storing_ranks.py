"""The processes of bench/storing.py: two runs side by side, one of which has a log.

Rank 0 is the trainer of both, every other rank a worker of both; each run has weights of its own
on every rank, and takes the same steps.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch

from control import Control, run_rank
from heard import Heard
from shapes import Cut, Tensors, make_weights, train_step
from sparsecast import Broker, Policy, Publisher, Replica, digest
from sparsecast.messages.control import LogEntry
from sparsecast.messages.errors import LogHole
from sparsecast.messages.manifest import Manifest
from sparsecast.pipeline.log.base import Log, Progress
from stats import cpu_s

#: Runs of these names; the first one stores.
KINDS = ("log", "nothing")
#: No single step takes so long; a process for which one does is broken.
PATIENCE_S = 60.0
#: Rounds before anything is measured.
WARMUP = 5


@dataclass(frozen=True, slots=True)
class Config:
    """What the parent asks of all ranks."""

    cut: Cut
    workers: int
    blocks: int
    rounds: int
    intervals_s: tuple[float, ...]
    density: float
    threads: int
    seed: int


class Nothing:
    """A tier that says that it has stored, and has nothing: what misses a round stays behind."""

    durable = True

    async def store(
        self, entry: LogEntry, payload: bytes | memoryview, *, timeout_s: float
    ) -> None:
        """Let go of it."""

    async def entries(self, *, timeout_s: float) -> list[LogEntry]:
        """None."""
        return []

    async def load(
        self, entry: LogEntry, *, timeout_s: float, progress: Progress | None = None
    ) -> bytes:
        """LogHole."""
        raise LogHole("nothing is stored here", version=entry.version)

    async def prune(self, drop: Sequence[LogEntry], *, timeout_s: float) -> None:
        """There is nothing to drop."""

    async def manifest(self, manifest_hash: str, *, timeout_s: float) -> Manifest | None:
        """None."""
        return None


def main(control: Control, config: Config) -> Any:
    """Run a rank to its end; the trainer's result is what the parent writes down."""
    torch.set_num_threads(config.threads)
    if control.rank:
        return _work(control, config)
    return _Trainer(control, config).run()


def _logs(kind: str) -> str | Log:
    return "jetstream" if kind == "log" else Nothing()


#: An anchor in mid-measurement would be no part of what a round's patch costs.
_POLICY = Policy(anchor_every=1_000_000)


@dataclass
class _Run:
    """One of the two, as its trainer has it: the same start and the same steps as the other."""

    kind: str
    weights: Tensors
    publisher: Publisher
    heard: Heard
    random: torch.Generator
    versions: list[int] = field(default_factory=list)


class _Trainer:
    def __init__(self, control: Control, config: Config) -> None:
        self._control = control
        self._config = config
        self._broker = Broker()
        self._nbytes = 0

    def run(self) -> dict[str, Any]:
        config = self._config
        with ExitStack() as stack:
            url = stack.enter_context(self._broker)
            runs = {kind: self._open(stack, url, kind) for kind in KINDS}
            self._control.say(url)
            self._control.answers("ready", config.workers, PATIENCE_S)
            for run in runs.values():
                self._gather(run)
            paces = [self._pace(runs, interval_s) for interval_s in config.intervals_s]
            window = runs["log"].publisher.window
            self._control.say(("digest",))
            mine = {kind: digest(run.weights) for kind, run in runs.items()}
            equal = all(
                theirs == mine
                for theirs in self._control.answers("digest", config.workers, PATIENCE_S)
            )
            self._control.say(("end",))
            self._control.answers("end", config.workers, PATIENCE_S)  # the broker is ours
        return {
            "paces": paces,
            "window": window,
            "nbytes": self._nbytes,
            "digests_equal": equal,
        }

    def _open(self, stack: ExitStack, url: str, kind: str) -> _Run:
        config = self._config
        weights = make_weights(config.cut, config.seed)
        publisher = Publisher(weights, run=kind, bus=url, policy=_POLICY, log=_logs(kind))
        stack.enter_context(publisher)
        heard = Heard(url, kind)
        stack.callback(heard.close)
        return _Run(kind, weights, publisher, heard, torch.Generator().manual_seed(config.seed + 1))

    def _gather(self, run: _Run) -> None:
        """Until every worker is in the window, and a few rounds have gone through it."""
        run.publisher.wait_members(self._config.workers, timeout_s=PATIENCE_S)
        run.heard.wait(lambda: run.publisher.window, PATIENCE_S, "a window is open")
        if run.kind == "log":
            run.heard.wait_stored(0, PATIENCE_S)
        for _ in range(WARMUP):
            self._round(run)
        self._settle(run)

    def _pace(self, runs: dict[str, _Run], interval_s: float) -> dict[str, Any]:
        """Blocks of both kinds in turns, each kind the first one as often as the other."""
        blocks = []
        for number in range(self._config.blocks):
            self._control.send(
                "progress",
                f"every {interval_s:g} s: block {number + 1} of {self._config.blocks}",
            )
            order = itertools.islice(itertools.cycle(KINDS), number % 2, number % 2 + 2)
            blocks.append({kind: self._block(runs[kind], interval_s) for kind in order})
        return {"interval_s": interval_s, "blocks": blocks}

    def _block(self, run: _Run, interval_s: float) -> dict[str, Any]:
        """Some rounds; all is proven and stored on return, and its CPU time is in the figures."""
        n = self._config.rounds
        cpu, broker_cpu = time.process_time(), cpu_s(self._broker.pid)
        took, due = [], time.monotonic()
        first = run.publisher.version + 1
        for _ in range(n):
            took.append(self._round(run, due))
            due = max(due + interval_s, time.monotonic()) if interval_s else 0.0
        self._settle(run)
        told = [run.heard.trainer(v) for v in range(first, run.publisher.version + 1)]
        members = self._config.workers
        return {
            "round_ms": took,
            "cpu_ms": 1e3 * (time.process_time() - cpu) / n,
            "broker_cpu_ms": 1e3 * (cpu_s(self._broker.pid) - broker_cpu) / n,
            "astray": sum(
                one is None or one.attempt != 1 or one.transport == "log" or one.applied != members
                for one in told
            ),
        }

    def _round(self, run: _Run, due: float = 0.0) -> float:
        """ms from publish() until the trainer has heard that every worker holds the update."""
        train_step(run.weights, self._config.density, run.random)
        time.sleep(max(due - time.monotonic(), 0))
        began = time.perf_counter()
        update = run.publisher.publish()
        report = update.wait_applied(timeout_s=PATIENCE_S)
        took = 1e3 * (time.perf_counter() - began)
        if not report.complete or len(report.applied) != self._config.workers:
            raise RuntimeError(f"version {update.version} is not everywhere: {report}")
        self._nbytes = update.nbytes
        return took

    def _settle(self, run: _Run) -> None:
        """Until what was published is proven, and stored: it is to disturb no other block."""
        last = run.publisher.version
        run.heard.wait(
            lambda: run.heard.trainer(last), PATIENCE_S, f"the metrics of version {last}"
        )
        if run.kind == "log":
            run.heard.wait_stored(last, PATIENCE_S)


def _work(control: Control, config: Config) -> None:
    url = control.hear(PATIENCE_S)
    held = {kind: make_weights(config.cut, config.seed) for kind in KINDS}
    with ExitStack() as stack:
        for kind in KINDS:
            replica = Replica(
                held[kind],
                run=kind,
                bus=url,
                name=f"worker-{control.rank - 1}",
                policy=_POLICY,
                log=_logs(kind),
            )
            replica.start()
            stack.callback(replica.stop)
        control.say(("ready",))
        assert control.hear(3600.0) == ("digest",)
        control.say(("digest", {kind: digest(tensors) for kind, tensors in held.items()}))
        assert control.hear(PATIENCE_S) == ("end",)
    control.say(("end",))


if __name__ == "__main__":
    run_rank(main)
