"""Talks with one core at a time: what it is told, what it says, and the clock."""

from collections.abc import Iterable
from typing import Any

from sparsecast.messages import control as msg
from sparsecast.messages.control import Sender, Stamp
from sparsecast.pipeline.core import commands as cmd
from sparsecast.pipeline.core import events as ev
from sparsecast.pipeline.core.follow import Follow
from sparsecast.pipeline.core.policy import Policy
from sparsecast.pipeline.core.replica import ReplicaCore
from sparsecast.pipeline.core.trainer import State, TrainerCore
from toyworld import MANIFEST

POLICY = Policy(window="gloo")
TRAINER = Sender("trainer", "t1")
A, B = Sender("a", "1"), Sender("b", "1")


class TrainerTalk:
    """A trainer that has claimed epoch 1 at version 0, the words it says, and its clock."""

    def __init__(self, *members: Sender, policy: Policy = POLICY) -> None:
        self.core = TrainerCore(
            run="r", me=TRAINER, manifest_hash=MANIFEST.hash, kinds=("gloo", "bus"), policy=policy
        )
        self.now = 100.0
        self.out: list[Any] = []
        self.feed(ev.Claimed(1, 0))
        for member in members:
            self.hear(self.join(member))
            if self.core.state is State.OPENING:
                self.open_window()

    def feed(self, event: Any, after: float = 0.0) -> list[Any]:
        self.now += after
        self.out = self.core.handle(event, self.now)
        return self.out

    def hear(self, message: Any, after: float = 0.0) -> list[Any]:
        return self.feed(ev.FromWorker(message), after)

    def wait(self, seconds: float, alive: Iterable[Sender] = ()) -> list[Any]:
        """Tick at each deadline, with heartbeats of whoever lives; all that was said meanwhile."""
        end, said = self.now + seconds, []
        while self.now < end:
            for member in alive:
                found = self.core.membership.get(member)
                version = found.version if found else 0
                beat = msg.Heartbeat(sender=member, epoch=1, version=version, verified=version)
                said += self.hear(beat)
            deadline = self.core.next_deadline()
            assert deadline is not None
            self.now = max(min(deadline, end), self.now + 0.001)
            said += self.feed(ev.Tick())
        self.out = said
        return said

    def join(
        self,
        member: Sender,
        version: int | None = 0,
        epoch: int = 1,
        role: msg.Role = "rollout",
    ) -> msg.Join:
        return msg.Join(
            sender=member, epoch=epoch, manifest_hash=MANIFEST.hash, offers=("gloo", "bus"),
            device="cpu", host="h", pid=1, version=version, role=role,
        )  # fmt: skip

    def open_window(self) -> None:
        exchange = self.core._windows.exchange
        assert exchange is not None
        stamp = exchange.stamp
        for member in exchange.members:
            self.hear(msg.Ready(sender=member, stamp=stamp, expires_s=5))
        self.feed(ev.WindowOpened(stamp.epoch, stamp.window))
        for member in exchange.members:
            self.hear(msg.Opened(sender=member, stamp=stamp))
        assert self.core.window_kind == "gloo"

    def seal(self, version: int, base: int | None = None) -> cmd.Append | None:
        return self.only(cmd.Append, self.feed(sealed(version, base)))

    def announce(self, version: int) -> Stamp:
        """Publish, take and append a version; the stamp that members are asked to commit to."""
        self.feed(ev.Published(version))
        append = self.seal(version)
        assert append is not None
        self.feed(ev.Announced(version))
        return append.announce.stamp

    def go(self, stamp: Stamp, *members: Sender) -> None:
        for member in members:
            self.hear(msg.Ready(sender=member, stamp=stamp, expires_s=5))

    def deliver(self, stamp: Stamp, *members: Sender) -> None:
        """Go, send, received, applied, verified."""
        self.go(stamp, *members)
        assert self.only(cmd.Send) is not None
        self.feed(ev.Sent(stamp.window, stamp.attempt))
        for member in members:
            self.hear(msg.Received(sender=member, stamp=stamp))
        for member in members:
            self.hear(msg.Applied(sender=member, epoch=1, version=stamp.version))

    def said(self, kind: type[Any], out: list[Any] | None = None) -> list[Any]:
        out = self.out if out is None else out
        return [c.message for c in out if isinstance(c, cmd.Say) and isinstance(c.message, kind)]

    def only(self, kind: type[Any], out: list[Any] | None = None) -> Any:
        found = [c for c in (self.out if out is None else out) if isinstance(c, kind)]
        assert len(found) <= 1
        return found[0] if found else None

    def told(self, kind: str, out: list[Any] | None = None) -> list[str]:
        out = self.out if out is None else out
        return [c.reason for c in out if isinstance(c, cmd.Tell) and c.kind == kind]


def sealed(version: int, base: int | None = None) -> ev.Sealed:
    """What was taken."""
    return ev.Sealed(
        base_version=version - 1 if base is None else base, version=version, nbytes=10,
        checksum=1, digest=version, changed=1, numel=8, encoding="sparse", dense_nbytes=16,
        published_at=100.0, diff_us=1, encode_us=1,
    )  # fmt: skip


def claim(epoch: int = 1, version: int = 0, sender: Sender = TRAINER) -> msg.Claim:
    """A claim whose weights have their version as digest."""
    return msg.Claim(
        sender=sender, epoch=epoch, version=version, digest=version, manifest=MANIFEST,
        nonce="n", heartbeat_s=0.5,
    )  # fmt: skip


def announcement(
    stamp: Stamp, base: int | None = None, nbytes: int = 10, checksum: int = 1
) -> msg.Announce:
    """What is told of a version, whose digest is its number."""
    return msg.Announce(
        sender=TRAINER, stamp=stamp, base_version=stamp.version - 1 if base is None else base,
        manifest_hash=MANIFEST.hash, nbytes=nbytes, checksum=checksum, digest=stamp.version,
        changed=1, encoding="sparse", dense_nbytes=16,
    )  # fmt: skip


class ReplicaTalk:
    """A worker that has proven version 0 in epoch 1 and joined, unless told otherwise. `follow`:
    it evaluates, and follows that."""

    def __init__(self, digest: int = 0, *, window: bool = False, follow: str | None = None) -> None:
        self.now = 100.0
        self.core = ReplicaCore(
            run="r", me=A, kinds=("gloo", "bus"), device="cpu", host="h", pid=1, policy=POLICY,
            started=self.now, gpus=("GPU-1",),
            role="rollout" if follow is None else "evaluation",
            follow=Follow.parse(follow or "latest"),
        )  # fmt: skip
        self.out: list[Any] = []
        self.hear(claim())
        assert self.only(cmd.Prove) is not None
        self.feed(ev.Proved(1, MANIFEST.hash, digest))
        self.joined_with = self.said(msg.Join)
        self.hear(msg.Welcome(sender=TRAINER, to=A, epoch=1, version=0))
        if window:
            self.open_window()

    def feed(self, event: Any, after: float = 0.0) -> list[Any]:
        self.now += after
        self.out = self.core.handle(event, self.now)
        return self.out

    def hear(self, message: Any, after: float = 0.0) -> list[Any]:
        return self.feed(ev.FromTrainer(message), after)

    def wait(self, seconds: float) -> list[Any]:
        """Tick at each deadline; all that was asked for meanwhile. Never more than a few ticks."""
        end, said, ticks = self.now + seconds, [], 0
        while self.now < end:
            deadline = self.core.next_deadline()
            assert deadline is not None
            self.now = max(min(deadline, end), self.now + 0.0005)
            said += self.feed(ev.Tick())
            ticks += 1
            assert ticks < 10 + 10 * seconds, "it spins"
        self.out = said
        return said

    def open_window(self, window: int = 1) -> None:
        stamp = Stamp(1, window)
        self.hear(
            msg.Opening(
                sender=TRAINER, stamp=stamp, kind="gloo", members=(A,), ranks=(1,), enters_at=0
            )
        )
        self.hear(msg.Go(sender=TRAINER, stamp=stamp))
        self.feed(ev.WindowOpened(1, window))

    def announce(self, version: int, window: int = 1, **fields: int) -> Stamp:
        stamp = Stamp(1, window, 1 if window else 0, version)
        self.hear(announcement(stamp, **fields))
        return stamp

    def stage(self, stamp: Stamp, base: int | None = None) -> list[Any]:
        return self.feed(ev.Staged(stamp, announcement(stamp, base)))

    def receive(self, version: int) -> None:
        stamp = self.announce(version)
        self.hear(msg.Go(sender=TRAINER, stamp=stamp))
        assert self.only(cmd.Receive).stamp == stamp
        self.stage(stamp)

    def fetched(self, *items: tuple[int | None, int]) -> list[Any]:
        entries = tuple(ev.LogItem(base, version, version, 10) for base, version in items)
        return self.feed(ev.Fetched(1, entries))

    def only(self, kind: type[Any], out: list[Any] | None = None) -> Any:
        found = [c for c in (self.out if out is None else out) if isinstance(c, kind)]
        assert len(found) <= 1, found
        return found[0] if found else None

    def said(self, kind: type[Any], out: list[Any] | None = None) -> list[Any]:
        out = self.out if out is None else out
        return [c.message for c in out if isinstance(c, cmd.Report) and isinstance(c.message, kind)]
