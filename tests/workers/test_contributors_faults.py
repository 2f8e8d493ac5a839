"""Ranks of a trainer that do not come, die, stop, or start again; a bus and logs that fail them."""

import asyncio
import contextlib
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import pytest

from archives import FailingLog
from layouts import contents
from ranks import split
from runs import QUICK, Ear, Site, Tensors, eventually, same_bits, step, until_stored, weights
from sparsecast import (
    AsyncPublisher,
    Broker,
    Closed,
    Contributor,
    Layout,
    LogError,
    ManifestMismatch,
    MemoryLog,
    RunBusy,
    SparsecastError,
    WaitTimeout,
    WorkerDied,
)
from sparsecast.messages.compose import through
from sparsecast.messages.metrics import Event
from spawn import Context, Processes
from teams import Team
from trainers import Trainers

#: Within so much of a rank's silence everybody knows.
TOLD_S = QUICK.silence_s + 3.0


async def _raised(entering: Any) -> BaseException | None:
    """What was raised within TOLD_S; TimeoutError."""
    async with asyncio.timeout(TOLD_S):
        try:
            await entering
        except SparsecastError as exc:
            return exc
    return None


# ---- at the start


async def test_a_rank_that_does_not_come_is_named(site: Site) -> None:
    """The third rank never comes: the first one says so after gather_s, and so does, at once then,
    the one that was there."""
    trainers = Trainers(site, weights(), split(weights(), 3))
    policy = replace(QUICK, gather_s=1.0)
    first, other = trainers.first(policy=policy), trainers.other(1)
    mine, theirs = await asyncio.gather(_raised(first.__aenter__()), _raised(other.__aenter__()))
    assert isinstance(mine, WaitTimeout)
    assert "rank 2 did not come" in str(mine)
    assert isinstance(theirs, Closed)
    assert "rank 2 did not come" in str(theirs)


async def test_a_first_rank_that_does_not_come_is_missed(site: Site) -> None:
    """Nobody gathers: the other rank says so after gather_s."""
    trainers = Trainers(site, weights(), split(weights(), 2))
    with pytest.raises(WaitTimeout, match=r"the first rank .* nothing is heard of it"):
        await trainers.other(1, policy=replace(QUICK, gather_s=0.5)).__aenter__()


async def test_a_busy_run_is_told_to_every_rank(site: Site) -> None:
    """Another trainer holds the run: the first rank raises RunBusy, and the others say the same,
    without waiting for anything."""
    await site.publisher(weights())
    trainers = Trainers(site, weights(), split(weights(), 3))
    ranks = [trainers.first(), trainers.other(1), trainers.other(2)]
    first, *others = await asyncio.gather(*(_raised(rank.__aenter__()) for rank in ranks))
    assert isinstance(first, RunBusy)
    for other in others:
        assert isinstance(other, Closed)
        assert f"run {site.run!r} is held" in str(other)


@pytest.mark.parametrize("what", ["missing", "overlap"])
async def test_layouts_that_make_up_no_whole_are_refused(site: Site, what: str) -> None:
    """Rows of a tensor are nobody's, or two ranks hold some of the same: every rank's entering
    fails, soon, and names it."""
    whole = weights()
    layouts = split(whole, 2)
    second = layouts[1]
    if what == "missing":
        second = Layout(
            tensors=tuple(spec for spec in second.tensors if spec.name != "mine.embed"),
            parts=tuple(part for part in second.parts if part.tensor != "embed"),
        )
        layouts = [_shifted(layouts[0]), second]
    else:
        layouts = [split(whole, 3)[0], *layouts[1:], split(whole, 3)[1]]
    trainers = Trainers(site, whole, layouts)
    ranks = [trainers.first(), *(trainers.other(rank) for rank in range(1, len(layouts)))]
    first, *others = await asyncio.gather(*(_raised(rank.__aenter__()) for rank in ranks))
    assert isinstance(first, ManifestMismatch)
    for error in (first, *others):
        assert "'embed'" in str(error) or "layer.weight" in str(error)


def _shifted(layout: Layout) -> Layout:
    """The same with the rows of the embedding two further down: nobody has the first two."""
    return Layout(
        tensors=layout.tensors,
        parts=tuple(
            msgspec.structs.replace(part, begin=(2, *part.begin[1:]))
            if part.tensor == "embed"
            else part
            for part in layout.parts
        ),
    )


async def test_the_first_rank_may_be_entered_again(site: Site) -> None:
    """Both ranks leave in order and enter again, the same objects: the run goes on above."""
    whole, mine = weights(), weights()
    trainers = Trainers(site, whole, split(whole, 2))
    first, other = trainers.first(), trainers.other(1)
    await site.replica(mine)
    for life in (1, 2):
        await asyncio.gather(first.__aenter__(), other.__aenter__())
        await first.wait_members(1, timeout_s=10)
        step(whole, life)
        trainers.share()
        update, _ = await asyncio.gather(first.publish(), other.publish())
        assert (await update.wait_applied(timeout_s=10)).complete
        assert same_bits(whole, mine)
        began = time.monotonic()
        await asyncio.gather(first.close(), other.close())
        assert time.monotonic() - began < 5.0
        with pytest.raises(Closed):
            await other.publish()


# ---- in mid-run


async def test_a_rank_that_started_again_ends_the_run(site: Site) -> None:
    """The second rank ends, and another life of it comes, whose weights nobody knows: the first
    rank's publish() says so, and the newcomer hears why when that leaves."""
    whole = weights()
    trainers = Trainers(site, whole, split(whole, 2))
    first, other = trainers.first(), trainers.other(1, linger_s=0.1)
    await asyncio.gather(first.__aenter__(), other.__aenter__())
    await other.close()
    entering = asyncio.create_task(_raised(trainers.other(1).__aenter__()))

    async def told() -> bool:
        with contextlib.suppress(WorkerDied):
            await first.publish()
            return False
        return True

    await eventually(told)
    with pytest.raises(WorkerDied, match="rank 1 of the trainer has started again"):
        await first.publish()
    await first.close()
    error = await entering
    assert isinstance(error, Closed)
    assert "has started again" in str(error)


async def _rank(context: Context, run: str, versions: int, pause_s: float) -> str:
    """A process of a rank: publish so many versions in step with nobody; what ended that."""
    whole = weights()
    layout = split(whole, context.size)[context.rank]
    held = contents(layout, whole)
    given: dict[str, Any] = {
        "run": run, "bus": context.broker_url, "policy": QUICK, "layout": layout, "linger_s": 3.0,
    }  # fmt: skip
    rank: AsyncPublisher | Contributor
    if context.rank == 0:
        rank = AsyncPublisher(held, ranks=context.size, **given)
    else:
        rank = Contributor(held, rank=context.rank, **given)
    await rank.__aenter__()
    if isinstance(rank, AsyncPublisher):
        await rank.wait_members(1, timeout_s=20)
    await context.meeting("begun")
    error = "nothing"
    try:
        for version in range(1, versions + 1):
            step(whole, version)
            for name, tensor in contents(layout, whole).items():
                held[name].copy_(tensor)
            async with asyncio.timeout(1.0):
                await rank.publish()
            if version == 5:
                context.mark("publishing")
            await asyncio.sleep(pause_s)
    except SparsecastError as exc:
        error = f"{type(exc).__name__}: {exc}"
        context.mark("told")
    began = time.monotonic()
    await rank.__aexit__(None, None, None)
    assert time.monotonic() - began < 8.0
    return error


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
@pytest.mark.parametrize("lost", [0, 2], ids=["first", "last"])
async def test_a_rank_fails_in_mid_run(site: Site, fault: signal.Signals, lost: int) -> None:
    """One of three ranks is killed or stopped while all publish: publish() of each of the others
    returns at once until, silence_s later, it says who is lost; they leave within a bound, and the
    worker goes on serving a version that was published."""
    mine = weights()
    replica = await site.replica(mine)
    with Processes(3, _rank, site.run, 400, 0.05, timeout_s=60, broker_url=site.url) as processes:
        await asyncio.to_thread(processes.wait, "publishing")
        await replica.wait_version(3, timeout_s=10)
        processes.kill(lost) if fault is signal.SIGKILL else processes.stop(lost)
        began = time.monotonic()
        for rank in {0, 1, 2} - {lost}:
            await asyncio.to_thread(processes.wait, "told", rank=rank)
        assert time.monotonic() - began < TOLD_S + 2.0
        await asyncio.sleep(0.5)
        with replica.reading() as version:
            assert same_bits(mine, _after(version))
        processes.kill(lost)
        results = await asyncio.to_thread(processes.results)
    for rank in {0, 1, 2} - {lost}:
        if lost == 0:
            assert "the first rank of the trainer" in results[rank]
        else:
            assert f"rank {lost} of the trainer unheard" in results[rank]


def _after(version: int) -> Tensors:
    whole = weights()
    for seed in range(1, version + 1):
        step(whole, seed)
    return whole


# ---- the bus and the log


@pytest.mark.parametrize("remembers", [True, False], ids=["with-its-store", "without"])
async def test_the_broker_comes_back(tmp_path: Path, run: str, remembers: bool) -> None:
    """The broker dies while all ranks publish, is away for longer than anything waits for, and
    comes back, with its memory or without: no publish() fails, and the worker has the newest
    version, whole."""
    stores = [tmp_path / "a", tmp_path / "a" if remembers else tmp_path / "b"]
    first = Broker(store_dir=stores[0])
    url = first.start()
    site, second = Site(url, run), None
    whole, mine = weights(), weights()
    trainers = Trainers(site, whole, split(whole, 3))
    policy = replace(QUICK, store_s=2.0, bus_s=1.0)

    async def train(versions: range) -> None:
        for version in versions:
            step(whole, version)
            await trainers.publish()
            await asyncio.sleep(0.05)

    try:
        publisher = await trainers.start(policy=policy)
        replica = await site.replica(mine)
        await publisher.wait_members(1, timeout_s=10)
        await train(range(1, 4))
        os.kill(first.pid, signal.SIGKILL)
        await train(range(4, 30))
        await asyncio.sleep(4.0)
        first.close()
        second = Broker(port=int(url.rsplit(":", 1)[1]), store_dir=stores[1])
        await asyncio.to_thread(second.start)
        await train(range(30, 34))
        await replica.wait_version(33, timeout_s=30)
        await eventually(lambda: replica.verified == 33)
        assert same_bits(whole, mine)
        assert replica.mismatches == 0
        step(whole, 34)
        report = await (await trainers.publish()).wait_applied(timeout_s=20)
        assert report.complete, report
    finally:
        await site.close()
        first.close()
        if second is not None:
            second.close()


@pytest.mark.parametrize("failing", [0, 1])
async def test_a_rank_whose_log_fails_is_told_and_tried_again(
    site: Site, ear: Ear, failing: int
) -> None:
    """One rank's log refuses two entries: that is told, with the rank, the versions are stored
    when it takes them again, and who comes with nothing is brought to the newest."""
    whole, mine = weights(), weights(9)
    trainers = Trainers(site, whole, split(whole, 2))
    logs = [FailingLog(), FailingLog()]
    logs[1]._held = logs[0]._held  # one log, which fails each rank by itself
    trainers.publisher = trainers.first(log=logs[0])
    trainers.others = [trainers.other(1, log=logs[1])]
    ranks = (*trainers.others, trainers.publisher)
    await asyncio.gather(*(rank.__aenter__() for rank in ranks))
    for rank in ranks:
        site.ends(rank)
    await until_stored(trainers.publisher, 0, anchor=True)
    logs[failing].failing_stores = 2
    for version in range(1, 6):
        step(whole, version)
        await trainers.publish()
    told = await ear.until(Event, kind="log-failed")
    assert "no room on the disk" in told.reason
    assert ("rank 1" in told.reason) == (failing == 1)
    await until_stored(trainers.publisher, 5)
    replica = await site.replica(mine, log=logs[0])
    assert await replica.wait_version(5, timeout_s=20) == 5
    assert same_bits(whole, mine)
    assert not trainers.publisher._outgoing.beside


async def test_what_was_to_be_stored_is_void_once_the_run_begins_anew(site: Site) -> None:
    """The bus has forgotten the run, and it was begun anew, when the log is given what was sealed
    before: that fails as what the anchor covers, and breaks nothing."""
    whole = weights()
    trainers = Trainers(site, whole, split(whole, 2))
    publisher = await trainers.start()
    step(whole, 1)
    await trainers.publish()
    await until_stored(publisher, 1)
    run = publisher._ports.run
    await run(publisher._outgoing.begin)
    stored = await publisher._archive.store((1,), 1)
    assert "not kept any more" in stored.reason  # type: ignore[union-attr]
    assert publisher._error is None


async def test_a_rank_that_could_not_merge_stores_what_the_others_do(site: Site) -> None:
    """The second rank has no memory to make one entry of several versions, while the first one
    has made it: the next entry is of the same versions on both, or nobody could use it."""
    whole, mine, log = weights(), weights(), MemoryLog()
    trainers = Trainers(site, whole, split(whole, 2))
    publisher = await trainers.start(log=log)
    await until_stored(publisher, 0, anchor=True)
    await site.replica(weights(), log=log)
    await publisher.wait_members(1, timeout_s=10)
    await eventually(lambda: publisher.window == "gloo")
    outgoing = trainers.others[0]._made_by()
    real, asked = outgoing.entry, list[tuple[int, ...]]()

    def entry(versions: tuple[int, ...], *args: Any) -> Any:
        before = [len(one) for one in asked]
        asked.append(tuple(versions))
        if max(before, default=0) < 2:
            raise MemoryError("no room")
        return real(versions, *args)

    outgoing.entry = entry  # type: ignore[method-assign]
    for version in range(1, 9):
        step(whole, version)
        await (await trainers.publish()).wait_applied(timeout_s=10)
        await asyncio.sleep(0.05)
    await until_stored(publisher, 8)
    assert max(map(len, asked)) > 1
    replica = await site.replica(mine, "w1", log=log)
    assert await replica.wait_version(8, timeout_s=20) == 8
    assert same_bits(whole, mine)
    bases = {e.base_version for e in await publisher._ports.log.entries(timeout_s=5)}
    assert 0 in bases  # patches lead on from the anchor


async def test_a_rank_follows_one_life_of_the_first_one(site: Site) -> None:
    """The first rank leaves and another one takes its place, while the other rank is still where it
    was: what that holds is of another step, so it does not come, and publishes nothing."""
    trainers = Trainers(site, weights(), split(weights(), 2))
    publisher = await trainers.start()
    await trainers.publish()
    await publisher.close()
    late = trainers.first(policy=replace(QUICK, gather_s=1.0))
    with pytest.raises(WaitTimeout, match="rank 1 did not come"):
        await late.__aenter__()
    with pytest.raises(Closed, match="the first rank of the trainer has left"):
        await trainers.others[0].publish()


async def test_no_rank_stores_what_there_is_no_room_for(site: Site) -> None:
    """The quota has no room for a patch beside the next anchor: no rank puts its piece of it into
    the log, an anchor takes its place, and all is stored in the end."""
    whole, log = weights(), MemoryLog()
    trainers = Trainers(site, whole, split(whole, 2))
    policy = replace(QUICK, quota_nbytes=400_000, anchor_every=100_000, merge_every=1)
    publisher = await trainers.start(log=log, policy=policy)
    await site.replica(weights(), log=log)
    await publisher.wait_members(1, timeout_s=10)
    pieces: dict[int, set[int]] = {}
    real = log.store

    async def store(entry: Any, payload: Any, **options: Any) -> None:
        pieces.setdefault(entry.version if entry.base_version is not None else -1, set())
        pieces[entry.version if entry.base_version is not None else -1].add(entry.root)
        await real(entry, payload, **options)

    with mock.patch.object(log, "store", store):
        for version in range(1, 31):
            step(whole, version, share=1.0)
            await (await trainers.publish()).wait_applied(timeout_s=10)
        await until_stored(publisher, 30)
    assert {0, 1} in pieces.values()
    assert {1} not in pieces.values()
    assert len(pieces) < 30


async def test_a_layout_that_takes_long_to_compose(site: Site) -> None:
    """What ranks of a worker hold of a trainer's takes longer to make out than a window may take to
    open: the next window has it."""
    whole = weights()
    policy = replace(QUICK, routing="all-to-all", open_s=0.4)
    slow = [0.9, 0.9]

    def composing(*layouts: Layout) -> Layout:
        time.sleep(slow.pop() if slow else 0.0)
        return through(*layouts)

    trainers, team = Trainers(site, whole, split(whole, 2)), Team(site, whole, 2)
    publisher = await trainers.start(policy=policy)
    with mock.patch("sparsecast.workers.sending.through", composing):
        await team.start(policy=policy)
        await publisher.wait_members(1, timeout_s=10)
        await eventually(lambda: publisher.window == "gloo", timeout_s=15)
    assert not slow
    step(whole, 1)
    assert (await (await trainers.publish()).wait_applied(timeout_s=10)).complete
    assert team.same(whole)


async def test_what_waits_for_room_is_kept_as_one_on_every_rank(site: Site) -> None:
    """The log cannot say for a while whether it has room, and there is nobody to send to: what
    waits is one patch, on the other rank as well, and is one entry once the log is back."""
    whole, log = weights(), MemoryLog()
    trainers = Trainers(site, whole, split(whole, 2))
    policy = replace(QUICK, quota_nbytes=1_000_000, anchor_every=100_000, merge_every=1)
    publisher = await trainers.start(log=log, policy=policy)
    await until_stored(publisher, 0, anchor=True)
    replica = await site.replica(weights(), log=log)
    await publisher.wait_members(1, timeout_s=10)
    await eventually(lambda: publisher.window == "gloo")
    away = mock.AsyncMock(side_effect=LogError("it is away"))
    kept = [rank._outgoing._kept for rank in trainers.ranks]
    with mock.patch.object(log, "entries", away):
        for version in range(1, 7):
            step(whole, version)
            assert (await (await trainers.publish()).wait_applied(timeout_s=10)).complete
            await asyncio.sleep(0.3)
        assert max(map(len, kept)) <= 3
    await until_stored(publisher, 6)
    late = await site.replica(weights(9), "w1", log=log)
    assert await late.wait_version(6, timeout_s=10) == 6
    await eventually(lambda: replica.verified == late.verified == 6)
