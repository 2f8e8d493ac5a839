"""The trainer's face: entered, left, entered again; waits that end; what it is told wrongly."""

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from runs import QUICK, Ear, Site, eventually, same_bits, step, weights
from sparsecast import (
    AsyncPublisher,
    Broker,
    BusUnavailable,
    Closed,
    LocalProtocolError,
    Publisher,
    Replica,
    RunBusy,
    SettingsError,
)
from sparsecast.messages.metrics import TrainerMetrics
from sparsecast.pipeline.bus.journal import Journal, JournalState
from sparsecast.pipeline.delta import Shadow
from sparsecast.workers import publishing


def _threads(part: str) -> list[str]:
    return [thread.name for thread in threading.enumerate() if part in thread.name]


async def test_a_refused_publisher_may_try_again(site: Site) -> None:
    """The run was held when it came first: once it is free, the same object claims it and works."""
    newcomer = AsyncPublisher(weights(), run=site.run, bus=site.url, policy=QUICK)
    async with AsyncPublisher(weights(), run=site.run, bus=site.url, policy=QUICK):
        with pytest.raises(RunBusy):
            await newcomer.__aenter__()
        with pytest.raises(Closed):
            await newcomer.publish()
    async with newcomer:
        assert (await newcomer.publish()).version == newcomer.version == 2


async def test_it_may_be_entered_again(site: Site) -> None:
    """Left and entered: a new epoch above the first, and the worker follows it."""
    trained, mine = weights(), weights()
    publisher = AsyncPublisher(trained, run=site.run, bus=site.url, policy=QUICK)
    replica = await site.replica(mine)
    for _ in range(2):
        async with publisher:
            await publisher.wait_members(1, timeout_s=10)
            step(trained, publisher.version)
            update = await publisher.publish()
            assert (await update.wait_applied(timeout_s=10)).complete
        await publisher.close()
    assert replica.version == publisher.version == 3
    assert same_bits(trained, mine)


async def test_two_lives_at_once_are_refused(site: Site) -> None:
    """Entered twice: the second is our caller's mistake, and the first goes on."""
    publisher = await site.publisher(weights())
    with pytest.raises(LocalProtocolError, match="open already"):
        await publisher.__aenter__()
    assert (await publisher.publish()).version == 1


def test_before_it_is_open_it_says_so() -> None:
    """Nothing was connected yet: every question is answered with Closed, none with a crash."""
    publisher = Publisher(weights(), run="r")
    for question in (
        lambda: publisher.version,
        lambda: publisher.bus,
        publisher.publish,
        lambda: publisher.wait_members(1),
    ):
        with pytest.raises(Closed, match="not open"):
            question()
    assert publisher.window is None
    publisher.close()


def test_an_unknown_way_to_be_busy_is_refused() -> None:
    """A misspelt on_busy would otherwise coalesce in silence."""
    with pytest.raises(SettingsError, match="'coalesce', 'wait', 'error', not 'merge'"):
        Publisher(weights(), run="r", on_busy="merge")  # type: ignore[arg-type]


def test_no_thread_outlives_a_publisher_that_found_no_bus() -> None:
    """Nobody listens there: what was started for the attempt has ended when the error comes."""
    publisher = Publisher(weights(), run="nobody", bus="nats://127.0.0.1:9", policy=QUICK)
    with pytest.raises(BusUnavailable):
        publisher.open()
    assert not _threads("sparsecast-publisher")
    assert not _threads("nobody-trainer")


async def test_no_thread_outlives_a_publisher_and_a_replica(site: Site) -> None:
    """Their torch threads end with them."""
    publisher = await site.publisher(weights())
    replica = await site.replica(weights(), "fleeting")
    assert _threads(f"{site.run}-trainer")
    assert _threads("sparsecast-fleeting")
    await replica.close()
    await publisher.close()
    assert not _threads(f"{site.run}-trainer")
    assert not _threads("sparsecast-fleeting")


def test_closing_ends_a_wait_in_another_thread(broker: Broker, run: str) -> None:
    """One thread waits for workers that never come, another closes: the waiting one hears it."""
    publisher = Publisher(weights(), run=run, bus=broker.url, policy=QUICK, linger_s=1.0)
    publisher.open()
    update = publisher.publish()
    ended: list[BaseException | None] = []

    def wait() -> None:
        try:
            update.wait_applied(timeout_s=60)
        except Closed as exc:
            ended.append(exc)

    waiter = threading.Thread(target=wait)
    waiter.start()
    time.sleep(0.1)
    publisher.close()
    waiter.join(5)
    assert len(ended) == 1


async def test_with_on_busy_wait_every_version_has_its_round(site: Site, ear: Ear) -> None:
    """Each publish waits until the one before it was taken: none is merged with the next."""
    trained = weights()
    publisher = await site.publisher(trained, on_busy="wait")
    await site.replica(weights())
    await publisher.wait_members(1, timeout_s=10)
    for seed in range(5):
        step(trained, seed)
        await publisher.publish()
    await ear.until(TrainerMetrics, version=5)
    assert sorted(m.version for m in ear.heard if isinstance(m, TrainerMetrics)) == [1, 2, 3, 4, 5]


async def test_a_round_goes_as_soon_as_its_patch_is_there(
    site: Site, ear: Ear, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The diff takes longer than members need to commit: go waits neither for them nor for the
    journal, and both workers hold the bits all the same."""
    trained, mine, theirs = weights(), weights(), weights()
    publisher = await site.publisher(trained)
    await site.replica(mine, "w0")
    await site.replica(theirs, "w1")
    await publisher.wait_members(2, timeout_s=10)
    await eventually(lambda: publisher.window is not None)
    diff = Shadow.diff

    def slow(*args: Any, waiting: Callable[[], None], **kwargs: Any) -> Any:
        waiting()
        time.sleep(0.3)
        return diff(*args, **kwargs)

    monkeypatch.setattr(Shadow, "diff", slow)
    for version in range(1, 4):
        step(trained, version)
        update = await publisher.publish()
        assert (await update.wait_applied(timeout_s=10)).complete
        assert same_bits(trained, mine)
        assert same_bits(trained, theirs)
        told = await ear.until(TrainerMetrics, version=version)
        assert (told.ready_us, told.attempt, told.verified) == (0, 1, 2)
        assert told.announce_us > told.seal_us


async def test_the_log_does_not_wait_for_whom_it_is_for(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One worker is in the window, another takes every version from the log: what is stored waits
    for the word of the first alone."""
    monkeypatch.setattr(publishing, "ACKNOWLEDGED_S", 60.0)
    trained, mine, theirs = weights(), weights(), weights()
    publisher = await site.publisher(trained)
    await site.replica(mine, "w0")
    await site.replica(theirs, "w1", windows=())
    await publisher.wait_members(2, timeout_s=10)
    await eventually(lambda: publisher.window is not None)
    for version in (1, 2):
        step(trained, version)
        update = await publisher.publish()
        assert (await update.wait_applied(timeout_s=20)).complete
        assert same_bits(trained, mine)
        assert same_bits(trained, theirs)


def test_a_synchronous_replica_is_awaited_on_any_loop(broker: Broker, run: str) -> None:
    """start() and stop() from plain code, twice; wait_version() on a loop of the caller's."""
    trained, mine = weights(), weights()
    with Publisher(trained, run=run, bus=broker.url, policy=QUICK) as publisher:
        replica = Replica(mine, run=run, bus=broker.url, name="w0", policy=QUICK)
        for version in (1, 2):
            replica.start()
            publisher.wait_members(1, timeout_s=10)
            step(trained, version)
            publisher.publish()
            assert asyncio.run(replica.wait_version(version, timeout_s=10)) == version
            with replica.reading() as held, replica.reading() as again:
                assert held == again == version
                assert same_bits(trained, mine)
            replica.stop()
            replica.stop()
            assert replica.refusal() == "the replica is not running"


async def test_a_claim_is_tried_again_behind_a_last_announcement(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old trainer's lease is over, and it announces once more while its successor claims."""
    trained = weights()
    old = await site.publisher(trained)
    await old._tenure.release()
    look, looks = Journal.open, []

    async def look_and_be_overtaken(journal: Journal, timeout_s: float) -> JournalState:
        state = await look(journal, timeout_s)
        if not looks:
            looks.append(state)
            step(trained, 1)
            await old.publish()
            await eventually(lambda: old._core is not None and old._core.head == 1)
        return state

    monkeypatch.setattr(Journal, "open", look_and_be_overtaken)
    new = await site.publisher(weights(), resume="never")
    assert new.version == 2
    monkeypatch.undo()
    replica = await site.replica(weights(seed=4))
    assert await replica.wait_version(2, timeout_s=10) == 2


async def test_a_run_that_never_stands_still_is_busy(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else's announcement comes before every try to claim: RunBusy, and not for ever."""
    original = Journal.append

    async def overtaken(journal: Journal, message: object, **options: Any) -> int:
        options["expected_sequence"] += 7
        return await original(journal, message, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Journal, "append", overtaken)
    with pytest.raises(RunBusy, match="still announces"):
        await site.publisher(weights())
