"""Workers of a trainer of several ranks: each root's piece of an update, all of them or none."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from archives import FailingLog
from ranks import held, same, split
from roots import Roots, Trainer, shares
from runs import QUICK, Site, Tensors, eventually, same_bits, weights
from sparsecast import (
    CorruptPatch,
    Layout,
    ManifestMismatch,
    Part,
    Patch,
    PatchError,
    Replica,
    Shard,
    digest,
    merge,
)
from sparsecast.messages import control as msg
from sparsecast.messages.control import LogEntry, Piece
from sparsecast.messages.manifest import TensorSpec
from sparsecast.pipeline.bus.nats import NatsBus
from sparsecast.pipeline.core import events as ev
from sparsecast.pipeline.log.memory import MemoryLog
from sparsecast.pipeline.log.pieces import WholeLog, whole
from sparsecast.workers.engine import ModuleEngine
from sparsecast.workers.hands import Hands
from sparsecast.workers.incoming import Incoming

MASK = (1 << 64) - 1


class Told(ModuleEngine):
    """An engine that remembers what after_apply was told."""

    def __init__(self, tensors: Tensors) -> None:
        super().__init__(tensors)
        self.applied: list[tuple[int, list[str]]] = []

    def after_apply(self, version: int, changed: Sequence[str]) -> None:
        """Remember it."""
        self.applied.append((version, list(changed)))


class Stand:
    """Staging over weights at version 0, whole or as a layout says; and a trainer of several ranks
    beside it."""

    def __init__(
        self, roots: int = 2, *, layout: Layout | None = None, start: Tensors | None = None
    ) -> None:
        start = weights() if start is None else start
        self.roots = Roots({name: tensor.clone() for name, tensor in start.items()}, roots)
        self.layout = layout
        self.mine = held(layout, start) if layout else start
        self.engine = Told(self.mine)
        self.incoming = Incoming(self.engine, clock=time.monotonic, guard_s=0.2, layout=self.layout)
        proved = self.incoming.prove(self.roots.claim())
        assert isinstance(proved, ev.Proved), proved
        self.incoming.hold(0)

    def stage(self, patches: Sequence[Patch], announce: Any = None, **options: Any) -> None:
        """Stage what came through a window."""
        self.incoming.stage(
            [patch.buffer.clone() for patch in patches],
            announce or self.roots.announce(patches),
            receive_us=1,
            transport="gloo",
            **options,
        )

    def right(self) -> bool:
        """Whether the weights are the trainer's."""
        if self.layout is None:
            return same_bits(self.mine, self.roots.trained)
        return same([self.layout], [self.mine], self.roots.trained)


@pytest.mark.parametrize("share", [0.001, 0.3, 1.0], ids=["sparse", "bitmap", "dense"])
@pytest.mark.parametrize("ranks", [0, 1, 3])
@pytest.mark.parametrize("roots", [1, 2, 3])
def test_all_pieces_of_a_version_go_in_within_one_hold(
    roots: int, ranks: int, share: float
) -> None:
    """Two versions of so many pieces each, in weights held whole, renamed, or by one rank of three:
    one flip, one after_apply with all names once, exact bits."""
    stand = Stand(roots, layout=split(weights(), ranks)[-1] if ranks else None)
    for _ in range(2):
        stand.stage(stand.roots.step(share))
    done = stand.incoming.apply((1, 2))
    assert isinstance(done, ev.AppliedHere), done
    assert stand.engine.guard().version == 2
    assert stand.right()
    ((version, names),) = stand.engine.applied
    assert version == 2
    assert len(names) == len(set(names))
    if share == 1.0:
        assert set(names) == {name for name, tensor in stand.mine.items() if tensor.numel()}


def test_the_digest_is_that_of_the_whole() -> None:
    """The shares of the ranks that hold the weights add up to the trainer's digest, whatever the
    roots were."""
    stands = [Stand(2, layout=layout) for layout in split(weights(), 3)]
    total = 0
    for stand in stands:
        stand.stage(stand.roots.step())
        assert isinstance(stand.incoming.apply((1,)), ev.AppliedHere)
        found = stand.incoming.digest(1)
        assert isinstance(found, ev.Digested)
        total += found.digest
    assert total & MASK == digest(stands[0].roots.trained)


def _piece(announce: msg.Announce, at: int, **change: int) -> msg.Announce:
    """The same with other facts of one piece, and sums that agree with it."""
    pieces = list(announce.pieces)
    pieces[at] = msgspec.structs.replace(pieces[at], **change)
    return msgspec.structs.replace(
        announce,
        pieces=tuple(pieces),
        nbytes=sum(piece.nbytes for piece in pieces),
        checksum=sum(piece.checksum for piece in pieces) & MASK,
    )


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda a: _piece(a, 1, checksum=7), "root 1: .*checksum .*announced was 0{15}7"),
        (lambda a: _piece(a, 0, nbytes=9), "root 0: .*bytes, 9 were announced"),
        (lambda a: msgspec.structs.replace(a, nbytes=9), "pieces have .* bytes .*announced was 9"),
        (lambda a: msgspec.structs.replace(a, checksum=9), "pieces have .* announced was"),
        (lambda a: msgspec.structs.replace(a, base_version=5), "root 0: .* announced was 5 → 1"),
        (lambda a: _pieces(a, a.pieces[:1]), "in 1 pieces, and the claim has 2 roots"),
        (lambda a: _pieces(a, ()), "in 1 pieces, and the claim has 2 roots"),
        (lambda a: msgspec.structs.replace(a, manifest_hash="0" * 32), "another manifest"),
    ],
    ids=["checksum", "size", "sum", "checksums", "base", "fewer", "none", "manifest"],
)
def test_one_wrong_piece_refuses_all(
    change: Callable[[msg.Announce], msg.Announce], error: str
) -> None:
    """Each fact of each piece is held against what was announced; what does not agree leaves
    nothing staged of the other root either, and the weights as they were."""
    stand = Stand()
    patches = stand.roots.step()
    with pytest.raises(PatchError, match=error):
        stand.stage(patches, change(stand.roots.announce(patches)))
    assert not stand.incoming._staged
    assert isinstance(stand.incoming.apply((1,)), ev.ApplyFailed)
    assert same_bits(stand.mine, weights())


def _pieces(announce: msg.Announce, pieces: tuple[Piece, ...]) -> msg.Announce:
    """The same with these pieces, and their sums if there are any."""
    announce = msgspec.structs.replace(announce, pieces=pieces)
    return _piece(announce, 0) if pieces else announce


def test_a_missing_payload_of_which_something_is_held_is_refused() -> None:
    """What the log was not asked for is needed after all, since another claim has come: nothing is
    staged."""
    stand = Stand()
    patches = stand.roots.step()
    (entry,) = whole(stand.roots.pieces(patches))
    with pytest.raises(PatchError, match=r"root 1: .*its payload is missing"):
        stand.incoming.stage([patches[0].buffer, None], entry, receive_us=1, transport="log")
    with pytest.raises(CorruptPatch, match="1 payloads, 2 were announced"):
        stand.incoming.stage([patches[0].buffer], entry, receive_us=1, transport="log")
    assert not stand.incoming._staged


def test_a_patch_in_another_roots_coordinates_is_refused() -> None:
    """The roots' payloads come in each other's places: their manifests tell, before anything is
    kept."""
    stand = Stand()
    patches = stand.roots.step()[::-1]
    with pytest.raises(PatchError, match=r"root 0: .*differ|root 0: .*manifest"):
        stand.stage(patches, stand.roots.announce(patches))
    assert not stand.incoming._staged


def test_pieces_of_several_bases_are_refused() -> None:
    """One root sends 0 → 2, the other 1 → 2: no version fits both."""
    stand = Stand()
    first = stand.roots.step()
    second = stand.roots.step()
    patches = [merge([first[0], second[0]]), second[1]]
    with pytest.raises(PatchError, match=r"root 1: .*it says 1 → 2, announced was 0 → 2"):
        stand.stage(patches, stand.roots.announce(patches))
    assert not stand.incoming._staged


def test_scratch_is_checked_in_every_piece_and_dropped() -> None:
    """An attempt for what is here already leaves nothing, and refuses a wrong piece even so."""
    stand = Stand()
    patches = stand.roots.step()
    announce = stand.roots.announce(patches)
    stand.stage(patches, announce, scratch=True)
    assert not stand.incoming._staged
    with pytest.raises(PatchError, match="root 1"):
        stand.stage(patches, _piece(announce, 1, checksum=7), scratch=True)


def test_expected_payloads_are_those_of_their_roots() -> None:
    """What is to follow a payload on a device is told by root, and does for staging; of an
    announcement that is none of the claim's, nothing is expected."""
    stand = Stand()
    patches = stand.roots.step()
    announce = stand.roots.announce(patches)
    buffers = stand.incoming.staging([patch.nbytes for patch in patches], "gloo")
    for buffer, patch in zip(buffers, patches, strict=True):
        buffer.copy_(patch.buffer)
    payloads = stand.incoming.expect(buffers, announce)
    assert payloads is not None
    assert [payload.checksum for payload in payloads] == [p.checksum for p in announce.pieces]
    assert [payload.check().manifest for payload in payloads] == [
        layout.local for layout in stand.roots.layouts
    ]
    stand.incoming.stage(buffers, announce, receive_us=1, transport="gloo", payloads=payloads)
    assert isinstance(stand.incoming.apply((1,)), ev.AppliedHere)
    assert stand.right()
    assert stand.incoming.expect(buffers, _pieces(announce, ())) is None


@pytest.mark.parametrize(
    ("roots", "words"),
    [
        ((b"no layout", b"neither"), "no deflated layout"),
        (None, "is counted by no rank"),
    ],
    ids=["garbage", "not whole"],
)
def test_roots_that_do_not_send_everything_are_unfit(roots: Any, words: str) -> None:
    """What the claim says of the roots is no layout, or leaves elements out: the worker says so,
    and joins nothing."""
    stand = Stand()
    claim = stand.roots.claim()
    unfit = stand.incoming.prove(
        msgspec.structs.replace(claim, roots=roots if roots is not None else claim.roots[:1])
    )
    assert isinstance(unfit, ev.Unfit)
    assert words in unfit.difference


def test_a_rank_that_holds_nothing_leads_the_others_all_the_same() -> None:
    """The first rank of a worker holds no element: of no root anything is asked for, the others are
    told to write, and its version flips when they have."""
    (empty,) = (spec for spec in Roots(weights(), 1).manifest.tensors if not spec.numel)
    part = Part(
        tensor=empty.name, begin=(0, 0), shape=empty.shape, local="e", at=(0, 0), axes=(0, 1)
    )
    layout = Layout(tensors=(TensorSpec("e", empty.dtype, empty.shape),), parts=(part,))
    stand = Stand(2, layout=layout)
    (entry,) = whole(stand.roots.pieces(stand.roots.step()))
    assert stand.incoming.wanted(entry) == [False, False]
    stand.incoming.stage([None, None], entry, receive_us=1, transport="log")
    led: list[int | None] = []

    def together(begin: Callable[[], None]) -> None:
        del begin
        led.append(stand.engine.guard().version)

    assert isinstance(stand.incoming.apply((1,), together), ev.AppliedHere)
    assert led == [0]
    assert stand.engine.guard().version == 1


# ---- the log


class Reach:
    """Hands on a stand's staging, and a log beside them."""

    def __init__(self, stand: Stand) -> None:
        self.stand = stand
        self.log = FailingLog()
        ports: Any = SimpleNamespace(log=WholeLog(self.log), clock=time.monotonic, run=self._run)
        self.hands = Hands(ports, None, stand.incoming, lambda: None)  # type: ignore[arg-type]
        self.heard: list[int] = []

    async def _run(self, function: Any, *args: Any) -> Any:
        return function(*args)

    async def put(self, patches: Sequence[Patch]) -> LogEntry:
        """Store the newest version's patches."""
        return await self.stand.roots.store(self.log, patches)

    async def take(self, entry: LogEntry) -> None:
        """Stage an entry."""
        await self.hands.take(entry, timeout_s=5.0, progress=self.heard.append)


@pytest.mark.parametrize("anchor", [False, True], ids=["patch", "anchor"])
@pytest.mark.parametrize("roots", [1, 3])
async def test_an_entry_of_several_pieces_is_taken_whole(roots: int, anchor: bool) -> None:
    """A patch and an anchor of three roots from the log, or of an only one: every piece is read,
    progress is that of the whole, and the bits are the trainer's."""
    reach = Reach(Stand(roots))
    patches = reach.stand.roots.step()
    entry = await reach.put(reach.stand.roots.anchors() if anchor else patches)
    await reach.take(entry)
    assert reach.log.loaded == reach.log.stored
    assert len(reach.log.loaded) == roots
    assert reach.heard == sorted(reach.heard)
    assert reach.heard[-1] == entry.nbytes
    assert isinstance(reach.stand.incoming.apply((1,)), ev.AppliedHere)
    assert reach.stand.right()


async def test_a_root_of_which_nothing_is_held_is_not_read() -> None:
    """The first rank of three holds rows that the first of three roots does not send alone, the
    last root none of them: that one's bytes stay in the log, and count as come."""
    tensors = {"embed": torch.randn(300, 8, generator=torch.Generator().manual_seed(1))}
    stand = Stand(3, layout=split(tensors, 3)[0], start=tensors)
    reach = Reach(stand)
    entry = await reach.put(stand.roots.step())
    await reach.take(entry)
    assert reach.log.loaded == [entry.pieces[0].name, entry.pieces[1].name]
    assert reach.heard[-1] == entry.nbytes
    assert isinstance(stand.incoming.apply((1,)), ev.AppliedHere)
    assert stand.right()


async def test_an_entry_of_other_roots_is_refused() -> None:
    """An entry of roots that are not the claim's, or of fewer: said so before a byte is read."""
    reach = Reach(Stand(2))
    entry = await reach.put(reach.stand.roots.step())
    other = shares(weights(), 3)[0].hash
    pieces = (msgspec.structs.replace(entry.pieces[0], layout=other), entry.pieces[1])
    with pytest.raises(ManifestMismatch, match=f"coordinates of layout {other}, root 0 of the"):
        await reach.take(msgspec.structs.replace(entry, pieces=pieces))
    one = msgspec.structs.replace(
        entry,
        pieces=entry.pieces[:1],
        nbytes=entry.pieces[0].nbytes,
        checksum=entry.pieces[0].checksum,
    )
    with pytest.raises(CorruptPatch, match="in 1 pieces, and the claim has 2 roots"):
        await reach.take(one)
    assert not reach.log.loaded


async def test_a_corrupt_piece_of_an_entry_stages_nothing() -> None:
    """One bit of the second piece is another: refused by its root, and the first is not kept."""
    reach = Reach(Stand(2))
    entry = await reach.put(reach.stand.roots.step())
    reach.log.flip(entry.pieces[1].name)
    with pytest.raises(PatchError, match=r"root 1: .*checksum"):
        await reach.take(entry)
    assert not reach.stand.incoming._staged


# ---- rounds


class Worker:
    """A worker of so many ranks (0: a plain one) and its weights."""

    def __init__(self, site: Site, name: str, start: Tensors, ranks: int, **options: Any) -> None:
        self.site = site
        given: dict[str, Any] = {"run": site.run, "bus": site.url, "name": name, "policy": QUICK}
        given |= options
        self.layouts = split(start, ranks) if ranks else []
        if not ranks:
            self.mine = [{name: tensor.clone() for name, tensor in start.items()}]
            self.first = Replica(self.mine[0], **given)
            self.others: list[Shard] = []
            return
        self.mine = [held(layout, start) for layout in self.layouts]
        self.first = Replica(self.mine[0], layout=self.layouts[0], ranks=ranks, **given)
        self.others = [
            Shard(self.mine[rank], layout=self.layouts[rank], rank=rank, **given)
            for rank in range(1, ranks)
        ]

    async def start(self) -> "Worker":
        """Enter all ranks."""
        everyone = (*self.others, self.first)
        await asyncio.gather(*(rank.__aenter__() for rank in everyone))
        for rank in everyone:
            self.site.ends(rank)
        return self

    def same(self, tensors: Tensors) -> bool:
        """Whether every rank holds its part of these weights, bit for bit."""
        if not self.layouts:
            return same_bits(self.mine[0], tensors)
        return same(self.layouts, self.mine, tensors)


@pytest.mark.parametrize("kind", ["gloo", "bus"])
@pytest.mark.parametrize("roots", [2, 3])
async def test_updates_of_several_roots_reach_every_kind_of_worker(
    site: Site, bus: NatsBus, run: str, roots: int, kind: msg.WindowKind
) -> None:
    """A plain worker, one with a layout and one of two ranks follow a trainer of several through a
    window with an end for each root: after five versions, sparse and dense, each holds every bit
    and has proven the digest of the whole."""
    trained = weights()
    async with Trainer(bus, run, Roots(trained, roots), kind) as trainer:
        team = [
            await Worker(site, f"w{ranks}", weights(), ranks, log=MemoryLog()).start()
            for ranks in (0, 1, 2)
        ]
        await trainer.welcome("w0", "w1", "w2")
        await trainer.open()
        for share in (0.02, 0.3, 1.0, 0.0, 0.001):
            await trainer.publish(share)
            assert all(worker.same(trained) for worker in team)
        assert [worker.first.verified for worker in team] == [5, 5, 5]


async def test_a_late_worker_catches_up_from_grouped_entries(
    site: Site, bus: NatsBus, run: str
) -> None:
    """Anchor and patches of two roots in the log: workers with other weights take both, and hold
    the head."""
    roots, shelf = Roots(weights(), 2), MemoryLog()
    await roots.store(shelf, roots.anchors())
    team = [
        await Worker(site, f"w{ranks}", weights(9), ranks, log=shelf).start() for ranks in (0, 2)
    ]
    async with Trainer(bus, run, roots) as trainer:
        for _ in range(3):
            patches = roots.step()
            await roots.store(shelf, patches)
            await trainer.announce(roots.announce(patches, window=0, attempt=0))
        await eventually(lambda: all(one.first.verified == 3 for one in team), timeout_s=20.0)
        assert all(worker.same(roots.trained) for worker in team)


async def test_a_corrupt_piece_is_refused_and_the_next_attempt_goes(
    site: Site, bus: NatsBus, run: str
) -> None:
    """The second root sends other bytes than were announced: the member says which root's, has
    changed nothing, and takes the next attempt in the same window."""
    roots = Roots(weights(), 2)
    async with Trainer(bus, run, roots) as trainer:
        worker = await Worker(site, "w0", weights(), 0, log=MemoryLog()).start()
        await trainer.welcome("w0")
        await trainer.open()
        patches = roots.step()
        announce = roots.announce(patches, trainer.window)
        await trainer.announce(announce)
        bad = Patch.from_bytes(patches[1].to_bytes())
        bad.buffer[-1] ^= 1
        said = await trainer.attempt(announce, [patches[0], bad])
        assert "root 1: corrupt patch: checksum" in said["w0"].error
        assert worker.same(weights())
        assert worker.first.version == 0
        again = _again(announce, 2)
        await trainer.say(msg.Call(sender=announce.sender, stamp=again.stamp))
        said = await trainer.attempt(again, patches)
        assert getattr(said["w0"], "error", None) is None
        await trainer.verified(1)
        assert worker.same(roots.trained)


def _again(announce: msg.Announce, attempt: int) -> msg.Announce:
    """The same announcement, on its way once more."""
    stamp = msgspec.structs.replace(announce.stamp, attempt=attempt)
    return msgspec.structs.replace(announce, stamp=stamp)


@pytest.mark.parametrize("ranks", [0, 2])
async def test_a_root_that_never_sends_costs_a_deadline(
    site: Site, bus: NatsBus, run: str, ranks: int
) -> None:
    """The first root sends, the second does not: within the deadline of the whole the worker says
    which root is missing and leaves the window, and its weights are as they were; a new window
    brings the version."""
    roots = Roots(weights(), 2)
    policy = replace(QUICK, send_s=1.0)
    async with Trainer(bus, run, roots) as trainer:
        worker = await Worker(site, "w0", weights(), ranks, policy=policy, log=MemoryLog()).start()
        await trainer.welcome("w0")
        await trainer.open()
        patches = roots.step()
        announce = roots.announce(patches, trainer.window)
        await trainer.announce(announce)
        began = time.monotonic()
        said = await trainer.attempt(announce, patches, silent={1})
        assert time.monotonic() - began < 5.0
        assert isinstance(said["w0"], msg.NotReady)
        assert "root 1: the broadcast did not end within" in said["w0"].reason
        assert worker.same(weights())
        assert worker.first.engine.guard().torn is None
        for ends in trainer.ends:
            await ends.abort_all()
        await trainer.open()
        again = msgspec.structs.replace(
            announce, stamp=msgspec.structs.replace(announce.stamp, window=2)
        )
        await trainer.say(msg.Call(sender=announce.sender, stamp=again.stamp))
        said = await trainer.attempt(again, patches)
        assert getattr(said["w0"], "error", None) is None, said
        await trainer.verified(1)
        assert worker.same(roots.trained)
