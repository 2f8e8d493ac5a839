"""Old versions that a trainer of several ranks publishes again."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest

from ranks import fully_sharded, split
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
    AsyncPublisher,
    Closed,
    Layout,
    LocalProtocolError,
    LogError,
    LogHole,
    Replica,
    SparsecastError,
    WaitTimeout,
)
from sparsecast.messages.metrics import Event
from trainers import Trainers


async def _trained(
    site: Site,
    versions: int,
    ranks: int = 2,
    way: Callable[[Tensors, int], list[Layout]] = split,
    **options: Any,
) -> tuple[Trainers, Tensors, Replica]:
    """Ranks that have published some versions, all stored, and a worker that holds them."""
    whole, mine = weights(), weights()
    trainers = Trainers(site, whole, way(whole, ranks))
    publisher = await trainers.start(**options)
    replica = await site.replica(mine)
    await publisher.wait_members(1, timeout_s=10)
    for version in range(1, versions + 1):
        step(whole, version)
        await trainers.publish()
        await until_stored(publisher, version)
    return trainers, mine, replica


@pytest.mark.parametrize(("ranks", "way"), [(2, split), (3, fully_sharded)], ids=["two", "three"])
async def test_every_rank_goes_back(
    site: Site, ear: Ear, ranks: int, way: Callable[[Tensors, int], list[Layout]]
) -> None:
    """Back to version 1, to what that has undone, and to the first again: each rank publishes what
    it held. The trainer's own weights stay, and the next publish() brings them."""
    trainers, mine, replica = await _trained(site, 3, ranks, way)
    for old, version in ((1, 4), (3, 5), (4, 6)):
        update = await trainers.rollback(old)
        assert update.version == version
        assert (await update.wait_applied(timeout_s=10)).complete
        assert same_bits(checkpoint(3 if old == 3 else 1), mine)
        await until_stored(trainers.publisher, version)
    told = await ear.until(Event, kind="rollback")
    assert told.reason == "version 4 has the contents of version 1"
    assert same_bits(checkpoint(3), trainers.whole)
    update = await trainers.publish()
    assert (await update.wait_applied(timeout_s=10)).complete
    assert same_bits(trainers.whole, mine)
    await eventually(lambda: replica.verified == update.version == 7)
    assert replica.mismatches == 0


async def test_a_rank_that_comes_late_is_waited_for(site: Site) -> None:
    """One rank calls rollback() half a second behind the first one, which has returned by then."""
    trainers, mine, _ = await _trained(site, 2)
    update = await asyncio.wait_for(trainers.publisher.rollback(1), 5)
    await asyncio.sleep(0.5)
    assert same_bits(checkpoint(2), mine)
    await trainers.others[0].rollback(1)
    assert (await update.wait_applied(timeout_s=10)).complete
    assert same_bits(checkpoint(1), mine)


async def test_what_the_log_does_not_have(site: Site) -> None:
    """A version that nobody made: every rank hears why, nothing is published, and all goes on."""
    trainers, mine, _ = await _trained(site, 1)
    found = await asyncio.gather(*(r.rollback(7) for r in trainers.ranks), return_exceptions=True)
    assert isinstance(found[0], LogHole)
    assert isinstance(found[1], LogError)
    assert "to version 7 of run" in str(found[1])
    assert {rank.version for rank in trainers.ranks} == {1}
    step(trainers.whole, 2)
    assert (await (await trainers.publish()).wait_applied(timeout_s=10)).complete
    assert same_bits(checkpoint(2), mine)


async def test_a_rank_that_does_not_find_the_first_one_there(site: Site) -> None:
    """The first rank does not roll back: who waits for it hears so at the deadline, and has
    published nothing; or it leaves meanwhile."""
    trainers, _, _ = await _trained(site, 1)
    other = trainers.others[0]
    other.policy = replace(QUICK, gather_s=0.2, resume_s=0.1)
    with pytest.raises(WaitTimeout, match="the first rank of the trainer has not made it again"):
        await other.rollback(1)
    assert (await (await trainers.publish()).wait_applied(timeout_s=10)).complete
    other.policy = QUICK
    waiting = asyncio.ensure_future(other.rollback(1))
    await trainers.publisher.close()
    with pytest.raises(Closed, match="has left"):
        await waiting


async def _publishes(rank: Any) -> None:
    await rank.publish()


async def _goes_elsewhere(rank: Any) -> None:
    with pytest.raises(
        LocalProtocolError, match=r"rollback\(2\), where the first .* rollback\(1\)"
    ):
        await rank.rollback(2)
    await rank.publish()


@pytest.mark.parametrize("instead", [_publishes, _goes_elsewhere])
async def test_a_rank_that_does_something_else(site: Site, instead: Any) -> None:
    """One rank publishes, or goes back to another version, where the first one goes back: no worker
    gets parts of two steps, and the run ends with the reason."""
    trainers, mine, _ = await _trained(site, 2)
    publisher: AsyncPublisher = trainers.publisher
    update = await publisher.rollback(1)
    await instead(trainers.others[0])
    said = r"version 3 would be of two steps: version 3 is of rollback\(1\) on the first rank alone"
    with pytest.raises(SparsecastError, match=said):
        await update.wait_applied(timeout_s=10)
    assert same_bits(checkpoint(2), mine)


async def _swaps(rank: Any) -> None:
    await rank.publish()
    await rank.rollback(1)


async def _publishes_twice(rank: Any) -> None:
    await rank.publish()
    await rank.publish()


@pytest.mark.parametrize("instead", [_swaps, _publishes_twice])
async def test_what_is_taken_together_is_of_the_same_calls(site: Site, instead: Any) -> None:
    """The first rank goes back and then publishes, the other one does so the other way round, or
    does not go back at all, before the first of these versions is taken. They have made as many
    versions, and yet the last ones are not one: no worker gets it."""
    trainers, mine, _ = await _trained(site, 2)
    first, other = trainers.ranks
    taken, real = asyncio.Event(), first._take

    async def late(unsafe: tuple[int, ...]) -> Any:
        await taken.wait()
        return await real(unsafe)

    with mock.patch.object(first, "_take", late):
        await first.rollback(1)
        update = await first.publish()
        await instead(other)
        taken.set()
        with pytest.raises(SparsecastError, match="version 4 would be of two steps: version 3 is"):
            await update.wait_applied(timeout_s=10)
    assert same_bits(checkpoint(2), mine)


@pytest.mark.parametrize("first_call", ["none", "fails", "fails meanwhile"])
async def test_a_rank_that_waited_in_vain_may_ask_again(site: Site, first_call: str) -> None:
    """A rank's rollback() was over before the first one's began, or had failed: called again it
    finds what comes then, and not how the call before has ended."""
    trainers, mine, _ = await _trained(site, 2)
    first, other = trainers.ranks
    other.policy = replace(QUICK, gather_s=0.1, resume_s=0.1)
    with pytest.raises(WaitTimeout):
        await other.rollback(1)
    other.policy = QUICK
    again = asyncio.ensure_future(other.rollback(1)) if "meanwhile" in first_call else None
    await asyncio.sleep(0.05)
    if first_call != "none":
        with pytest.raises(LogHole):
            await first.rollback(7)
    update = await first.rollback(1)
    await (again or other.rollback(1))
    assert (await update.wait_applied(timeout_s=10)).complete
    assert same_bits(checkpoint(1), mine)


async def test_who_waits_for_the_first_rank_hears_of_its_own_close(site: Site) -> None:
    """A rank is closed while its rollback() waits: that ends at once, and not at the deadline."""
    trainers, _, _ = await _trained(site, 1)
    other = trainers.others[0]
    waiting = asyncio.ensure_future(other.rollback(1))
    await asyncio.sleep(0.05)
    closing = asyncio.ensure_future(other.close())
    with pytest.raises(Closed):
        await asyncio.wait_for(waiting, 2)
    await trainers.publisher.close()
    await closing


async def test_an_old_state_that_another_rank_has_no_more(site: Site) -> None:
    """One of three ranks has lost what it was to publish again: none publishes it, not those either
    that have it, all hear why, and all goes on."""
    trainers, mine, _ = await _trained(site, 2, ranks=3)
    rolls = trainers.others[1]._rolls
    real = rolls.hear

    def forgetful(roll: Any) -> None:
        rolls.forget()
        real(roll)

    with mock.patch.object(rolls, "hear", forgetful):
        found = await asyncio.gather(
            *(rank.rollback(1) for rank in trainers.ranks), return_exceptions=True
        )
    assert all(isinstance(one, LogError) for one in found)
    assert all("that old state was not made again here" in str(one) for one in found)
    assert {rank.version for rank in trainers.ranks} == {2}
    step(trainers.whole, 3)
    assert (await (await trainers.publish()).wait_applied(timeout_s=10)).complete
    assert same_bits(checkpoint(3), mine)
    assert (await (await trainers.rollback(1)).wait_applied(timeout_s=10)).complete
    assert same_bits(checkpoint(1), mine)


async def test_a_call_that_waits_its_turn_is_broken_off(site: Site) -> None:
    """Two calls on the first rank: the second is cancelled while the first one reads the log. That
    goes on, on all ranks."""
    trainers, mine, _ = await _trained(site, 2)
    first, other = trainers.ranks
    one = asyncio.ensure_future(first.rollback(1))
    two = asyncio.ensure_future(first.rollback(2))
    theirs = asyncio.ensure_future(other.rollback(1))
    await asyncio.sleep(0)
    two.cancel()
    update = await one
    await theirs
    assert (await update.wait_applied(timeout_s=10)).complete
    assert same_bits(checkpoint(1), mine)
    with pytest.raises(LogError, match="broken off"):
        await other.rollback(2)
