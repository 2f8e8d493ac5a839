"""Ranks of a trainer that publish at different moments, or one of them not at all."""

import asyncio
import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

from ranks import split
from runs import QUICK, Site, Tensors, eventually, same_bits, step, weights
from sparsecast import (
    AsyncPublisher,
    Closed,
    MemoryLog,
    SparsecastError,
    UnsupportedTensor,
)
from sparsecast.workers.outgoing import PENDING
from trainers import Trainers


class Steps(Trainers):
    """Ranks that publish one by one."""

    async def rank(self, rank: int) -> Any:
        """Publish on this rank what it holds."""
        return await (self.publisher, *self.others)[rank].publish()


async def _started(site: Site, ranks: int = 2, **options: Any) -> tuple[Steps, Tensors, Any]:
    """Ranks, the whole model, and what a worker in an open window holds of it."""
    whole, mine = weights(), weights()
    trainers = Steps(site, whole, split(whole, ranks))
    publisher = await trainers.start(**options)
    replica = await site.replica(mine)
    await publisher.wait_members(1, timeout_s=10)
    await eventually(lambda: publisher.window == "gloo")
    return trainers, mine, replica


@pytest.mark.parametrize("late", [0, 1, 2])
async def test_a_rank_that_publishes_late_is_waited_for(site: Site, late: int) -> None:
    """One of three ranks publishes half a second behind the others, each time: no publish() waits
    for it, and every version is whole."""
    trainers, mine, replica = await _started(site, 3)
    loop = asyncio.get_running_loop()
    for version in range(1, 4):
        step(trainers.whole, version)
        trainers.share()
        for rank in {0, 1, 2} - {late}:
            began = loop.time()
            await trainers.rank(rank)
            assert loop.time() - began < 0.4
        await asyncio.sleep(0.5)
        assert replica.version == version - 1
        await trainers.rank(late)
        await replica.wait_version(version, timeout_s=10)
        assert same_bits(trainers.whole, mine)
        await eventually(lambda version=version: replica.verified == version)
    assert replica.mismatches == 0


@pytest.mark.parametrize("ahead", [0, 1])
async def test_a_rank_may_be_some_versions_ahead(site: Site, ahead: int) -> None:
    """One rank publishes seven versions before the other one has its first: those follow as they
    are complete, merged or not, and each that the worker holds is one of them."""
    trainers, mine, replica = await _started(site)
    states = [{name: tensor.clone() for name, tensor in trainers.whole.items()}]
    for version in range(1, 8):
        step(trainers.whole, version)
        states.append({name: tensor.clone() for name, tensor in trainers.whole.items()})
        trainers.share()
        await trainers.rank(ahead)
    for version in range(1, 8):
        trainers.whole.update(states[version])
        trainers.share()
        await trainers.rank(1 - ahead)
        await asyncio.sleep(0.05)
    await replica.wait_version(7, timeout_s=10)
    await eventually(lambda: replica.verified == 7)
    assert same_bits(states[7], mine)
    assert replica.mismatches == 0


@contextlib.contextmanager
def _without_orders(publisher: AsyncPublisher) -> Iterator[None]:
    """Meanwhile the other ranks hear heartbeats, and no order."""
    leading: Any = publisher._outgoing._leading  # type: ignore[attr-defined]
    real = leading._put

    def put(message: Any) -> None:
        if not hasattr(message, "deed"):
            real(message)

    with mock.patch.object(leading, "_put", put):
        yield


@pytest.mark.parametrize("updates", [3, PENDING + 2, 4 * PENDING])
async def test_orders_that_come_late_find_merged_patches(site: Site, updates: int) -> None:
    """The other ranks are told of the first version's round long after they have published many
    more, and have merged what is pending: all ranks take along what one of them has merged, and
    the worker comes to the newest version."""
    trainers, mine, replica = await _started(site, 3)
    with _without_orders(trainers.publisher):
        for version in range(1, updates + 1):
            step(trainers.whole, version)
            await trainers.publish()
            await asyncio.sleep(0.02)
    await replica.wait_version(updates, timeout_s=20)
    await eventually(lambda: replica.verified == updates)
    assert same_bits(trainers.whole, mine)
    assert replica.mismatches == 0
    step(trainers.whole, updates + 1)
    report = await (await trainers.publish()).wait_applied(timeout_s=10)
    assert report.complete, report
    assert same_bits(trainers.whole, mine)


async def test_versions_of_a_round_in_flight_coalesce(site: Site) -> None:
    """Ranks publish sixty versions back to back while rounds go on: the worker has the last one,
    and an anchor of all ranks at one version gets into the log on the way."""
    log = MemoryLog()
    policy = replace(QUICK, anchor_every=5)
    trainers, mine, replica = await _started(site, 3, log=log, policy=policy)
    for version in range(1, 61):
        step(trainers.whole, version, share=0.01)
        await trainers.publish()
    await replica.wait_version(60, timeout_s=20)
    await eventually(lambda: replica.verified == 60)
    assert same_bits(trainers.whole, mine)

    async def anchored() -> bool:
        entries = await trainers.publisher._ports.log.entries(timeout_s=5)
        return any(entry.base_version is None and entry.version > 0 for entry in entries)

    await eventually(anchored)
    assert replica.mismatches == 0


async def test_on_busy_wait_and_an_anchor_do_not_wait_for_each_other(site: Site) -> None:
    """The first rank waits in publish() until its last patch is taken, while an anchor waits for
    it to come to where the other rank is: the anchor gives way."""
    trainers, mine, replica = await _started(
        site, on_busy="wait", policy=replace(QUICK, anchor_every=1)
    )
    loop, longest = asyncio.get_running_loop(), 0.0
    for version in range(1, 21):
        step(trainers.whole, version)
        trainers.share()
        await trainers.rank(1)
        began = loop.time()
        await trainers.rank(0)
        longest = max(longest, loop.time() - began)
    assert longest < 2.0
    await replica.wait_version(20, timeout_s=20)
    assert same_bits(trainers.whole, mine)


def _spoil(tensors: Tensors) -> torch.Tensor:
    """Give a rank a tensor of another dtype; what it was."""
    name = next(name for name in tensors if tensors[name].dtype == torch.bfloat16)
    before = tensors[name]
    tensors[name] = before.double()
    return before


def _mend(tensors: Tensors, before: torch.Tensor) -> None:
    name = next(name for name in tensors if tensors[name].dtype == torch.float64)
    tensors[name] = before


@pytest.mark.parametrize("spoiled", [0, 1])
@pytest.mark.parametrize("again", [True, False], ids=["tries-again", "gives-up"])
async def test_a_call_that_fails_on_one_rank_ends_the_run(
    site: Site, spoiled: int, again: bool
) -> None:
    """publish() raises on one rank and not on the other, which is a version ahead then. Whether
    that rank tries again, or not, no worker gets one rank's old step with another's new one: the
    publisher says what has failed, soon, and the worker goes on serving what it has."""
    trainers, mine, replica = await _started(site)
    step(trainers.whole, 1)
    await (await trainers.publish()).wait_applied(timeout_s=10)
    served = {name: tensor.clone() for name, tensor in mine.items()}
    step(trainers.whole, 2)
    trainers.share()
    before = _spoil(trainers.held[spoiled])
    with pytest.raises(SparsecastError, match="dtype"):
        await trainers.rank(spoiled)
    await trainers.rank(1 - spoiled)
    _mend(trainers.held[spoiled], before)
    if again:
        step(trainers.whole, 3)
        trainers.share()
        for rank in (spoiled, 1 - spoiled):
            with contextlib.suppress(SparsecastError):  # it may be known by now
                await trainers.rank(rank)
    elif spoiled == 0:
        return  # the first rank has said so itself, and has nothing to wait for
    with pytest.raises(SparsecastError, match=r"publish.. has failed"):
        await trainers.publisher.wait_members(2, timeout_s=10)
    with pytest.raises(SparsecastError, match=r"publish.. has failed"):
        await trainers.publisher.publish()
    assert replica.version == 1
    assert same_bits(served, mine)
    await trainers.publisher.close()
    await eventually(lambda: trainers.others[0]._deserted is not None)
    with pytest.raises(Closed, match=r"publish.. has failed"):
        await trainers.others[0].publish()


async def test_calls_that_fail_on_all_ranks_cost_nothing(site: Site) -> None:
    """Every rank's publish() raises, once: all are in step, and the next version is whole."""
    trainers, mine, replica = await _started(site)
    for version in (1, 2):
        step(trainers.whole, 2 * version)
        await (await trainers.publish()).wait_applied(timeout_s=10)
        step(trainers.whole, 2 * version + 1)
        trainers.share()
        before = [_spoil(held) for held in trainers.held]
        for rank in (0, 1):
            with pytest.raises(SparsecastError, match="dtype"):
                await trainers.rank(rank)
        for held, tensor in zip(trainers.held, before, strict=True):
            _mend(held, tensor)
    report = await (await trainers.publish()).wait_applied(timeout_s=10)
    assert report.complete, report
    assert report.version == 3
    assert same_bits(trainers.whole, mine)
    assert replica.mismatches == 0


async def test_a_tensor_that_is_gone_is_named(site: Site) -> None:
    """A rank's tensor has been deleted: its publish() names it, and nothing is published."""
    trainers, _, _ = await _started(site)
    name = next(iter(trainers.layouts[1].local.tensors)).name
    del trainers.held[1][name]
    with pytest.raises(UnsupportedTensor, match=name):
        await trainers.others[0].publish()
    assert trainers.others[0].version == 0


async def test_a_rank_that_stops_publishing_is_named(site: Site) -> None:
    """The second rank lives, and does not publish any more: the first one says which rank it is,
    after store_s."""
    trainers, _, replica = await _started(site, policy=replace(QUICK, store_s=1.0))
    step(trainers.whole, 1)
    trainers.share()
    await trainers.rank(0)
    with pytest.raises(SparsecastError, match=r"rank 1: .*publish.. has made 0 on this rank"):
        await trainers.publisher.wait_members(2, timeout_s=20)
    assert replica.version == 0


async def test_a_first_rank_alone_knows_of_the_workers(site: Site) -> None:
    """The other ranks have the facts of their own part, and nothing to wait with."""
    trainers, _, _ = await _started(site)
    step(trainers.whole, 1)
    trainers.share()
    made = await trainers.rank(1)
    assert made.version == 1
    assert made.dense_nbytes < sum(t.numel() * t.element_size() for t in trainers.whole.values())
    assert not hasattr(made, "wait_applied")
