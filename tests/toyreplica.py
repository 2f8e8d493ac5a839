"""The toy run's worker: weights, staging and guard."""

from collections.abc import Callable
from typing import Any

from sparsecast.messages import control as msg
from sparsecast.messages.control import Stamp
from sparsecast.pipeline.core import commands as cmd
from sparsecast.pipeline.core import events as ev
from sparsecast.pipeline.core.replica import ReplicaCore
from toyprocess import Process
from toyworld import KEYS, MANIFEST, Key, Op, Patch, Weights, World, digest


class Replica(Process):
    """A worker's process: weights, staging, guard."""

    core: ReplicaCore

    def __init__(self, world: World, name: str, kinds: tuple[Any, ...] = ("gloo", "bus")) -> None:
        super().__init__(world, world.life(name))
        self.kinds = kinds
        self.core = ReplicaCore(
            run="toy", me=self.me, kinds=kinds, device="cpu", host="h", pid=1,
            policy=world.policy, started=world.now,
        )  # fmt: skip
        self.weights: Weights = dict.fromkeys(range(KEYS), -1)
        self.version: int | None = None
        self.torn = False
        self.flipped = False
        self.staged: dict[int, Patch] = {}
        self.busy: set[str] = set()
        self.receiving: Op | None = None
        self.highest = (0, 0)
        self.follows = ""
        self.error: Exception | None = None
        self.commands: list[cmd.ReplicaCommand] = []
        self._heard = 0
        self._journals = world.journals
        world.replicas[name] = self
        world.after(0.0, self.begin)

    @property
    def trainer_life(self) -> str:
        assert self.core.claim is not None
        return self.core.claim.sender.incarnation

    def begin(self) -> None:
        self.follow()
        self.post(ev.Tick())

    def follow(self) -> None:
        """The journal's messages, in order and once each, whatever was missed meanwhile."""
        world = self.world
        if world.now < max(world.bus_away, self.frozen_until):
            world.at(max(world.bus_away, self.frozen_until) + 0.01, self.follow)
            return
        if self._journals != world.journals:
            self._journals, self._heard = world.journals, 0
        while self._heard < len(world.journal):
            self._heard += 1
            self.post(ev.FromTrainer(world.journal[self._heard - 1]))

    def check(self) -> None:
        core = self.core
        if not self.closed and core.error is None:
            assert core.next_deadline() is not None
        assert len(core._lane.staging.patches) <= 200
        assert len(core._announced.digests) <= 1024

    def once(self, what: str) -> None:
        assert what not in self.busy, f"{self}: two of {what} at once"
        self.busy.add(what)

    def work(self, what: str, work: Callable[[], Any]) -> None:
        """A work on the weights: one at a time, ever."""
        assert not self.busy & {"apply", "digest", "prove"}, f"{self}: {what} and {self.busy}"
        self.once(what)

        def run() -> Any:
            self.busy.discard(what)
            return work()

        self.lane(self.world.delay(), run)

    def perform(self, command: cmd.ReplicaCommand) -> None:
        world = self.world
        if not isinstance(command, cmd.Report):
            self.commands = [*self.commands[-40:], command]
        match command:
            case cmd.Report(message):
                if isinstance(message, msg.Ready):
                    commitment = (self.me, message.stamp, self.trainer_life)
                    world.committed[commitment] = world.now + message.expires_s
                for trainer in world.trainers():
                    world.carry(lambda t=trainer: t.post(ev.FromWorker(message)))
            case cmd.Tell():
                world.tells.append(command)
            case cmd.Fail(error):
                self.error = error
            case cmd.OpenWindow(stamp):
                self.obey(stamp)
                self.open(command)
            case cmd.AbortWindow(window) | cmd.CloseWindow(window):
                for key in [key for key in world.windows if key[1] == window]:
                    world.break_off(key, self)
            case cmd.Receive():
                self.receive(command)
            case cmd.Prove(claim):
                self.work("prove", lambda: self.prove(claim))
            case cmd.Apply(versions):
                self.work("apply", lambda: self.apply(versions))
            case cmd.Digest(version):
                self.work("digest", lambda: self.digest(version))
            case cmd.Hold(version):
                self.lane(0.0, lambda: setattr(self, "version", version))
            case cmd.Quarantine():
                self.lane(0.0, lambda: setattr(self, "torn", True))
            case cmd.Drop(versions):
                gone = versions
                self.lane(0.0, lambda: [self.staged.pop(v, None) for v in gone or ()] and None)
            case cmd.Fetch():
                self.once("fetch")
                world.after(world.delay(), lambda: self.fetch(command))

    def obey(self, stamp: Stamp) -> None:
        until = self.world.committed[self.me, stamp, self.trainer_life]
        assert self.world.now < until, f"{self} enters {stamp} after its commitment has run out"
        if self.trainer_life != self.follows:
            assert stamp.epoch >= self.highest[0], f"{self} follows a lower epoch"
            self.follows, self.highest = self.trainer_life, (0, 0)
        assert (stamp.epoch, stamp.window) >= self.highest, f"{self} obeys the lower {stamp}"
        self.highest = (stamp.epoch, stamp.window)

    def stage(self, patch: Patch) -> None:
        known = self.staged.get(patch.version)
        if known is not None and (
            known.base is None or (patch.base is not None and known.base <= patch.base)
        ):
            return
        self.staged[patch.version] = patch

    def receive(self, command: cmd.Receive) -> None:
        world, stamp = self.world, command.stamp
        self.obey(stamp)
        world.enter(self, stamp)
        assert self.receiving is None or self.receiving.done, "two receives at once"
        key = self.key(stamp)
        window = world.windows[key]
        op = self.receiving = Op(self, command)
        rank = window.ranks[self.label]
        window.receives.setdefault(stamp.attempt, {})[rank] = op
        world.after(command.timeout_s, lambda: world.fail(key, "receive", op))
        world.progress(key, stamp.attempt)

    def landed(self, op: Op) -> None:
        if op.done:
            return
        command: cmd.Receive = op.what
        stamp, announce = command.stamp, command.announce
        identity = (stamp.epoch, stamp.window, stamp.attempt)
        if self.world.chance(self.world.faults.corrupt):
            op.end(ev.ReceiveFailed(*identity, stamp.version, "bytes flipped", corrupt=True))
            return
        op.done = True
        # The bytes on the wire are those that were announced, whatever was merged since.
        base, history, life = announce.base_version, self.world.history, announce.sender.incarnation
        before, after = history[life, base], history[life, stamp.version]
        values = {key: after[key] for key in range(KEYS) if after[key] != before[key]}
        wire = Patch(base, stamp.version, values, announce.digest)

        def stage() -> ev.Staged | ev.ReceiveFailed:
            if life != self.trainer_life:
                why = "another claim came meanwhile"
                return ev.ReceiveFailed(*identity, stamp.version, why, corrupt=False)
            if not command.scratch:
                self.stage(wire)
            return ev.Staged(stamp, announce)

        self.lane(self.world.delay(), stage)

    def failed(self, key: Key, what: str, op: Op) -> None:
        if what == "open":
            op.end(ev.WindowFailed(*key[:2], "the toy's window did not open"))
            return
        stamp = op.what.stamp
        identity = (stamp.epoch, stamp.window, stamp.attempt)
        op.end(ev.ReceiveFailed(*identity, stamp.version, "the toy's peer is gone", corrupt=False))

    def prove(self, claim: msg.Claim) -> ev.Proved:
        return ev.Proved(claim.epoch, MANIFEST.hash, -1 if self.torn else digest(self.weights))

    def apply(self, versions: tuple[int, ...]) -> Any:
        world = self.world
        if any(version not in self.staged for version in versions):
            return ev.ApplyFailed("a resync has dropped what was staged", torn=False)
        if world.chance(world.faults.readers):
            return ev.ApplyFailed("readers are in the way", torn=False, waiting=True)
        if world.chance(world.faults.torn):
            self.torn = True
            return ev.ApplyFailed("the toy's engine fell over", torn=True)
        held = None if self.torn else self.version
        for version in versions:
            patch = self.staged.pop(version)
            if patch.base is None:
                self.weights = dict(patch.values)
                self.flipped = False
            else:
                assert held is not None, f"{self}: {patch} on weights worth nothing"
                assert patch.base <= held < version, f"{self}: {patch} on {held}"
                accepted = (self.trainer_life, version) in world.accepted
                assert accepted or self.core._lane.to_prove, f"{self}: the journal has no {patch}"
                self.weights.update(patch.values)
            held = version
        self.version, self.torn = held, False
        assert held is not None
        if world.chance(world.faults.flip):
            self.weights[0] ^= 1
            self.flipped = True
        right = world.history.get((self.trainer_life, held))
        stale = self.core._lane.to_prove  # A claim came meanwhile: it is about to look for itself.
        assert self.flipped or stale or self.weights == right, f"{self}: wrong at {held}"
        return ev.AppliedHere(held, 1, 1)

    def digest(self, version: int) -> ev.Digested | ev.DigestFailed:
        if self.torn or self.version != version:
            return ev.DigestFailed(version, "another version by now")
        return ev.Digested(version, digest(self.weights), 1)

    def fetch(self, command: cmd.Fetch) -> None:
        world = self.world
        if not self.alive:
            return
        if world.now < self.frozen_until:
            world.at(self.frozen_until, lambda: self.fetch(command))
            return
        self.busy.discard("fetch")
        away = world.now < max(world.bus_away, world.log_away) or world.chance(world.faults.store)
        writer = self.trainer_life
        found = [] if away else world.way(command.epoch, writer, command.held, command.target)
        if not found:
            self.post(ev.FetchFailed(command.epoch, "no way in the toy's log"))
            return

        def stage() -> ev.Fetched | ev.FetchFailed:
            if writer != self.trainer_life:
                return ev.FetchFailed(command.epoch, "another claim came meanwhile")
            for patch in found:
                self.stage(patch)
            items = tuple(ev.LogItem(p.base, p.version, p.digest, 10) for p in found)
            return ev.Fetched(command.epoch, items)

        self.busy.add("fetch")
        self.lane(world.delay(), lambda: (self.busy.discard("fetch"), stage())[1])

    @property
    def current(self) -> bool:
        """Whether it holds, proven, what the trainer published last."""
        trainer = self.world.trainer
        assert trainer is not None
        core = self.core
        return (
            core.version == core.verified == self.version == trainer.version
            and not self.torn
            and self.weights == trainer.weights
            and core.error is None
        )
