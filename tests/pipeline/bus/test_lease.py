"""The lease of a run: one holder, until it lets go or its time is over by the server's clock."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from servers import Proxy, until
from sparsecast.messages.control import Sender
from sparsecast.messages.errors import (
    BusUnavailable,
    Fenced,
    RemoteProtocolError,
    RunBusy,
    StreamMissing,
)
from sparsecast.messages.subjects import LEASE_STREAM, Subjects
from sparsecast.pipeline.bus.broker import Broker
from sparsecast.pipeline.bus.lease import Lease
from sparsecast.pipeline.bus.nats import NatsBus

Connect = Callable[..., Awaitable[NatsBus]]
S = 5.0


def lease(bus: NatsBus, run: str, who: str, lease_s: float = 30.0) -> Lease:
    """A trainer's lease, by its incarnation."""
    return Lease(bus, run, Sender("trainer", who), lease_s=lease_s, host="here", pid=7)


async def test_a_second_trainer_is_refused_by_name(bus: NatsBus, run: str) -> None:
    """The run is held: the newcomer hears by whom and for how long. Once it is released, the
    newcomer gets it at once, and the old holder's second release harms nobody."""
    first, second = lease(bus, run, "one"), lease(bus, run, "two")
    await first.acquire(S)
    assert first.held
    with pytest.raises(RunBusy, match=r"held by trainer trainer \(pid 7 on here\)") as caught:
        await second.acquire(S)
    assert (caught.value.run, caught.value.lease_s) == (run, 30.0)
    assert not second.held
    await first.release(S)
    await second.acquire(S)
    await first.release(S)
    await second.renew(S)
    with pytest.raises(RunBusy):
        await first.acquire(S)


async def test_only_one_of_many_gets_it(broker: Broker, connected: Connect, run: str) -> None:
    """Ten trainers start at once: one gets the run, nine are told so."""
    buses = [await connected(broker.url) for _ in range(10)]
    results = await asyncio.gather(
        *(lease(bus, run, str(number)).acquire(S) for number, bus in enumerate(buses)),
        return_exceptions=True,
    )
    assert sum(isinstance(result, int) for result in results) == 1
    assert sum(isinstance(result, RunBusy) for result in results) == 9


async def test_runs_do_not_disturb_each_other(bus: NatsBus, run: str) -> None:
    """Leases of two runs lie in one stream: each is renewed though the other moves."""
    one, other = lease(bus, run, "one"), lease(bus, f"{run}-b", "two")
    await one.acquire(S)
    await other.acquire(S)
    for _ in range(5):
        await one.renew(S)
        await other.renew(S)
    await one.release(S)
    await other.renew(S)


async def test_a_holder_that_died_is_succeeded_after_its_time(bus: NatsBus, run: str) -> None:
    """The holder is gone without a word: for its time the run stays busy, then it is free, and
    the old holder, back from the dead, is fenced off by name."""
    dead, heir = lease(bus, run, "dead", 1.0), lease(bus, run, "heir")
    began = time.monotonic()
    await dead.acquire(S)
    dead.epoch = 4
    while True:
        try:
            await heir.acquire(S)
            break
        except RunBusy:
            await asyncio.sleep(0.02)
    assert 0.9 < time.monotonic() - began < 3.0
    with pytest.raises(Fenced, match=r"epoch 4.*held by trainer \(pid 7 on here\)"):
        await dead.renew(S)
    assert not dead.held
    await heir.renew(S)


async def test_renewing_keeps_it_beyond_its_time(bus: NatsBus, run: str) -> None:
    """A lease of one second, renewed every half: after two seconds it is still held."""
    holder, other = lease(bus, run, "one", 0.2), lease(bus, run, "two")
    await holder.acquire(S)
    for _ in range(4):
        await asyncio.sleep(0.5)
        await holder.renew(S)
        with pytest.raises(RunBusy):
            await other.acquire(S)
    assert holder.lapses == 0


async def test_a_lapse_that_nobody_used_is_mended(bus: NatsBus, run: str) -> None:
    """The holder was stopped for longer than its lease and nobody came: it goes on, and knows."""
    holder = lease(bus, run, "one", 1.0)
    await holder.acquire(S)
    await asyncio.sleep(1.4)
    assert await bus.last(LEASE_STREAM, Subjects(run).lease, timeout_s=S) is None
    await holder.renew(S)
    assert holder.lapses == 1
    with pytest.raises(RunBusy):
        await lease(bus, run, "two").acquire(S)


async def test_a_lapse_is_not_called_mended_before_it_is(
    bus: NatsBus, run: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The lease ran out and the server has no room for another: nobody is told that it was taken
    again, until it is."""
    holder = lease(bus, run, "one", 1.0)
    await holder.acquire(S)
    await asyncio.sleep(1.4)
    append = bus.append

    async def full(*args: object, expected_subject_sequence: int, **options: object) -> int:
        if expected_subject_sequence == 0:
            raise BusUnavailable(bus.url, "insufficient resources")
        return await append(*args, expected_subject_sequence=expected_subject_sequence, **options)

    with monkeypatch.context() as patched:
        patched.setattr(bus, "append", full)
        for _ in range(2):
            with pytest.raises(BusUnavailable):
                await holder.renew(S)
    assert (holder.lapses, caplog.text) == (0, "")
    await holder.renew(S)
    assert holder.lapses == 1
    assert "had run out; taken again" in caplog.text


async def test_acquiring_what_is_held_already_renews_it(bus: NatsBus, run: str) -> None:
    """The same life of the same trainer acquires twice (its first answer was lost): success."""
    holder = lease(bus, run, "one")
    first = await holder.acquire(S)
    assert await lease(bus, run, "one").acquire(S) > first
    await holder.renew(S)


async def test_a_renewal_whose_answer_is_lost_does_not_fence(
    broker: Broker, bus: NatsBus, connected: Connect, run: str
) -> None:
    """A renewal times out here and is stored there: the next one finds its own and goes on."""
    async with Proxy(broker.url) as proxy:
        here = await connected(proxy.url)
        holder = lease(here, run, "one")
        sequence = await holder.acquire(S)
        proxy.stall()
        with pytest.raises(BusUnavailable):
            await holder.renew(0.3)
        proxy.flow()
        assert await holder.renew(S) == sequence + 2


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "lost"])
async def test_a_broker_that_restarts(tmp_path: Path, connected: Connect, kept: bool) -> None:
    """The broker restarts. With its store, the lease is still ours and its time still runs out;
    without it, the holder hears StreamMissing and acquires again."""
    first = Broker(store_dir=tmp_path / "one")
    bus = await connected(first.start())
    holder, other = lease(bus, "run", "one"), lease(bus, "run", "two")
    short = lease(bus, "short", "one", 1.0)
    await holder.acquire(S)
    await short.acquire(S)
    first.close()
    await until(lambda: not bus.connected)
    store = tmp_path / ("one" if kept else "two")
    second = Broker(port=int(bus.url.rpartition(":")[2]), store_dir=store)
    await asyncio.to_thread(second.start)
    try:
        if kept:
            with pytest.raises(RunBusy):
                await other.acquire(S)
            await holder.renew(S)
            await asyncio.sleep(1.3)
            await lease(bus, "short", "two").acquire(S)
            with pytest.raises(Fenced):
                await short.renew(S)
        else:
            with pytest.raises(StreamMissing):
                await holder.renew(S)
            await holder.acquire(S)
            with pytest.raises(RunBusy):
                await other.acquire(S)
    finally:
        await bus.close()
        second.close()


async def test_garbage_in_the_place_of_a_lease_is_named(bus: NatsBus, run: str) -> None:
    """Somebody wrote nonsense there: the error names the subject."""
    subject = Subjects(run).lease
    await lease(bus, f"{run}-x", "one").acquire(S)
    await bus.append(LEASE_STREAM, subject, b"nonsense", timeout_s=S)
    with pytest.raises(RemoteProtocolError, match=subject):
        await lease(bus, run, "one").acquire(S)
