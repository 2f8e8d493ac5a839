"""The toy run's trainer: shadow, pending and kept patches, journal and log."""

from typing import Any

from sparsecast.messages import control as msg
from sparsecast.messages.control import Stamp
from sparsecast.pipeline.core import commands as cmd
from sparsecast.pipeline.core import events as ev
from sparsecast.pipeline.core.trainer import State, TrainerCore
from toyprocess import Process
from toyworld import KEYS, MANIFEST, Key, Op, Patch, Weights, World, digest, merged


class Trainer(Process):
    """The trainer's process: the shadow, the patches kept, the claim."""

    core: TrainerCore

    def __init__(self, world: World, kinds: tuple[Any, ...] = ("gloo", "bus")) -> None:
        super().__init__(world, world.life("trainer"))
        self.core = TrainerCore(
            run="toy", me=self.me, manifest_hash=MANIFEST.hash, kinds=kinds, policy=world.policy
        )
        self.pending: list[Patch] = []
        self.kept: dict[int, Patch] = {}
        self.sequence = 0
        self.epoch = 0
        self.journals = 0
        self.busy: set[str] = set()
        self.error: Exception | None = None
        self.sends: dict[tuple[int, int], Op] = {}
        self.announced: list[int] = []
        self.version = 0
        #: Until then a diff is under way, and what it will find cannot be taken.
        self.diffed = 0.0
        self.weights: Weights = dict.fromkeys(range(KEYS), 0)
        world.trainer = self

    def start(self) -> None:
        """Claim the run, above whatever was announced before."""
        world = self.world
        epoch = 1
        for message in world.journal:
            epoch = max(epoch, (message.epoch if isinstance(message, msg.Claim) else 0) + 1)
        self.version = max((m.version for m in world.journal), default=-1) + 1
        self.weights = {key: world.random.randrange(1 << 30) for key in range(KEYS)}
        world.history[self.me.incarnation, self.version] = dict(self.weights)
        self.claim(epoch)
        self.post(ev.Claimed(epoch, self.version))

    def claim(self, epoch: int) -> None:
        self.world.journal_gone = False
        claim = msg.Claim(
            sender=self.me, epoch=epoch, version=self.version, digest=digest(self.weights),
            manifest=MANIFEST, nonce="n", heartbeat_s=self.world.policy.heartbeat_s,
        )  # fmt: skip
        found = self.world.append(claim, len(self.world.journal))
        assert isinstance(found, int)
        self.sequence = found
        self.epoch = epoch
        self.journals = self.world.journals
        self.anchor(epoch)

    def anchor(self, epoch: int) -> None:
        anchor = Patch(None, self.version, dict(self.weights), digest(self.weights))
        self.world.log.append((epoch, self.trainer_life, anchor))

    @property
    def trainer_life(self) -> str:
        return self.me.incarnation

    def publish(self) -> int:
        """A diff that begins now, and takes its time; or comes to nothing."""
        world = self.world
        self.diffed = max(self.diffed, world.now) + world.random.uniform(0.0, 0.03)
        self.post(ev.Publishing())
        if world.chance(world.faults.diff):
            return self.version
        base, self.version = self.version, self.version + 1
        keys = world.random.sample(range(KEYS), world.random.randrange(3))
        values = {key: world.random.randrange(1 << 30) for key in keys}
        self.weights.update(values)
        world.history[self.me.incarnation, self.version] = dict(self.weights)
        self.pending.append(Patch(base, self.version, values, digest(self.weights)))
        version = self.version
        world.at(self.diffed + world.delay(), lambda: self.post(ev.Published(version)))
        return version

    def check(self) -> None:
        core = self.core
        if core.state not in (State.UNCLAIMED, State.CLOSED, State.FENCED):
            assert core.next_deadline() is not None
        assert len(core._ledger) <= 400
        assert len(core._safekeeping.unsafe) <= 400
        # What was announced is in the log, or kept here with all that leads to it.
        mine = (core.epoch, self.trainer_life)
        at = max((p.version for e, w, p in self.world.log if (e, w) == mine), default=None)
        if self.journals != self.world.journals:
            return  # The log is gone, and it does not know yet.
        if at is None or core.state not in (State.IDLE, State.OPENING, State.ROUND):
            return
        for version, patch in sorted(self.kept.items()):
            assert patch.base is not None
            if patch.base <= at < version:
                at = version
        newest = max((v for v in self.announced if v <= core.head), default=at)
        assert at >= newest, f"versions {at}..{newest} are kept by nobody"

    def once(self, what: str) -> None:
        assert what not in self.busy, f"two of {what} at once"
        self.busy.add(what)

    def perform(self, command: cmd.TrainerCommand) -> None:
        world = self.world
        match command:
            case cmd.Say(message):
                if isinstance(message, msg.Opening):
                    world.openings[self.key(message.stamp)] = message.members
                for replica in world.replicas.values():
                    world.carry(lambda r=replica: r.post(ev.FromTrainer(message)))
            case cmd.Tell():
                world.tells.append(command)
            case cmd.Settled(record):
                world.settled.append(record)
            case cmd.Fail(error):
                self.error = error
            case cmd.Take(unsafe):
                self.once("take")
                wait = max(self.diffed - world.now, 0.0)
                self.lane(wait + world.delay(), lambda: self.take(unsafe))
            case cmd.Append(announce):
                self.once(f"append of epoch {announce.stamp.epoch}")
                self.append(announce)
            case cmd.OpenWindow():
                self.open(command)
            case cmd.AbortWindow(window) | cmd.CloseWindow(window):
                for key in [key for key in world.windows if key[1] == window]:
                    world.break_off(key, self)
            case cmd.Send(stamp, timeout_s):
                self.send(stamp, timeout_s)
            case cmd.Store(versions):
                self.once("store")
                self.lane(world.delay(), lambda: self.store(versions))
            case cmd.Reclaim(epoch):
                self.once("reclaim")
                self.lane(world.delay() + 0.01, lambda: self.reclaim(epoch))

    def take(self, unsafe: tuple[int, ...]) -> ev.Sealed | ev.NothingTaken:
        self.busy.discard("take")
        taken, self.pending = self.pending, []
        if not taken:
            return ev.NothingTaken()
        patch = merged([*(self.kept.pop(v) for v in unsafe if v in self.kept), *taken])
        self.kept[patch.version] = patch
        assert patch.base is not None
        return ev.Sealed(
            base_version=patch.base, version=patch.version, nbytes=10, checksum=1,
            digest=patch.digest, changed=len(patch.values), numel=KEYS, encoding="sparse",
            dense_nbytes=16, published_at=self.world.now, diff_us=1, encode_us=1,
        )  # fmt: skip

    def append(self, announce: msg.Announce) -> None:
        world = self.world
        expected, version = self.sequence, announce.version

        def arrive() -> None:
            away = world.now < world.bus_away
            outcome: Any = "unavailable"
            if world.journal_gone:
                outcome = "lost"
            elif not away and not world.chance(world.faults.append):
                outcome = world.append(announce, expected)
            if outcome == "fenced" and world.claimant() == self.me:
                # A late word of an older epoch is in the way.
                self.sequence, outcome = len(world.journal), "unavailable"
            if isinstance(outcome, int) and version not in self.announced:
                self.announced.append(version)
            # Stored, but nobody says so.
            if isinstance(outcome, int) and world.chance(world.faults.append):
                outcome = "unavailable"
            world.after(world.delay(), lambda: answer(outcome))

        def answer(outcome: Any) -> None:
            if not self.alive:
                return
            self.busy.discard(f"append of epoch {announce.stamp.epoch}")
            if isinstance(outcome, int):
                if announce.stamp.epoch == self.epoch:
                    self.sequence = outcome
                self.post(ev.Announced(version))
            else:
                self.post(ev.AnnounceFailed(version, outcome, "the toy's"))

        world.after(world.delay(), arrive)

    def send(self, stamp: Stamp, timeout_s: float) -> None:
        world = self.world
        world.enter(self, stamp)
        assert all(op.done for op in self.sends.values()), "two rounds in flight"
        assert stamp.version in self.kept, "the payload is gone"
        key = self.key(stamp)
        window = world.windows[key]
        op = Op(self, stamp)
        self.sends[stamp.window, stamp.attempt] = window.sends[stamp.attempt] = op
        world.after(timeout_s, lambda: world.fail(key, "send", op))
        world.progress(key, stamp.attempt)

    def failed(self, key: Key, what: str, op: Op) -> None:
        if what == "open":
            op.end(ev.WindowFailed(*key[:2], "the toy's window did not open"))
        else:
            stamp: Stamp = op.what
            op.end(ev.Sent(stamp.window, stamp.attempt, "the toy's peer is gone"))

    def store(self, versions: tuple[int, ...]) -> ev.LogStored | ev.LogFailed:
        self.busy.discard("store")
        world, epoch = self.world, self.core.epoch
        found = [self.kept[version] for version in versions if version in self.kept]
        if not found:
            return ev.LogFailed(versions[-1], "not kept any more")
        patch = merged(found)
        for version in versions:
            self.kept.pop(version, None)
        self.kept[patch.version] = patch
        if world.now < max(world.log_away, world.bus_away) or world.chance(world.faults.store):
            return ev.LogFailed(versions[-1], "the toy's log")
        if self.journals == world.journals:
            world.log.append((epoch, self.trainer_life, patch))
        if world.chance(world.faults.store):
            return ev.LogFailed(versions[-1], "stored, but nobody knows")
        for version in [v for v in self.kept if v <= patch.version]:
            del self.kept[version]
        if world.chance(0.1):
            self.anchor(epoch)
        return ev.LogStored(patch.version)

    def reclaim(self, epoch: int) -> Any:
        self.busy.discard("reclaim")
        if self.world.now < self.world.bus_away or self.world.chance(self.world.faults.append):
            return ev.ReclaimFailed("the toy's bus")
        claims = [m for m in self.world.journal if isinstance(m, msg.Claim)]
        if self.world.trainer is not self or (claims and claims[-1].sender != self.me):
            return ev.LeaseLost("another trainer has the run now")
        epoch = max(epoch, claims[-1].epoch + 1) if claims else epoch
        self.pending.clear()
        self.kept.clear()
        self.claim(epoch)
        if self.world.chance(self.world.faults.append):
            return ev.ReclaimFailed("claimed, but nobody says so")
        return ev.Claimed(epoch, self.version)
