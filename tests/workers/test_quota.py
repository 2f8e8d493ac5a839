"""Runs that share a broker, each with a quota for its log."""

import asyncio
from dataclasses import replace

import pytest

from runs import QUICK, Ear, Site, eventually, same_bits, step, until_stored, weights
from sparsecast import SettingsError
from sparsecast.messages.metrics import Event
from sparsecast.messages.subjects import Subjects
from sparsecast.pipeline.bus.broker import Broker
from sparsecast.pipeline.bus.nats import NatsBus

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


async def test_a_quota_that_no_log_fits_is_refused(site: Site) -> None:
    """Less than two copies of the weights: entering says how much it takes."""
    with pytest.raises(SettingsError, match="the log of a model of"):
        await site.publisher(weights(), policy=replace(POLICY, quota_nbytes=50_000))
