"""Workers whose weights are spread over several ranks, and what becomes of them all together."""

import asyncio
import signal
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

from archives import FailingLog
from ranks import held, same, split
from runs import (
    QUICK,
    Ear,
    Site,
    Tensors,
    checkpoint,
    eventually,
    same_bits,
    step,
    until_stored,
    weights,
)
from sparsecast import (
    Layout,
    Padding,
    Part,
    Replica,
    ReplicaRefused,
    ReplicaTorn,
    SettingsError,
    Shard,
    WaitTimeout,
    WorkerDied,
)
from sparsecast.messages.manifest import TensorSpec
from sparsecast.messages.metrics import Event, WorkerMetrics
from sparsecast.pipeline.delta import manifest_of
from sparsecast.workers.engine import ModuleEngine
from spawn import Context, Processes
from teams import Team


async def train(publisher: Any, trained: Tensors, versions: range) -> None:
    """Publish these versions, each once the one before it is applied everywhere."""
    for version in versions:
        step(trained, version)
        update = await publisher.publish()
        report = await update.wait_applied(timeout_s=20)
        assert report.complete, report


@pytest.mark.parametrize("ranks", [1, 2, 3])
async def test_updates_reach_every_rank(site: Site, ear: Ear, ranks: int) -> None:
    """A worker of one to three ranks beside a plain one: one member, with a place in the window for
    each rank; after five updates each rank holds its part, and the worker proves the trainer's
    digest by the sum of theirs."""
    trained, plain = weights(), weights()
    team = Team(site, trained, ranks)
    publisher = await site.publisher(trained)
    first, others = await team.start()
    await site.replica(plain, "w1")
    await publisher.wait_members(2, timeout_s=10)

    def both_in() -> bool:
        opened = [e.reason for e in ear.heard if isinstance(e, Event) and e.kind == "window-open"]
        return any(reason.endswith(": w0, w1") for reason in opened)

    await eventually(both_in)
    await train(publisher, trained, range(1, 6))
    await eventually(lambda: first.verified == 5)
    assert team.same(trained)
    assert same_bits(trained, plain)
    assert [shard.version for shard in others] == [5] * (ranks - 1)
    told = await ear.until(WorkerMetrics, worker="w0", version=5)
    assert (told.source, told.verified, told.mismatches) == ("window", True, 0)


async def test_a_fused_layout_of_one_rank(site: Site) -> None:
    """An engine holds weight and embedding turned and fused, with a row of padding: it follows like
    any other, and the padding stays as it was."""
    trained = {"a": torch.randn(3, 4), "b": torch.randn(2, 4), "c": torch.randn(5)}
    parts = (
        Part(tensor="a", begin=(0, 0), shape=(3, 4), local="ab", at=(0, 0), axes=(1, 0)),
        Part(tensor="b", begin=(0, 0), shape=(2, 4), local="ab", at=(0, 3), axes=(1, 0)),
        Part(tensor="c", begin=(0,), shape=(5,), local="c", at=(0,), axes=(0,)),
    )
    layout = Layout(
        tensors=(TensorSpec("ab", "float32", (4, 6)), TensorSpec("c", "float32", (5,))),
        parts=parts,
        padding=(Padding(local="ab", at=(0, 5), shape=(4, 1)),),
    )
    mine = {"ab": torch.full((4, 6), 7.0), "c": torch.zeros(5)}
    publisher = await site.publisher(trained)
    replica = await site.replica(mine, layout=layout)
    await publisher.wait_members(1, timeout_s=10)
    for seed in range(1, 4):
        step(trained, seed, share=0.3)
        update = await publisher.publish()
        assert (await update.wait_applied(timeout_s=10)).complete
    await eventually(lambda: replica.verified == 3)
    assert torch.equal(mine["ab"][:, :3].t(), trained["a"])
    assert torch.equal(mine["ab"][:, 3:5].t(), trained["b"])
    assert torch.equal(mine["ab"][:, 5], torch.full((4,), 7.0))
    assert torch.equal(mine["c"], trained["c"])


async def test_late_ranks_take_the_log(site: Site) -> None:
    """Two ranks come with other weights when the run is at version 4: each takes its part of the
    anchor and of the patches, and no round waited for them."""
    trained = weights()
    publisher = await site.publisher(trained)
    for version in range(1, 5):
        step(trained, version)
        await publisher.publish()
        await until_stored(publisher, version)
    team = Team(site, weights(9), 2)
    first, _ = await team.start()
    await first.wait_version(4, timeout_s=20)
    await eventually(lambda: first.verified == 4)
    assert team.same(trained)


async def test_a_rank_that_does_not_come_is_named(site: Site) -> None:
    """The first of three ranks waits for the others; the last one never comes."""
    team = Team(site, weights(), 3)
    async with team.other(1):
        with pytest.raises(WaitTimeout, match="rank 2 did not come"):
            await team.first(policy=replace(QUICK, gather_s=1.0)).__aenter__()


async def test_a_rank_may_come_late(site: Site) -> None:
    """The first rank is there before the other one: it waits, and both follow."""
    trained = weights()
    team = Team(site, trained, 2)
    await site.publisher(trained)
    first = team.first()
    entering = asyncio.create_task(first.__aenter__())
    await asyncio.sleep(0.5)
    assert not entering.done()
    async with team.other(1):
        await entering
        await first.wait_version(0, timeout_s=10)
        await first.close()


@pytest.mark.parametrize("what", ["missing", "twice"])
async def test_layouts_that_do_not_fit_are_refused(site: Site, what: str) -> None:
    """The ranks leave rows out, or hold some twice: the worker is refused, and told which tensor it
    is."""
    trained = weights()
    await site.publisher(trained)
    team = Team(site, trained, 2)
    if what == "missing":
        team.layouts[1] = _without(team.layouts[1], "embed")
        del team.held[1]["mine.embed"]
    else:
        team.layouts[1] = split(trained, 1)[0]
        team.held[1] = held(team.layouts[1], trained)
    team.engines = [ModuleEngine(mine) for mine in team.held]
    first, _ = await team.start()
    with pytest.raises(ReplicaRefused, match="embed"):
        await first.wait_version(0, timeout_s=10)


@pytest.mark.parametrize(
    ("spoil", "refusal"),
    [
        (
            lambda held: held.update(embed_=held.pop("mine.embed")),
            "tensor 'embed_' is missing in the layout of this rank",
        ),
        (
            lambda held: held.pop("mine.layer.bias"),
            "tensor 'mine.layer.bias' is only in the layout of this rank",
        ),
        (
            lambda held: held.update({"mine.embed": held["mine.embed"][1:]}),
            r"tensor 'mine.embed' has shape \[149, 41\] in the model and \[150, 41\] in the layout "
            "of this rank",
        ),
        (
            lambda held: held.update({"mine.embed": held["mine.embed"].half()}),
            "tensor 'mine.embed' has dtype float16 in the model and bfloat16 in the layout of this "
            "rank",
        ),
    ],
    ids=["another name", "missing", "shape", "dtype"],
)
async def test_a_model_that_is_not_its_layouts_is_refused(
    site: Site, spoil: Callable[[Tensors], Any], refusal: str
) -> None:
    """The second rank's model has other tensors than its layout says: the worker is refused, with
    the rank, the tensor, and whose side has what."""
    trained = weights()
    await site.publisher(trained)
    team = Team(site, trained, 2)
    spoil(team.held[1])
    team.engines[1] = ModuleEngine(team.held[1])
    first, _ = await team.start()
    with pytest.raises(ReplicaRefused, match=f"rank 1: {refusal}"):
        await first.wait_version(0, timeout_s=10)


def _without(layout: Layout, tensor: str) -> Layout:
    return Layout(
        tensors=tuple(spec for spec in layout.tensors if spec.name != f"mine.{tensor}"),
        parts=tuple(part for part in layout.parts if part.tensor != tensor),
    )


async def test_a_flipped_bit_on_any_rank_is_found_and_mended(site: Site, ear: Ear) -> None:
    """Somebody writes to the weights of the second rank: the sum of the digests is wrong, the
    worker is told, and both ranks start again from an anchor."""
    trained = weights()
    team = Team(site, trained, 2)
    publisher = await site.publisher(trained)
    first, _ = await team.start()
    await publisher.wait_members(1, timeout_s=10)
    await train(publisher, trained, range(1, 3))
    await eventually(lambda: first.verified == 2)
    team.held[1]["mine.layer.weight"].view(-1)[5] += 1.0
    step(trained, 3)
    await publisher.publish()
    await ear.until(Event, kind="mismatch", member="w0")
    await eventually(lambda: first.verified == 3, timeout_s=20.0)
    assert team.same(trained)


async def test_an_apply_that_fails_on_one_rank_is_none(site: Site) -> None:
    """The second rank's engine fails in mid-apply: no reader sees the version, all ranks start
    again from an anchor, and hold it then."""
    trained = weights()
    team = Team(site, trained, 2)
    publisher = await site.publisher(trained)
    first, _ = await team.start()
    await publisher.wait_members(1, timeout_s=10)
    await train(publisher, trained, range(1, 2))
    engine = team.engines[1]
    whole = engine.after_apply
    seen: list[int | None] = []

    def fails(version: int, changed: Any) -> None:
        engine.after_apply = whole  # type: ignore[method-assign]
        seen.append(first.version)
        raise RuntimeError("the engine lost its cache")

    engine.after_apply = fails  # type: ignore[method-assign]
    step(trained, 2)
    await publisher.publish()
    await eventually(lambda: first.verified == 2, timeout_s=20.0)
    assert seen == [1]
    assert team.same(trained)


async def test_readers_on_the_loop_of_the_replica(site: Site) -> None:
    """A program reads on the very loop that the replica runs on, again and again while updates
    come: an apply holds it up for no longer than the other rank takes to write."""
    trained = weights()
    team = Team(site, trained, 2)
    publisher = await site.publisher(trained)
    first, shard = team.first(), team.other(1)
    await asyncio.to_thread(shard.start)
    await first.__aenter__()
    site.ends(first)
    await publisher.wait_members(1, timeout_s=10)
    training = asyncio.create_task(train(publisher, trained, range(1, 11)))
    loop, longest = asyncio.get_running_loop(), 0.0
    while not training.done():
        began = loop.time()
        with first.reading(timeout_s=10):
            longest = max(longest, loop.time() - began)
        await asyncio.sleep(0)
    await training
    await asyncio.to_thread(shard.stop)
    assert longest < 1.0
    assert team.same(trained)


async def test_who_holds_the_weights_takes_nothing(site: Site) -> None:
    """Both ranks start with the trainer's weights, leave, and come back with what they hold: the
    sum of their digests says which version that is, and nothing is taken from the log."""
    log, trained = FailingLog(), weights()
    team = Team(site, trained, 2)
    publisher = await site.publisher(trained, log=log)
    for version in (0, 1):
        first, shard = team.first(log=log), team.other(1, log=log)
        await asyncio.gather(first.__aenter__(), shard.__aenter__())
        await first.wait_version(version, timeout_s=10)
        await publisher.wait_members(1, timeout_s=10)
        await eventually(lambda: publisher.window == "gloo")
        await train(publisher, trained, range(version + 1, version + 2))
        await eventually(lambda first=first: first.verified == first.version)
        await first.close()
        await shard.close()
    assert log.loaded == []
    assert team.same(trained)


async def test_readers_of_another_rank_delay_and_tear_nothing(site: Site) -> None:
    """Somebody holds the guard of the second rank, which has no readers of its own: nothing is
    written until it lets go, and nobody starts again."""
    trained = weights()
    team = Team(site, trained, 2)
    publisher = await site.publisher(trained)
    first, _ = await team.start()
    await publisher.wait_members(1, timeout_s=10)
    await train(publisher, trained, range(1, 2))
    step(trained, 2)
    with team.engines[1].guard().reading():
        await publisher.publish()
        await asyncio.sleep(3 * QUICK.guard_s)
        assert first.version == 1
        assert first.engine.guard().torn is None
    await eventually(lambda: first.verified == 2, timeout_s=20.0)
    assert team.same(trained)


async def test_what_one_rank_cannot_load_is_tried_again(site: Site) -> None:
    """There is no memory for an entry of the log, on the second rank alone: neither has it staged,
    and both take it the next time."""
    trained = weights()
    publisher = await site.publisher(trained)
    await until_stored(publisher, 0, anchor=True)
    team = Team(site, weights(9), 2)
    first, shard = team.first(), team.other(1)
    await shard.__aenter__()
    site.ends(shard)
    real, failures = shard._incoming.stage_bytes, [MemoryError("no room")]
    staged: list[list[int]] = []

    def stage(*args: Any, **options: Any) -> None:
        if failures:
            raise failures.pop()
        staged.append(list(first._incoming._staged))
        real(*args, **options)

    shard._incoming.stage_bytes = stage  # type: ignore[method-assign]
    await first.__aenter__()
    site.ends(first)
    await eventually(lambda: first.verified == 0, timeout_s=20.0)
    assert not failures
    assert team.same(trained)


async def test_a_second_first_rank_ends_the_other(site: Site) -> None:
    """The first rank is not heard for a while, and another process of that name takes its rank
    over: when it is back, it finds that out and says so."""
    trained = weights()
    team = Team(site, trained, 2)
    await site.publisher(trained)
    first, _ = await team.start()
    await first.wait_version(0, timeout_s=10)
    assert first._group is not None
    leading = first._group._leading
    with mock.patch.object(leading, "_put"), mock.patch.object(leading, "_lives"):
        await asyncio.sleep(1.5 * QUICK.silence_s)
        second = team.first()
        await second.__aenter__()
        site.ends(second)
    with pytest.raises(WorkerDied, match="follows another first rank"):
        await first.wait_version(1, timeout_s=10)


async def test_a_silent_rank_costs_its_worker_alone(site: Site) -> None:
    """The second rank is not heard for a while: its worker refuses and says which rank it is; the
    other worker follows; when the rank is back, its worker catches up."""
    trained, plain = weights(), weights()
    team = Team(site, trained, 2)
    publisher = await site.publisher(trained)
    first, (shard,) = await team.start()
    other = await site.replica(plain, "w1")
    await publisher.wait_members(2, timeout_s=10)
    await train(publisher, trained, range(1, 2))
    with mock.patch.object(shard._following, "_say"):
        for version in range(2, 5):
            step(trained, version)
            await publisher.publish()
            await eventually(lambda version=version: other.verified == version, timeout_s=20.0)
        await eventually(lambda: "rank 1" in (first.refusal() or ""), timeout_s=10.0)
        assert "unheard" in (first.refusal() or "")
    await eventually(lambda: first.verified == publisher.version, timeout_s=30.0)
    assert first.refusal() is None
    assert team.same(trained)
    assert same_bits(trained, plain)


async def test_a_rank_that_started_again_ends_its_worker(site: Site) -> None:
    """The second rank ends and another life of it comes: what it holds nobody knows, and the first
    rank says so to who waits for it."""
    trained = weights()
    team = Team(site, trained, 2)
    publisher = await site.publisher(trained)
    first = team.first()
    shard = team.other(1)
    await asyncio.gather(first.__aenter__(), shard.__aenter__())
    site.ends(first)
    await first.wait_version(0, timeout_s=10)
    await shard.close()
    async with team.other(1):
        with pytest.raises(WorkerDied, match="rank 1 of worker 'w0' has started again"):
            await first.wait_version(1, timeout_s=10)
        with pytest.raises(ReplicaTorn, match="has started again"), first.reading(timeout_s=1):
            pass
        await eventually(lambda: not publisher._begun().membership.members, timeout_s=2.0)


async def test_another_life_of_the_first_rank_is_followed(site: Site) -> None:
    """The first rank ends, in order or not, and is started again; the second one goes on with it,
    and the run with both."""
    trained = weights()
    team = Team(site, trained, 2)
    publisher = await site.publisher(trained)
    async with team.other(1) as shard:
        for life, version in enumerate((1, 2)):
            async with team.first() as first:
                await publisher.wait_members(1, timeout_s=10)
                await first.wait_version(version - 1, timeout_s=20)
                await train(publisher, trained, range(version, version + 1))
                await eventually(lambda first=first: first.verified == first.version)
                assert team.same(trained)
                assert shard.version == version
                if life == 0:  # as if it had been killed: nothing is said
                    assert first._group is not None
                    first._group._leading._put = lambda message: None  # type: ignore[method-assign]
            await eventually(lambda: not publisher._begun().membership.members, timeout_s=10)


@pytest.mark.parametrize("ranks", [0, 2])
def test_several_ranks_need_layouts(site: Site, ranks: int) -> None:
    """No rank at all, or two without a layout: refused with what to give."""
    with pytest.raises(SettingsError, match=f"worker 'w0' of {ranks} ranks: give the layout"):
        Replica(weights(), run=site.run, bus=site.url, name="w0", ranks=ranks)


def test_the_first_rank_is_no_shard(site: Site) -> None:
    """Rank 0 is a Replica."""
    layout = split(weights(), 1)[0]
    with pytest.raises(SettingsError, match="its first rank, 0, is a Replica"):
        Shard(weights(), run=site.run, bus=site.url, name="w0", rank=0, layout=layout)


def test_the_manifest_of_a_rank_is_of_its_own_tensors() -> None:
    """What the tests' ranks hold has the names and shapes of their layouts."""
    for layout in split(weights(), 3):
        assert manifest_of(held(layout, weights())).tensors == layout.tensors


async def rank_of_a_worker(context: Context, run: str, until: int) -> tuple[int | None, bool]:
    """A process of a rank: follow until version `until` is verified; which version it holds then,
    and whether that is its part of the checkpoint."""
    layouts = split(weights(), context.size)
    layout, mine = layouts[context.rank], held(layouts[context.rank], weights(7))
    given: dict[str, Any] = {
        "run": run, "bus": context.broker_url, "name": "w0", "policy": QUICK, "layout": layout
    }  # fmt: skip
    if context.rank == 0:
        async with Replica(mine, ranks=context.size, **given) as replica:
            context.mark("following")
            await eventually(lambda: replica.verified == until, timeout_s=60.0)
            return replica.version, _proven(layout, mine, until)
    async with Shard(mine, rank=context.rank, **given) as shard:
        context.mark("following")
        version = await shard.wait_version(until, timeout_s=60.0)
        await eventually(lambda: "waiting for the first rank" in shard.status, timeout_s=60.0)
        return version, _proven(layout, mine, until)


def _proven(layout: Layout, mine: Tensors, version: int) -> bool:
    return same([layout], [mine], checkpoint(version))


async def test_ranks_in_processes_of_their_own(site: Site) -> None:
    """Two ranks in two processes take ten updates from a trainer in a third one."""
    trained = weights()
    publisher = await site.publisher(trained)
    with Processes(
        2, rank_of_a_worker, site.run, 10, timeout_s=90, broker_url=site.url
    ) as processes:
        await publisher.wait_members(1, timeout_s=30)
        await train(publisher, trained, range(1, 11))
        ends = await asyncio.to_thread(processes.results)
    assert ends == [(10, True), (10, True)]
    assert same_bits(trained, checkpoint(10))


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
async def test_a_rank_fails_in_mid_run(site: Site, fault: signal.Signals) -> None:
    """The second of two ranks is killed or stopped while updates go on: each publish() takes no
    time, and the other worker has every one of them."""
    trained, plain = weights(), weights()
    publisher = await site.publisher(trained)
    other = await site.replica(plain, "w1")
    with Processes(
        2, rank_of_a_worker, site.run, 1000, timeout_s=90, broker_url=site.url
    ) as processes:
        await publisher.wait_members(2, timeout_s=30)
        await train(publisher, trained, range(1, 4))
        processes.kill(1) if fault is signal.SIGKILL else processes.stop(1)
        loop, longest = asyncio.get_running_loop(), 0.0
        for version in range(4, 12):
            step(trained, version)
            began = loop.time()
            await publisher.publish()
            longest = max(longest, loop.time() - began)
            # Only the round that meets the fault waits for anything: a broadcast, and its window.
            bound_s = QUICK.send_s + QUICK.open_s + QUICK.silence_s if version == 4 else 5.0
            await eventually(lambda version=version: other.verified == version, timeout_s=bound_s)
        assert longest < 1.0
    assert same_bits(trained, plain)
