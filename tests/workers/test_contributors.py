"""Trainers of several ranks: each diffs its own shard, workers hold what all of them make up."""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from ranks import fully_sharded, same, split
from runs import (
    QUICK,
    Ear,
    Site,
    checkpoint,
    codes,
    eventually,
    same_bits,
    step,
    until_stored,
    weights,
)
from sparsecast import (
    AsyncPublisher,
    ManifestMismatch,
    MemoryLog,
    Replica,
    SettingsError,
    SparsecastError,
)
from sparsecast.messages.metrics import Event, WorkerMetrics
from sparsecast.pipeline.log import pieces
from teams import Team
from trainers import Trainers

#: Anchors and merged patches after a few versions.
SPANS = replace(QUICK, anchor_every=4, merge_every=2, keep_versions=2)


async def _train(trainers: Trainers, versions: range) -> None:
    """Publish these versions on all ranks, each once the one before it is in the log."""
    for version in versions:
        step(trainers.whole, version)
        await trainers.publish()
        await until_stored(trainers.publisher, version)


@pytest.mark.parametrize("ranks", [2, 3])
async def test_workers_follow_what_all_ranks_publish(site: Site, ranks: int) -> None:
    """Every version is on a worker of one rank, bit for bit, each proven by a digest to which every
    rank of the trainer has given its share."""
    whole, mine = weights(), weights()
    trainers = Trainers(site, whole, split(whole, ranks))
    publisher = await trainers.start()
    replica = await site.replica(mine)
    await publisher.wait_members(1, timeout_s=10)
    await eventually(lambda: publisher.window == "gloo")
    for version in range(1, 8):
        step(whole, version)
        update = await trainers.publish()
        report = await update.wait_applied(timeout_s=10)
        assert report.complete, report
        assert same_bits(whole, mine)
        await eventually(lambda version=version: replica.verified == version)
    assert replica.mismatches == 0


async def test_a_worker_of_several_ranks_follows_one_of_several(site: Site, ear: Ear) -> None:
    """Three ranks train, two hold the weights otherwise cut: each of the two has its part of every
    version, by the window, and the worker proves the sum."""
    whole = weights()
    trainers, team = Trainers(site, whole, split(whole, 3)), Team(site, whole, 2)
    publisher = await trainers.start()
    first, others = await team.start()
    await publisher.wait_members(1, timeout_s=10)
    await eventually(lambda: publisher.window == "gloo")
    for version in range(1, 6):
        step(whole, version)
        update = await trainers.publish()
        report = await update.wait_applied(timeout_s=10)
        assert report.complete, report
        assert team.same(whole)
    await eventually(lambda: first.verified == 5)
    assert [shard.version for shard in others] == [5]
    assert (await ear.until(WorkerMetrics, worker="w0", version=5)).source == "window"


@pytest.mark.parametrize("roots", [1, 2, 3])
async def test_each_rank_receives_what_it_holds(site: Site, ear: Ear, roots: int) -> None:
    """All-to-all: two workers of two ranks that hold the same, and one that holds everything. Each
    class of ranks has ends of its own, gets its parts alone, and all of them are proven."""
    whole, mine = weights(), weights()
    policy = replace(QUICK, routing="all-to-all")
    publisher: AsyncPublisher
    if roots == 1:
        publisher = await site.publisher(whole, policy=policy)
    else:
        trainers = Trainers(site, whole, split(whole, roots))
        publisher = await trainers.start(policy=policy)
    teams = [Team(site, whole, 2, name) for name in ("a", "b")]
    replicas = [(await team.start())[0] for team in teams]
    replicas.append(await site.replica(mine, "c"))
    await publisher.wait_members(3, timeout_s=10)

    def all_in() -> bool:
        opened = [e.reason for e in ear.heard if isinstance(e, Event) and e.kind == "window-open"]
        return any(reason.endswith(": a, b, c") for reason in opened)

    await eventually(all_in)
    for version in range(1, 6):
        step(whole, version)
        update = await (publisher.publish() if roots == 1 else trainers.publish())
        report = await update.wait_applied(timeout_s=10)
        assert report.complete, report
        assert same_bits(whole, mine)
        assert all(same(team.layouts, team.held, whole) for team in teams)
        await eventually(lambda version=version: all(r.verified == version for r in replicas))
        told = {
            name: await ear.until(WorkerMetrics, worker=name, version=version) for name in "abc"
        }
        assert {one.source for one in told.values()} == {"window"}
        assert told["a"].nbytes == told["b"].nbytes < 0.8 * told["c"].nbytes


def _jetstream(tmp_path: Path) -> Any:
    return "jetstream"


def _directory(tmp_path: Path) -> Any:
    return f"dir:{tmp_path}"


def _both(tmp_path: Path) -> Any:
    return f"dir:{tmp_path},jetstream"


def _memory(tmp_path: Path) -> Any:
    return MemoryLog()


@pytest.mark.parametrize("tier", [_jetstream, _directory, _both, _memory])
async def test_who_has_nothing_takes_the_log(
    site: Site, ear: Ear, tmp_path: Path, tier: Callable[[Path], Any]
) -> None:
    """Four versions were published before workers of one and of two ranks come with other weights:
    they take an anchor and patches in pieces, out of any tier, and follow by the window then. Tags
    are of each rank's own, and keep no piece from its fellows."""
    log, whole, mine = tier(tmp_path), weights(), weights(9)
    trainers = Trainers(site, whole, split(whole, 2))
    publisher = await trainers.start(log=log)
    for version in range(1, 5):
        step(whole, version)
        trainers.share()
        await asyncio.gather(
            publisher.publish(step=version, tags={"loss": 0.5 + version}),
            *(other.publish(tags={"loss": 0.1}) for other in trainers.others),
        )
        await until_stored(publisher, version)
    replica = await site.replica(mine, log=log)
    team = Team(site, weights(8), 2, name="w1")
    first, _ = await team.start(log=log)
    await publisher.wait_members(2, timeout_s=20)
    for held in (replica, first):
        assert await held.wait_version(4, timeout_s=20) == 4
    assert same_bits(whole, mine)
    assert team.same(whole)
    for name in ("w0", "w1"):
        assert (await ear.until(WorkerMetrics, worker=name, version=4)).source == "log"
    await eventually(lambda: publisher.window == "gloo")
    step(whole, 5)
    report = await (await trainers.publish()).wait_applied(timeout_s=10)
    assert report.complete, report
    assert same_bits(whole, mine)
    assert team.same(whole)
    assert replica.mismatches == first.mismatches == 0


async def test_a_worker_that_was_away_catches_up(site: Site, ear: Ear) -> None:
    """A worker leaves at version 2 and is back, with what it held, at version 6: the patches of the
    versions between come from the log, and no anchor does."""
    whole, mine, log = weights(), weights(), MemoryLog()
    trainers = Trainers(site, whole, split(whole, 2))
    publisher = await trainers.start(log=log)
    async with Replica(
        mine, run=site.run, bus=site.url, name="w0", policy=QUICK, log=log
    ) as replica:
        await publisher.wait_members(1, timeout_s=10)
        await _train(trainers, range(1, 3))
        await replica.wait_version(2, timeout_s=10)
    await _train(trainers, range(3, 7))
    again = await site.replica(mine, log=log)
    assert await again.wait_version(6, timeout_s=20) == 6
    await eventually(lambda: again.verified == 6)
    assert same_bits(whole, mine)
    entries = [entry for entry, _ in log._held.values() if entry.base_version is None]
    assert {entry.version for entry in entries} == {0}
    told = await ear.until(WorkerMetrics, worker="w0", version=6)
    assert told.source == "log"


async def test_who_evaluates_follows_without_a_window(site: Site) -> None:
    """There is no worker but one that evaluates: no window opens, and the log brings it each
    version."""
    whole, mine = weights(), weights(9)
    trainers = Trainers(site, whole, split(whole, 2))
    publisher = await trainers.start()
    replica = await site.replica(mine, role="evaluation")
    for version in range(1, 4):
        step(whole, version)
        await trainers.publish()
        await replica.wait_version(version, timeout_s=20)
        assert same_bits(whole, mine)
    assert publisher.window is None


async def test_windows_over_the_bus(site: Site) -> None:
    """Every rank sends its payload through the broker."""
    whole, mine = weights(), weights()
    trainers = Trainers(site, whole, split(whole, 2))
    publisher = await trainers.start(policy=replace(QUICK, window="bus"))
    await site.replica(mine)
    await publisher.wait_members(1, timeout_s=10)
    await eventually(lambda: publisher.window == "bus")
    for version in range(1, 4):
        step(whole, version)
        report = await (await trainers.publish()).wait_applied(timeout_s=10)
        assert report.complete, report
        assert same_bits(whole, mine)


async def test_merged_spans_and_anchors_lead_across(site: Site) -> None:
    """Anchors every four versions, spans of two merged: after twelve the log has dropped what
    nobody needs, down to the last piece; who has nothing and who holds version 0 come to the newest
    across merged patches."""
    whole, fresh, old, log = weights(), weights(9), weights(), MemoryLog()
    trainers = Trainers(site, whole, split(whole, 3))
    publisher = await trainers.start(policy=SPANS, log=log)
    await _train(trainers, range(1, 13))

    async def tidy() -> bool:
        held = [entry for entry, _ in log._held.values()]
        entries = await publisher._ports.log.entries(timeout_s=5)
        oldest = min(entry.version for entry in entries)
        return not pieces.partial(held) and oldest >= 4 and any(entry.merged for entry in entries)

    await eventually(tidy)
    replicas = [
        await site.replica(mine, name, log=log) for name, mine in (("w0", fresh), ("w1", old))
    ]
    for replica, mine in zip(replicas, (fresh, old), strict=True):
        assert await replica.wait_version(12, timeout_s=20) == 12
        assert same_bits(whole, mine)
        assert replica.mismatches == 0


@pytest.mark.parametrize("shadow", ["device", "host"])
async def test_masters_are_published_as_what_inference_runs(site: Site, shadow: str) -> None:
    """Ranks train in float32 and publish bfloat16: the worker holds what casting the whole model
    gives."""
    whole = {"w": torch.randn(63, 17), "norm": torch.randn(17)}

    def cast() -> dict[str, torch.Tensor]:
        return {name: tensor.to(torch.bfloat16) for name, tensor in whole.items()}

    mine = {name: torch.zeros_like(tensor) for name, tensor in cast().items()}
    trainers = Trainers(site, whole, split(cast(), 2), masters=split(whole, 2))
    publisher = await trainers.start(dtype=torch.bfloat16, shadow=shadow)
    replica = await site.replica(mine)
    await publisher.wait_members(1, timeout_s=10)
    for version in range(1, 5):
        step(whole, version, share=0.2)
        report = await (await trainers.publish()).wait_applied(timeout_s=10)
        assert report.complete, report
        assert same_bits(cast(), mine)
    assert replica.mismatches == 0


async def test_copies_share_the_work(site: Site) -> None:
    """Four ranks, of which each two hold the same: every element is published by one of them, and
    none of the four is idle."""
    whole, mine = weights(), weights()
    halves = split(whole, 2)
    trainers = Trainers(site, whole, [*halves, *halves])
    publisher = await trainers.start()
    replica = await site.replica(mine)
    await publisher.wait_members(1, timeout_s=10)
    assert all(layout.tensors for layout in publisher._outgoing.roots)
    assert sum(layout.local.numel for layout in publisher._outgoing.roots) == sum(
        tensor.numel() for tensor in whole.values()
    )
    for version in range(1, 4):
        step(whole, version)
        report = await (await trainers.publish()).wait_applied(timeout_s=10)
        assert report.complete, report
        assert same_bits(whole, mine)
    await eventually(lambda: replica.verified == 3)


async def test_a_rank_that_has_nothing_to_publish(site: Site) -> None:
    """Three ranks of a model whose only tensor has two rows: the third one publishes nothing, and
    takes part."""
    whole = {"w": torch.randn(2, 8)}
    mine = {"w": torch.zeros(2, 8)}
    trainers = Trainers(site, whole, split(whole, 3))
    assert [layout.local.numel for layout in trainers.layouts].count(0) == 1
    publisher = await trainers.start()
    await site.replica(mine)
    await publisher.wait_members(1, timeout_s=10)
    for version in range(1, 4):
        step(whole, version, share=0.5)
        report = await (await trainers.publish()).wait_applied(timeout_s=10)
        assert report.complete, report
        assert same_bits(whole, mine)


async def test_a_view_of_what_each_rank_holds(site: Site) -> None:
    """Three ranks that hold rows publish codes and scales of them: the layouts are of those, and
    workers have what the view makes of the whole model; so they do after a rank that trains on
    goes on from the log, and after going back."""
    whole = weights()
    mine = {name: torch.zeros_like(tensor) for name, tensor in codes(whole).items()}
    ways = {"masters": fully_sharded(whole, 3)}
    trainers = Trainers(site, whole, fully_sharded(codes(whole), 3), **ways)
    publisher = await trainers.start(view=codes)
    replica = await site.replica(mine)
    await publisher.wait_members(1, timeout_s=10)
    for version in range(1, 4):
        step(whole, version)
        update = await trainers.publish()
        assert (await update.wait_applied(timeout_s=10)).complete
        assert same_bits(codes(whole), mine)
        await until_stored(publisher, version)
    assert (await (await trainers.rollback(2)).wait_applied(timeout_s=10)).complete
    assert same_bits(codes(checkpoint(2)), mine)
    await until_stored(publisher, 4)
    for rank in (publisher, *trainers.others):
        await rank.close()
    again = Trainers(site, checkpoint(5), fully_sharded(codes(whole), 3), **ways)
    publisher = await again.start(view=codes, resume="must")
    await eventually(lambda: replica.verified == publisher.version)
    assert same_bits(codes(checkpoint(5)), mine)
    assert replica.mismatches == 0


async def test_a_view_that_fails_on_one_rank(site: Site) -> None:
    """What it raises publish() raises there, as any call that fails on one rank only: the run ends,
    and the first rank says where."""
    whole, broken = weights(), False

    def view(tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        if broken:
            raise ArithmeticError("no scale")
        return tensors

    trainers = Trainers(site, whole, split(whole, 2))
    trainers.other = partial(trainers.other, view=view)  # type: ignore[method-assign]
    publisher = await trainers.start()
    await site.replica(weights())
    await publisher.wait_members(1, timeout_s=10)
    broken = True
    with pytest.raises(ArithmeticError, match="no scale"):
        await trainers.others[0].publish()
    update = await publisher.publish()
    with pytest.raises(SparsecastError, match=r"rank 1: .*no scale"):
        await update.wait_applied(timeout_s=10)


async def test_a_view_that_gives_other_tensors_than_before(site: Site) -> None:
    """A tensor more, or one less, on a rank: it says so, and nothing was published there."""
    whole, extra = weights(), {"scale": torch.ones(3)}
    changed = dict[str, Any]()

    def view(tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        return {name: t for name, t in {**tensors, **changed}.items() if t is not None}

    trainers = Trainers(site, whole, split(whole, 2))
    await trainers.start(view=view)
    changed |= extra
    with pytest.raises(ManifestMismatch, match="'scale' is only now"):
        await trainers.others[0].publish()
    changed.clear()
    changed["mine.steps"] = None
    with pytest.raises(ManifestMismatch, match=r"'mine\.steps' is missing now"):
        await trainers.publisher.publish()
    assert {rank.version for rank in trainers.ranks} == {0}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"on_busy": "error"}, "the others would publish what this"),
        ({"bus": None}, "a trainer of 2 ranks needs bus="),
        ({"view": dict, "dtype": torch.bfloat16}, "view and dtype"),
        ({"ranks": 0}, "a trainer of 0 ranks"),
    ],
    ids=["on_busy", "bus", "view", "none"],
)
def test_what_several_ranks_cannot_do_is_refused(options: dict[str, Any], says: str) -> None:
    """Said when the object is made, with what to do."""
    with pytest.raises(SettingsError, match=says):
        AsyncPublisher(weights(), **{"run": "r", "bus": "nats://h:1", "ranks": 2, **options})
