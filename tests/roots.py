"""A trainer of several ranks, by hand: what each publishes of a small model, and how it says so."""

import asyncio
from collections.abc import Callable, Collection, Sequence
from types import SimpleNamespace
from typing import Any

from ranks import held
from runs import Tensors, step
from sparsecast import Layout, Patch, diff, digest
from sparsecast.messages import codec
from sparsecast.messages import control as msg
from sparsecast.messages.control import LogEntry, Piece, Sender, Stamp
from sparsecast.messages.layout import box_part
from sparsecast.messages.manifest import TensorSpec
from sparsecast.messages.subjects import Subjects
from sparsecast.pipeline.bus.journal import Journal
from sparsecast.pipeline.bus.nats import NatsBus
from sparsecast.pipeline.core import commands as cmd
from sparsecast.pipeline.core import events as ev
from sparsecast.pipeline.delta import Shadow, checksum, manifest_of
from sparsecast.pipeline.log.base import Log
from sparsecast.pipeline.log.pieces import whole
from sparsecast.pipeline.windows import open_window
from sparsecast.workers.driver import Windows
from sparsecast.workers.entries import Origin, describe

MASK = (1 << 64) - 1
ME = Sender("trainer", "t1")


def shares(tensors: Tensors, roots: int) -> list[Layout]:
    """What each root publishes: uneven rows of what has two dimensions, columns of a layer's
    weight, and all else the second one alone (of one root: that)."""
    return [_share(tensors, root, roots) for root in range(roots)]


def _share(tensors: Tensors, root: int, roots: int) -> Layout:
    specs, parts = [], []
    for spec in manifest_of(tensors).tensors:
        begin, shape = [0] * len(spec.shape), list(spec.shape)
        if len(spec.shape) == 2:
            dim = 1 if spec.name.startswith("layer") else 0
            ends = [
                spec.shape[dim] * r * (r + 1) // (roots * (roots + 1)) for r in (root, root + 1)
            ]
            begin[dim], shape[dim] = ends[0], ends[1] - ends[0]
        elif root != 1 % roots:
            continue
        local = f"shard.{spec.name}"
        specs.append(TensorSpec(local, spec.dtype, tuple(shape)))
        parts.append(box_part(spec.name, begin, shape, local))
    return Layout(tensors=tuple(specs), parts=tuple(parts))


class Roots:
    """The weights that a trainer of several ranks trains, and each one's patches of them."""

    def __init__(self, tensors: Tensors, roots: int, layouts: list[Layout] | None = None) -> None:
        self.trained = tensors
        self.manifest = manifest_of(tensors)
        self.layouts = layouts or shares(tensors, roots)
        self.shards = [held(layout, tensors) for layout in self.layouts]
        self.version = 0

    def claim(self) -> msg.Claim:
        """A claim of epoch 1 at the version that the weights are at."""
        return msg.Claim(
            sender=ME,
            epoch=1,
            version=self.version,
            digest=digest(self.trained),
            manifest=self.manifest,
            nonce="",
            heartbeat_s=0.5,
            roots=tuple(map(codec.pack_layout, self.layouts)),
        )

    def step(self, share: float = 0.02) -> list[Patch]:
        """Train one version; the patch of each root."""
        before, base = self.shards, self.version
        self.version += 1
        step(self.trained, self.version, share)
        self.shards = [held(layout, self.trained) for layout in self.layouts]
        return [
            diff(old, new, base_version=base, version=self.version)
            for old, new in zip(before, self.shards, strict=True)
        ]

    def anchors(self) -> list[Patch]:
        """The full copy that each root makes of its share."""
        return [Shadow(shard).anchor(self.version) for shard in self.shards]

    def announce(self, patches: Sequence[Patch], window: int = 1, attempt: int = 1) -> msg.Announce:
        """What is said of the newest version's patches."""
        pieces = tuple(Piece(patch.nbytes, checksum(patch.buffer)) for patch in patches)
        assert patches[0].base_version is not None
        return msg.Announce(
            sender=ME,
            stamp=Stamp(1, window, attempt, self.version),
            base_version=patches[0].base_version,
            manifest_hash=self.manifest.hash,
            nbytes=sum(piece.nbytes for piece in pieces),
            checksum=sum(piece.checksum for piece in pieces) & MASK,
            digest=digest(self.trained),
            changed=sum(patch.changed for patch in patches),
            encoding="sparse",
            dense_nbytes=self.manifest.nbytes,
            pieces=pieces,
        )

    def pieces(self, patches: Sequence[Patch]) -> list[LogEntry]:
        """What each root stores of the newest version."""
        digest_of_all = digest(self.trained)
        return [
            describe(
                patch,
                1,
                digest_of_all,
                writer=ME.incarnation,
                origin=Origin(root, len(patches), layout.hash, self.manifest.hash),
            )
            for root, (layout, patch) in enumerate(zip(self.layouts, patches, strict=True))
        ]

    async def store(self, log: Log, patches: Sequence[Patch]) -> LogEntry:
        """Have each root store its own; what readers see of it."""
        pieces = self.pieces(patches)
        for piece, patch in zip(pieces, patches, strict=True):
            await log.store(piece, patch.to_bytes(), timeout_s=5.0)
        (entry,) = whole(pieces)
        return entry


class Trainer:
    """Says what a trainer says, each thing once and in order, and sends from every root."""

    def __init__(self, bus: NatsBus, run: str, roots: Roots, kind: msg.WindowKind = "gloo") -> None:
        self.roots = roots
        self.kind = kind
        self._bus = bus
        self._subjects = Subjects(run)
        self._journal = Journal(bus, run)
        self._sequence = 0
        self._heard: list[Any] = []
        self._news = asyncio.Event()
        ports: Any = SimpleNamespace(windows=open_window, bus=bus, device="cpu")
        #: Each rank has its own end.
        self.ends = [Windows(ports, self._subjects) for _ in roots.layouts]
        self.members: tuple[Sender, ...] = ()
        self.window = 0

    async def __aenter__(self) -> "Trainer":
        await self._bus.subscribe(self._subjects.worker_control_all, self._hear)
        await self._bus.flush(2.0)
        state = await self._journal.open(timeout_s=5.0)
        self._sequence = state.last_sequence
        await self._append(self.roots.claim())
        return self

    async def __aexit__(self, *_: object) -> None:
        for ends in self.ends:
            await ends.abort_all()

    def _hear(self, message: Any) -> None:
        self._heard.append(codec.decode(message.data, subject=message.subject))
        self._news.set()

    async def say(self, message: Any) -> None:
        """To all members."""
        await self._bus.publish(self._subjects.trainer_control, codec.encode(message))
        await self._bus.flush(2.0)

    async def _append(self, message: msg.Claim | msg.Announce) -> None:
        self._sequence = await self._journal.append(
            message,
            message_id=f"{ME.incarnation}-{self._sequence}",
            expected_sequence=self._sequence,
            timeout_s=5.0,
        )

    async def heard(
        self,
        *kinds: type[Any],
        of: Collection[str],
        where: Callable[[Any], bool] = lambda said: True,
        timeout_s: float = 15.0,
    ) -> dict[str, Any]:
        """The first word of one of these kinds of each of these workers."""
        async with asyncio.timeout(timeout_s):
            while True:
                found: dict[str, Any] = {}
                for said in self._heard:
                    if isinstance(said, kinds) and where(said):
                        found.setdefault(said.sender.name, said)
                if set(of) <= found.keys():
                    return found
                self._news.clear()
                await self._news.wait()

    async def welcome(self, *names: str) -> None:
        """Let these workers in once they want to be."""
        joins = await self.heard(msg.Join, of=names)
        self.members = tuple(joins[name].sender for name in names)
        self.ranks = tuple(len(joins[name].gpus) for name in names)
        for member in self.members:
            await self.say(msg.Welcome(sender=ME, to=member, epoch=1, version=self.roots.version))

    async def open(self) -> None:
        """Open a window with all members."""
        self.window += 1
        stamp = Stamp(1, self.window)
        opening = msg.Opening(
            sender=ME,
            stamp=stamp,
            kind=self.kind,
            members=self.members,
            ranks=self.ranks,
            enters_at=self.roots.version,
        )
        await self.say(opening)
        await self._committed(stamp)
        await self.say(msg.Go(sender=ME, stamp=stamp))
        of = len(self.ends)
        opened = await asyncio.gather(
            *(
                ends.open(cmd.OpenWindow(stamp, self.kind, 0, opening.size, 10.0, (root,), of))
                for root, ends in enumerate(self.ends)
            )
        )
        assert all(isinstance(event, ev.WindowOpened) for event in opened), opened
        said = await self.heard(msg.Opened, of=self._names, where=lambda m: m.stamp == stamp)
        assert all(one.error is None for one in said.values()), said

    async def announce(self, announce: msg.Announce) -> None:
        """Put it into the journal."""
        await self._append(announce)

    async def attempt(
        self, announce: msg.Announce, patches: Sequence[Patch], silent: Collection[int] = ()
    ) -> dict[str, Any]:
        """Have the members commit, and send from every root but these; what each member says."""
        stamp = announce.stamp
        await self._committed(stamp)
        await self.say(msg.Go(sender=ME, stamp=stamp, announce=announce))
        sending = [
            asyncio.ensure_future(self._send(root, patch, stamp))
            for root, patch in enumerate(patches)
            if root not in silent
        ]
        try:
            return await self.heard(
                msg.Received,
                msg.Applied,
                msg.NotReady,
                of=self._names,
                where=lambda m: (
                    m.version == stamp.version if isinstance(m, msg.Applied) else m.stamp == stamp
                ),
            )
        finally:
            for task in sending:
                task.cancel() if silent else await task
            await asyncio.gather(*sending, return_exceptions=True)

    async def publish(self, share: float = 0.02) -> None:
        """Train a version and bring it to all members, to the proof of it."""
        patches = self.roots.step(share)
        announce = self.roots.announce(patches, self.window)
        await self.announce(announce)
        said = await self.attempt(announce, patches)
        assert all(getattr(one, "error", None) is None for one in said.values()), said
        await self.verified(self.roots.version)

    async def verified(self, version: int) -> None:
        """Wait until every member has proven a version."""
        said = await self.heard(msg.Verified, of=self._names, where=lambda m: m.version == version)
        assert all(one.ok for one in said.values()), said

    @property
    def _names(self) -> list[str]:
        return [member.name for member in self.members]

    async def _committed(self, stamp: Stamp) -> None:
        said = await self.heard(
            msg.Ready, msg.NotReady, of=self._names, where=lambda m: m.stamp == stamp
        )
        assert all(isinstance(one, msg.Ready) for one in said.values()), said

    async def _send(self, root: int, patch: Patch, stamp: Stamp) -> None:
        ends = self.ends[root][stamp.window]
        assert ends is not None
        await ends.send([patch.buffer], attempt=stamp.attempt, timeout_s=10.0)
