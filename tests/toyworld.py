"""A toy run for the tests of the core: trainer and replicas over a network that misbehaves.

Everything but the state machines is a toy: weights are a dict of a few numbers, a patch is the
changed ones, journal and log are lists, the clock is a number. Every broken rule is an
AssertionError at the step where it happens. All that is random comes from one seed.
"""

from __future__ import annotations

import heapq
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sparsecast.messages import control as msg
from sparsecast.messages.control import Sender, Stamp
from sparsecast.messages.manifest import Manifest, TensorSpec
from sparsecast.pipeline.core import commands as cmd
from sparsecast.pipeline.core import events as ev
from sparsecast.pipeline.core.ledger import RoundRecord
from sparsecast.pipeline.core.policy import Policy

if TYPE_CHECKING:
    from toyprocess import Process
    from toyreplica import Replica
    from toytrainer import Trainer

MANIFEST = Manifest(tensors=(TensorSpec("w", "bfloat16", (8,)),))
KEYS = 8
QUICK = Policy(
    heartbeat_s=0.2, silence_s=1.5, ready_s=0.4, commit_s=1.2, open_s=0.6, send_s=0.6, guard_s=0.3,
    settle_s=2.0, probe_s=0.3, backoff_s=0.2, backoff_max_s=2.0, retry_s=0.05, bus_s=0.5,
    store_s=1.0,
)  # fmt: skip

Weights = dict[int, int]
Key = tuple[int, int, str]


def digest(weights: Weights) -> int:
    """The toy's digest."""
    return zlib.crc32(repr(sorted(weights.items())).encode())


@dataclass
class Patch:
    """Numbers that carry any version in [base, version) to `version`; base None is an anchor."""

    base: int | None
    version: int
    values: Weights
    digest: int


def merged(patches: list[Patch]) -> Patch:
    """One patch for a chain of them."""
    result = patches[0]
    for patch in patches[1:]:
        assert patch.base is not None
        assert patch.base <= result.version < patch.version, "merged patches leave a hole"
        values = {**result.values, **patch.values}
        result = Patch(result.base, patch.version, values, patch.digest)
    return result


@dataclass
class Faults:
    """How likely each misfortune is (0 to 1); all of them off by default."""

    lose: float = 0.0
    twice: float = 0.0
    slow: float = 0.0
    append: float = 0.0
    store: float = 0.0
    window: float = 0.0
    corrupt: float = 0.0
    flip: float = 0.0
    readers: float = 0.0
    torn: float = 0.0
    early: float = 0.0
    diff: float = 0.0


@dataclass
class Op:
    """Something that a process asked for and that has not ended."""

    process: Process
    #: The stamp of a send, or the command of a receive.
    what: Any = None
    done: bool = False

    def end(self, event: Any) -> None:
        if not self.done:
            self.done = True
            self.process.post(event)


@dataclass
class ToyWindow:
    """A communicator: nothing moves before all ranks are there."""

    size: int
    dead: bool = False
    opens: dict[int, Op] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    sends: dict[int, Op] = field(default_factory=dict)
    receives: dict[int, dict[int, Op]] = field(default_factory=dict)

    def ops(self) -> list[tuple[int, str, Op]]:
        found = [(rank, "open", op) for rank, op in self.opens.items()]
        found += [(0, "send", op) for op in self.sends.values()]
        found += [(r, "receive", op) for ops in self.receives.values() for r, op in ops.items()]
        return [entry for entry in found if not entry[2].done]


class World:
    """Clock, network, journal, log and windows, and the rules that hold whatever happens."""

    def __init__(self, seed: int, policy: Policy = QUICK) -> None:
        self.random = random.Random(seed)
        self.policy = policy
        self.faults = Faults()
        self.now = 100.0
        self.steps = 0
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        #: The bus is away until then; the log is.
        self.bus_away = 0.0
        self.log_away = 0.0
        self.journal: list[msg.Claim | msg.Announce] = []
        #: Every version that the journal has ever taken, by the life of its trainer.
        self.accepted: set[tuple[str, int]] = set()
        #: How often the bus has forgotten it, and whether it is there now.
        self.journals = 0
        self.journal_gone = False
        #: Entries by epoch and writer: two trainers that know nothing of each other may claim one
        #: epoch, each in a journal of its own.
        self.log: list[tuple[int, str, Patch]] = []
        #: What each version is, by the life of the trainer that made it.
        self.history: dict[tuple[str, int], Weights] = {}
        self.trainer: Trainer | None = None
        self.replicas: dict[str, Replica] = {}
        #: By epoch, number and trainer: two trainers that know nothing of each other may meet.
        self.windows: dict[Key, ToyWindow] = {}
        self.openings: dict[Key, tuple[Sender, ...]] = {}
        #: Who has committed to which stamp of which trainer, and until when.
        self.committed: dict[tuple[Sender, Stamp, str], float] = {}
        #: Trainers that were replaced and do not know it yet.
        self.zombies: list[Trainer] = []
        self.lives = 0
        self.tells: list[cmd.Tell] = []
        self.settled: list[RoundRecord] = []

    # ---- time

    def at(self, time: float, what: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._queue, (time, self._count, what))

    def after(self, seconds: float, what: Callable[[], None]) -> None:
        self.at(self.now + seconds, what)

    def run(self, seconds: float, until: Callable[[], bool] | None = None) -> bool:
        """Let time pass; True once `until` holds."""
        end = self.now + seconds
        while self._queue and self._queue[0][0] <= end:
            self.now, _, what = heapq.heappop(self._queue)
            self.steps += 1
            what()
            if until is not None and until():
                return True
        self.now = end
        return until is not None and until()

    def chance(self, likely: float) -> bool:
        return likely > 0 and self.random.random() < likely

    def delay(self) -> float:
        if self.chance(self.faults.slow):
            return self.random.uniform(0.0, 1.0)
        return self.random.uniform(0.0002, 0.004)

    def life(self, name: str) -> Sender:
        self.lives += 1
        return Sender(name, f"life-{self.lives}")

    def trainers(self) -> list[Trainer]:
        return [*self.zombies, *([self.trainer] if self.trainer else [])]

    # ---- the bus

    def carry(self, deliver: Callable[[], None]) -> None:
        """A message that may be lost, doubled, late, and overtaken by others."""
        if self.now < self.bus_away or self.chance(self.faults.lose):
            return
        self.after(self.delay(), deliver)
        if self.chance(self.faults.twice):
            self.after(self.delay(), deliver)

    def append(self, message: msg.Claim | msg.Announce, expected: int) -> int | str:
        """Compare-and-set: the new length of the journal, or what is wrong."""
        if message in self.journal:
            return self.journal.index(message) + 1
        if len(self.journal) != expected:
            return "fenced"
        if isinstance(message, msg.Announce):
            earlier = [m for m in self.journal if isinstance(m, msg.Announce)]
            same = [m.version for m in earlier if m.stamp.epoch == message.stamp.epoch]
            assert not same or same[-1] < message.version, "announced versions do not increase"
        self.journal.append(message)
        self.accepted.add((message.sender.incarnation, message.version))
        for replica in self.replicas.values():
            self.after(self.delay(), replica.follow)
        return len(self.journal)

    def claimant(self) -> Sender | None:
        """Who has claimed the run last."""
        claims = [message for message in self.journal if isinstance(message, msg.Claim)]
        return claims[-1].sender if claims else None

    def way(self, epoch: int, writer: str, held: int | None, target: int) -> list[Patch]:
        """Entries of the log from `held` to at least `target`, or nothing."""
        known = [patch for e, w, patch in self.log if (e, w) == (epoch, writer)]
        found: list[Patch] = []
        at = held
        if at is None:
            anchors = [patch for patch in known if patch.base is None]
            if not anchors:
                return []
            found = [max(anchors, key=lambda patch: patch.version)]
            at = found[0].version
        while True:
            steps = [p for p in known if p.base is not None and p.base <= at < p.version]
            if not steps:
                return found if at >= target else []
            found.append(max(steps, key=lambda patch: patch.version))
            at = found[-1].version

    # ---- windows

    def enter(self, process: Process, stamp: Stamp) -> None:
        """The rule of all rules: nobody enters a collective before all have committed to it."""
        _, _, trainer = key = process.key(stamp)
        for member in self.openings[key]:
            assert (member, stamp, trainer) in self.committed, (
                f"{process} enters {stamp}: {member} has not"
            )

    def break_off(self, key: Key, process: Process) -> None:
        """One rank leaves or dies: others may notice at once, later, or at their deadline."""
        window = self.windows.get(key)
        if window is None or process.label not in window.ranks:
            return
        window.dead = True
        for rank, what, op in window.ops():
            if rank == window.ranks[process.label]:
                op.done = True
            elif self.chance(0.7):
                self.after(self.delay(), lambda what=what, op=op: self.fail(key, what, op))

    def fail(self, key: Key, what: str, op: Op) -> None:
        if not op.done:
            op.process.failed(key, what, op)

    def progress(self, key: Key, attempt: int | None) -> None:
        """See whether all ranks are where this needs them."""
        window = self.windows[key]
        if window.dead or self.chance(self.faults.window):
            return
        if attempt is None:
            if len(window.opens) == window.size:
                for op in window.opens.values():
                    self.after(self.delay(), lambda op=op: op.end(ev.WindowOpened(*key[:2])))
            return
        send, receives = window.sends.get(attempt), window.receives.get(attempt, {})
        everyone = len(receives) == window.size - 1
        if send is None:
            return
        # Completion at the root is not receipt, and some ranks may have it before others came.
        if everyone or self.chance(0.2):
            self.after(self.delay(), lambda: send.end(ev.Sent(key[1], attempt)))
        for op in receives.values():
            if everyone or self.chance(0.3):
                self.after(self.delay(), lambda op=op: op.process.landed(op))
