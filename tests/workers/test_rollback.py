"""Old versions that are published again."""

import pytest

from runs import (
    QUICK,
    Ear,
    Site,
    checkpoint,
    eventually,
    hangs,
    published,
    same_bits,
    step,
    until_stored,
    weights,
)
from sparsecast import Broker, LogHole, Publisher, Replica
from sparsecast.messages.metrics import Event
from sparsecast.workers.archive import Archive


async def test_rollback(site: Site, ear: Ear) -> None:
    """Back to version 1, then back to what was undone; the trainer's own weights stay, and its next
    publish() brings them again."""
    trained, mine = weights(), weights()
    publisher = await site.publisher(trained)
    replica = await site.replica(mine)
    await publisher.wait_members(1, timeout_s=10)
    for version in range(1, 4):
        step(trained, version)
        await publisher.publish()
        await until_stored(publisher, version)
    back = await publisher.rollback(1, step=7, tags={"why": "reward fell"})
    assert (back.base_version, back.version) == (3, 4)
    assert 0 < back.nbytes < back.dense_nbytes
    assert (await back.wait_applied(timeout_s=10)).complete
    assert same_bits(checkpoint(1), mine)
    assert same_bits(checkpoint(3), trained)
    assert replica.origin(4) == (7, {"why": "reward fell"})
    told = await ear.until(Event, kind="rollback")
    assert told.reason == "version 4 has the contents of version 1"
    await until_stored(publisher, 4)
    undone = await publisher.rollback(3)
    assert (await undone.wait_applied(timeout_s=10)).complete
    assert same_bits(checkpoint(3), mine)
    await until_stored(publisher, 5)
    again = await publisher.rollback(4)
    assert (await again.wait_applied(timeout_s=10)).complete
    assert same_bits(checkpoint(1), mine)
    update = await publisher.publish()
    assert update.version == 7
    assert (await update.wait_applied(timeout_s=10)).complete
    assert same_bits(trained, mine)
    await eventually(lambda: replica.verified == 7)
    assert replica.mismatches == 0


async def test_what_the_log_does_not_have(site: Site) -> None:
    """A version that nobody made, and one that was merged into the next: nothing is published."""
    publisher = await site.publisher(weights())
    await publisher.publish()
    await until_stored(publisher, 1)
    for version in (7, -1):
        with pytest.raises(LogHole, match=f"to version {version} of run"):
            await publisher.rollback(version)
    assert publisher.version == 1
    assert (await publisher.rollback(1)).changed == 0


async def test_back_to_an_earlier_epoch(site: Site) -> None:
    """The trainer has restarted, and its own anchor has not replaced the old entries yet."""
    await published(site, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Archive, "anchor", hangs)
        publisher = await site.publisher(checkpoint(2), resume="must")
        mine = checkpoint(2)
        await site.replica(mine)
        await publisher.wait_members(1, timeout_s=10)
        for version in (1, 3):
            back = await publisher.rollback(version)
            assert (await back.wait_applied(timeout_s=10)).complete
            assert same_bits(checkpoint(1 if version == 1 else 2), mine)


def test_rollback_from_synchronous_code(broker: Broker, run: str) -> None:
    """Publisher has it as well, and gives an Update."""
    trained, mine = weights(), weights()
    with Publisher(trained, run=run, bus=broker.url, policy=QUICK, on_busy="wait") as publisher:
        replica = Replica(mine, run=run, bus=broker.url, name="w0", policy=QUICK)
        replica.start()
        publisher.wait_members(1, timeout_s=10)
        for version in (1, 2):
            step(trained, version)
            publisher.publish().wait_applied(timeout_s=10)
        publisher._call(until_stored(publisher._inner, 2))
        back = publisher.rollback(1)
        assert back.wait_applied(timeout_s=10).complete
        assert back.version == publisher.version == 3
        assert same_bits(checkpoint(1), mine)
        replica.stop()
