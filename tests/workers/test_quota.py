"""Runs that share a broker, each with a quota for its log."""

import asyncio
from dataclasses import replace

import pytest
import torch

from runs import (
    QUICK,
    Ear,
    Site,
    Tensors,
    eventually,
    hangs,
    same_bits,
    step,
    until_stored,
    weights,
)
from sparsecast import AsyncPublisher, Policy, SettingsError
from sparsecast.messages.metrics import Event
from sparsecast.messages.subjects import Subjects
from sparsecast.pipeline.bus.broker import Broker
from sparsecast.pipeline.bus.nats import NatsBus
from sparsecast.workers.archive import Archive

#: Room for two anchors of these weights and some patches; no anchor comes by its turn.
QUOTA = 320_000
POLICY = replace(QUICK, quota_nbytes=QUOTA, anchor_every=100_000, merge_every=1)


async def size(bus: NatsBus, run: str) -> tuple[int, int | None]:
    """What the run's log takes of the broker, and may take."""
    found = (await bus.streams(timeout_s=5.0))[Subjects(run).log_stream]
    return found.nbytes, found.max_nbytes


@pytest.mark.parametrize("share", [0.05, 1.0], ids=["sparse", "dense"])
async def test_a_long_run_stays_within_its_quota(
    site: Site, bus: NatsBus, ear: Ear, share: float
) -> None:
    """Many times as many bytes are published as the log may take: it takes an anchor whenever there
    would be no room for one, drops what is older, and always leads to the newest version."""
    trained, late, published = weights(), weights(9), 0
    publisher = await site.publisher(trained, policy=POLICY)
    await site.replica(weights(), "w0", policy=POLICY)
    await publisher.wait_members(1, timeout_s=10)
    for version in range(1, 41 if share == 1.0 else 201):
        step(trained, version, share)
        update = await publisher.publish()
        published += update.nbytes
        if version % 10 == 0:
            assert (await update.wait_applied(timeout_s=10)).complete
            held, most = await size(bus, site.run)
            assert held <= QUOTA == most
    assert published > 2 * QUOTA
    core = publisher._core
    assert core is not None
    await eventually(lambda: core.quiet)
    replica = await site.replica(late, "w1", policy=POLICY)
    await eventually(lambda: replica.verified == publisher.version)
    assert same_bits(trained, late)
    failed = [e.reason for e in ear.heard if isinstance(e, Event) and e.kind == "log-failed"]
    assert all("an anchor is taken now" in reason for reason in failed), failed


async def test_a_run_that_fills_its_quota_leaves_the_others_alone(
    site: Site, broker: Broker, bus: NatsBus
) -> None:
    """Two runs on one broker, one with a quota: the other one's log grows beyond it."""
    other = Site(broker.url, f"{site.run}-other")
    try:
        for one, policy in ((site, POLICY), (other, replace(POLICY, quota_nbytes=None))):
            trained = weights()
            publisher = await one.publisher(trained, policy=policy)
            for version in range(1, 13):
                step(trained, version, 1.0)
                await publisher.publish()
                await asyncio.sleep(0.02)
                await until_stored(publisher, version) if one is other else None
        assert (await size(bus, site.run))[0] <= QUOTA
        held, most = await size(bus, other.run)
        assert held > QUOTA
        assert most is None
    finally:
        await other.close()


async def lived(
    site: Site, policy: Policy, seeds: range, state: Tensors, *, waits: bool = False
) -> AsyncPublisher:
    """A trainer that publishes dense changes; `waits`: each is stored by itself."""
    publisher = await site.publisher(state, policy=policy)
    for seed in seeds:
        step(state, seed, 1.0)
        await publisher.publish()
        await asyncio.sleep(0.03)
        if waits:
            await until_stored(publisher, publisher.version)
    return publisher


async def until_all_is_stored(publisher: AsyncPublisher) -> None:
    """The log has the newest version."""
    core = publisher._core
    assert core is not None
    await eventually(lambda: core.stored == publisher.version, timeout_s=20)


async def test_a_smaller_quota_is_kept_too(site: Site, bus: NatsBus) -> None:
    """The run comes back with a quota that its log exceeds: what is too much goes, and the log
    leads to the newest version again; with none at all the bound is lifted."""
    state, unbounded = weights(), replace(POLICY, quota_nbytes=None)
    first = await lived(site, unbounded, range(1, 15), state, waits=True)
    await first.close()
    assert (await size(bus, site.run))[0] > QUOTA
    second = await lived(site, POLICY, range(30, 40), state)
    await until_all_is_stored(second)
    assert (await size(bus, site.run))[0] <= QUOTA
    await second.close()
    third = await lived(site, unbounded, range(40, 50), state, waits=True)
    await until_all_is_stored(third)
    assert (await size(bus, site.run))[1] is None


async def test_a_trainer_that_died_has_left_the_log_full(
    site: Site, bus: NatsBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It died with an anchor stored and the one before not pruned, and amid another one, whose
    chunks lie there without an entry: its successor makes room for its own."""
    state = {"w": torch.randn(500_000, generator=torch.Generator().manual_seed(0)).bfloat16()}
    policy = replace(POLICY, quota_nbytes=2_300_000)
    prune = Archive._prune
    monkeypatch.setattr(Archive, "_prune", hangs)
    first = await lived(site, policy, range(1, 6), state)
    await first.close()
    monkeypatch.setattr(Archive, "_prune", prune)
    held, most = await size(bus, site.run)
    assert most is not None
    subject = Subjects(site.run).log_chunks("1-anchor-77-dead")
    left = min(500_000, most - held - 2000)
    await bus.append(Subjects(site.run).log_stream, subject, bytes(left), timeout_s=5.0)
    second = await lived(site, policy, range(30, 36), state)
    await until_all_is_stored(second)
    assert subject not in await bus.subjects(Subjects(site.run).log_stream, ">", timeout_s=5.0)
    late = {"w": torch.zeros(500_000, dtype=torch.bfloat16)}
    replica = await site.replica(late, "w1", policy=policy)
    await eventually(lambda: replica.verified == second.version)
    assert same_bits(state, late)


async def test_what_is_crowded_once_takes_one_anchor(site: Site) -> None:
    """Pruning lasts, since the anchor is read back: meanwhile patches wait, and no further anchor
    is taken for them."""
    archive_prune, anchors = Archive._prune, 0

    class Slow(Archive):
        async def prune(self, epoch: int) -> bool:
            nonlocal anchors
            anchors += 1
            await asyncio.sleep(0.3)
            return await archive_prune(self, epoch)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Archive, "_prune", Slow.prune)
        state = weights()
        publisher = await site.publisher(state, policy=POLICY)
        for seed in range(1, 300):
            step(state, seed, 0.02)
            await publisher.publish()
            await asyncio.sleep(0.02)
        await until_all_is_stored(publisher)
    assert 2 <= anchors <= 5, "an anchor for nearly every time that it was pruned"


async def test_a_quota_that_no_log_fits_is_refused(site: Site) -> None:
    """Less than two copies of the weights: entering says how much it takes."""
    with pytest.raises(SettingsError, match="the log of a model of"):
        await site.publisher(weights(), policy=replace(POLICY, quota_nbytes=50_000))
