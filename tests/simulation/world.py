"""One simulated run: processes, faults from the seed, and the rules that must hold throughout.

    result = simulate(17)            # never raises for what the product does: result.violations
    result = simulate(17, trace=True)

What exists and what is seen is here; what happens when is the course's.
"""

import asyncio
import contextlib
import contextvars
import logging
import random
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch

from sparsecast.messages import codec
from sparsecast.messages.control import Announce, Claim, Opening
from sparsecast.pipeline.core import commands as cmd
from sparsecast.pipeline.core import events as ev
from sparsecast.pipeline.core.replica import ReplicaCore
from sparsecast.pipeline.core.trainer import TrainerCore
from sparsecast.pipeline.delta import digest
from sparsecast.workers.publisher import Report

from .broker import Broker
from .course import Broken, Course
from .describe import describe
from .disk import Disk
from .engine import fingerprint
from .lives import Life, TrainerLife, WorkerLife
from .loop import CURRENT, Hung, Process, Stuck, VirtualLoop
from .plan import Plan
from .windows import Fabric, Faults, SimWindow

#: A run has an end: the longest take 60 s of virtual time, and 13,000 callbacks.
LIMIT_S = 600.0
LIMIT_STEPS = 300_000


@dataclass
class Result:
    """What became of a seed."""

    seed: int
    violations: list[str] = field(default_factory=list)
    trace: list[str] = field(default_factory=list)
    faults: dict[str, int] = field(default_factory=dict)
    published: int = 0
    #: Rounds that ended, by their transport, and those of them that went before the journal knew;
    #: versions that workers applied, reads, resyncs.
    rounds: dict[str, int] = field(default_factory=dict)
    early: int = 0
    applied: int = 0
    reads: int = 0
    resyncs: int = 0
    epochs: int = 0
    virtual_s: float = 0.0
    converged_s: float = 0.0
    kept_most: int = 0
    steps: int = 0
    wall_s: float = 0.0


class World:
    """Everything of one run."""

    def __init__(self, seed: int, *, trace: bool) -> None:
        self.plan = Plan.of(seed)
        self.result = Result(seed)
        self.loop = VirtualLoop(limit_s=LIMIT_S, limit_steps=LIMIT_STEPS)
        self.rng = random.Random(f"world {seed}")
        self.broker = Broker(self.loop, random.Random(f"broker {seed}"))
        self.broker.watch = self._watch
        self.disk = Disk(self.loop, random.Random(f"disk {seed}"))
        self.fabric = Fabric(self.loop, random.Random(f"fabric {seed}"))
        self.fabric.faults = Faults(notices=self.rng.random())
        self.fabric.on_second = self._in_two_windows
        self.trainers: list[TrainerLife] = []
        #: The bits of every state that was ever published, by its digest; weights that some trainer
        #: has had, for others to begin with; the claims, in order.
        self.states: dict[int, str] = {}
        self.checkpoints: list[dict[str, torch.Tensor]] = []
        self.claims: list[Claim] = []
        self.workers: list[WorkerLife] = []
        self.healed = False
        self.closing = False
        self.over = False
        self.published = 0
        self.kept_most = 0
        self.largest = 0
        self._tracing = trace
        self.began = self.loop.time()
        self._names = 0
        self._claim: Claim | None = None
        #: Every version that the journal has taken, by the incarnation of its trainer.
        self.announced: set[tuple[str, int]] = set()
        self._lives: dict[Process | None, Life] = {}
        self.tasks: set[asyncio.Task[Any]] = set()

    # ---- words

    def note(self, who: str, *what: Any) -> None:
        """A line of the trace."""
        if self._tracing:
            at = self.loop.time() - self.began
            self.result.trace.append(f"{at:10.4f} {who:<12} {' '.join(map(describe, what))}")

    def violation(self, text: str) -> None:
        """A rule was broken."""
        if self.over:
            return
        at = self.loop.time() - self.began
        if len(self.result.violations) < 20:
            self.result.violations.append(f"{at:.4f} {text}")
        self.note("VIOLATION", text)

    def count(self, what: str) -> None:
        """A fault happened."""
        self.result.faults[what] = self.result.faults.get(what, 0) + 1

    # ---- lives

    def start_trainer(self, delay_s: float, *, patience_s: float = 0.0) -> None:
        """Start a trainer on the run."""

        async def start() -> None:
            await asyncio.sleep(delay_s)
            if self.closing:
                return
            life = TrainerLife(self, len(self.trainers) + 1, patience_s=patience_s)
            self.trainers.append(life)
            self._begin(life)

        self.spawn(start())

    def start_worker(self, name: str, slot: int, delay_s: float, *, retry: bool = True) -> None:
        """Start a worker."""

        async def start() -> None:
            await asyncio.sleep(delay_s)
            if self.closing:
                return
            self._names += 1
            life = WorkerLife(self, name, self._names, slot)
            life.retry = retry
            self.workers.append(life)
            self._begin(life)

        self.spawn(start())

    def _begin(self, life: Life) -> None:
        self.note(life.name, "starts")
        self._lives[life.process] = life
        life.process.spawn(life._live())

    def ended(self, life: Life) -> None:
        """A life's main has returned."""
        self.note(life.name, "has ended")
        if self.closing or life.leaving.is_set():
            return
        if isinstance(life, TrainerLife):
            others = [trainer for trainer in self.trainers if trainer.present]
            if not others:
                self.start_trainer(delay_s=1.0)
            elif life.patience_s > 0:
                self.start_trainer(delay_s=1.0, patience_s=life.patience_s - 1.0)
        elif isinstance(life, WorkerLife) and life.retry:
            self.start_worker(life.worker, life.slot, delay_s=2.0)

    def kill(self, life: Life) -> None:
        """SIGKILL."""
        self.note(life.name, "is killed")
        life.process.kill()
        life.live = False

    async def freeze(self, life: Life, seconds: float) -> None:
        """SIGSTOP, and SIGCONT later."""
        if life.process.frozen:
            return
        self.note(life.name, "is stopped")
        life.stops += 1
        life.process.freeze()
        await asyncio.sleep(seconds)
        if seconds > 9.0:
            for bus in life.buses:
                bus.cut(0.0)  # the server has given up on its connection
        self.note(life.name, "goes on")
        life.process.thaw()

    def calm(self) -> None:
        """The broker loses, doubles and delays nothing."""
        self.broker.loss = self.broker.doubles = self.broker.deaf = 0.0
        self.broker.latency_s = 0.0003

    def live_trainers(self) -> list[TrainerLife]:
        """Those that have begun and not ended."""
        return [trainer for trainer in self.trainers if trainer.present and trainer.live]

    def live_workers(self) -> list[WorkerLife]:
        """Those that have begun and not ended."""
        return [worker for worker in self.workers if worker.present and worker.live]

    def spawn(self, coroutine: Any) -> None:
        """Run something that is no process's; what is left of it is cancelled when all heals."""
        # In nobody's context: what a process asks for as it ends outlives it.
        task = self.loop.create_task(coroutine, context=contextvars.Context())
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def trainer_of(self, incarnation: str) -> TrainerLife | None:
        """The trainer of a claim."""
        for trainer in self.trainers:
            if trainer.tokens and trainer.tokens[0] == incarnation:
                return trainer
        return None

    # ---- what is seen

    def _watch(self, subject: str, data: bytes) -> None:
        if subject.endswith(".announced.claim"):
            claim = codec.decode(data, subject=subject)
            assert isinstance(claim, Claim)
            trainer = self.trainer_of(claim.sender.incarnation)
            assert trainer is not None
            self._claimed(claim, trainer)
            self.result.epochs += 1
            self._claim = claim
            self.note("journal", claim)
        elif subject.endswith(".announced.update"):
            announce = codec.decode(data, subject=subject)
            assert isinstance(announce, Announce)
            self.announced.add((announce.sender.incarnation, announce.version))
            holder = self._claim
            if holder is None or (announce.sender, announce.stamp.epoch) != (
                holder.sender,
                holder.epoch,
            ):
                self.violation(f"the journal took {describe(announce)} under {describe(holder)}")

    def _claimed(self, claim: Claim, trainer: TrainerLife) -> None:
        """What a claim calls its version is what some trainer has published, or begins with; what
        a trainer begins with comes next."""
        if claim.version not in trainer.table:
            bits = trainer.table[claim.version] = self.states.get(claim.digest, "nobody's")
            if bits != trainer.initial:
                trainer.table[claim.version + 1] = trainer.initial
            self.count("resumed" if self.claims and bits != trainer.initial else "claimed")
        if self.states.get(claim.digest) != trainer.table[claim.version]:
            self.violation(f"{trainer.name} claims what is not version {claim.version}")
        self.claims.append(claim)

    def know(self, weights: dict[str, torch.Tensor]) -> str:
        """The bits of a trainer's weights, which are published from here on."""
        published = self.plan.published(weights)
        bits = fingerprint(published)
        self.states[digest(published)] = bits
        return bits

    def bits_of(self, trainer: TrainerLife, version: int) -> str | None:
        """What a version is to a trainer: its own, or that of the epoch it was announced in."""
        if version in trainer.table:
            return trainer.table[version]
        for claim in reversed(self.claims):
            earlier = self.trainer_of(claim.sender.incarnation)
            if claim.version <= version and earlier is not None:
                return earlier.table.get(version)
        return None

    def _in_two_windows(self, window: SimWindow, other: SimWindow) -> None:
        self.violation(f"{window.process.name} opens {window} while it is in {other}")

    def check_report(self, trainer: TrainerLife, report: Report) -> None:
        """Who is reported to hold a version has held it."""
        for name in report.applied:
            held = [
                life.held.get(trainer.tokens[0], -1) for life in self.workers if life.worker == name
            ]
            if max(held, default=-1) < report.version:
                self.violation(
                    f"{trainer.name} reports version {report.version} as applied by {name}, "
                    f"which never held more than {max(held, default=-1)} of its versions"
                )

    def saw(self, core: Any, event: Any, commands: list[Any]) -> None:
        """A core has handled an event."""
        life = self._lives.get(CURRENT.get())
        if life is None:
            return
        if self._tracing and (commands or not isinstance(event, ev.Tick)):
            self.note(life.name, event, *(["→", *commands] if commands else []))
        for command in commands:
            match command:
                case cmd.Settled(record):
                    kind = record.transport if record.window else "log"
                    self.result.rounds[kind] = self.result.rounds.get(kind, 0) + 1
                    early = record.window > 0 and record.went_at < record.announced_at
                    self.result.early += early
                case cmd.Say(Opening(members=members)):
                    among = sorted(m.name for m in members if m.name in self.plan.evaluators)
                    if among:
                        self.violation(f"a window is to be opened with {among}, who evaluate")
                case cmd.Append(announce):
                    self.largest = max(self.largest, announce.nbytes)
                case cmd.Quarantine() if isinstance(life, WorkerLife):
                    life.on_resync()
        if isinstance(event, ev.AppliedHere):
            self.result.applied += 1
        if isinstance(life, WorkerLife) and not isinstance(event, ev.Tick):
            life.check()

    # ---- the run

    def run(self) -> Result:
        """Play it."""
        began = time.perf_counter()
        main = self.loop.create_task(self._main())
        try:
            self.loop.run_until_complete(main)
        except (Stuck, Hung) as exc:
            self.violation(f"stuck: {exc}; the run {_where(main)}")
        result, loop = self.result, self.loop
        result.virtual_s = loop.time() - self.began
        result.published = self.published
        result.kept_most = self.kept_most
        result.steps = loop.steps
        result.reads = sum(life.reads for life in self.workers)
        result.resyncs = sum(life.resyncs for life in self.workers)
        result.faults |= self.broker.counts | self.fabric.counts
        for complaint in loop.complaints:
            self.violation(complaint)
        self.over = True
        try:
            loop.finish()
        except (Stuck, Hung) as exc:
            result.violations.append(f"stuck at the end: {exc}")
        result.wall_s = time.perf_counter() - began
        return result

    async def _main(self) -> None:
        try:
            await Course(self).play()
        except Broken:
            pass
        except Exception:
            self.violation(f"raised: {traceback.format_exc()}")


def _where(task: asyncio.Task[Any]) -> str:
    """Where a task waits, from the outside in."""
    names: list[str] = []
    awaited: Any = task.get_coro()
    while (code := getattr(awaited, "cr_code", None)) is not None:
        names.append(code.co_name)
        awaited = awaited.cr_await
    return "has ended" if task.done() else f"waits in {' > '.join(names)}"


class _Ears(logging.Handler):
    """Whatever the product logs as an error is a violation."""

    def __init__(self, world: World) -> None:
        super().__init__(logging.ERROR)
        self._world = world

    def emit(self, record: logging.LogRecord) -> None:
        self._world.violation(f"logged by {record.name}: {record.getMessage()[:2000]}")


@contextlib.contextmanager
def _observed(world: World) -> Iterator[None]:
    trainer_handle, replica_handle = TrainerCore.handle, ReplicaCore.handle

    def of_trainer(self: TrainerCore, event: Any, now: float) -> Any:
        commands = trainer_handle(self, event, now)
        world.saw(self, event, commands)
        return commands

    def of_replica(self: ReplicaCore, event: Any, now: float) -> Any:
        commands = replica_handle(self, event, now)
        world.saw(self, event, commands)
        return commands

    logger, ears = logging.getLogger("sparsecast"), _Ears(world)
    logger.addHandler(ears)
    propagate, logger.propagate = logger.propagate, False
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with (
            mock.patch.object(TrainerCore, "handle", of_trainer),
            mock.patch.object(ReplicaCore, "handle", of_replica),
        ):
            yield
    finally:
        logger.removeHandler(ears)
        logger.propagate = propagate
        logger.setLevel(level)


def simulate(seed: int, *, trace: bool = False) -> Result:
    """Play the run of one seed. Deterministic: the same seed gives the same trace."""
    torch.set_num_threads(1)
    world = World(seed, trace=trace)
    try:
        with _observed(world):
            return world.run()
    finally:
        world.disk.close()
