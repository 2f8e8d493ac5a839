"""From publish() to proven weights: rounds, the log, and who may be in a run."""

import asyncio

import pytest
import torch

from runs import QUICK, Ear, Site, eventually, same_bits, step, weights
from sparsecast import (
    AsyncPublisher,
    BusUnavailable,
    Closed,
    Fenced,
    InvalidName,
    NameInUse,
    PublisherBusy,
    Replica,
    ReplicaLagging,
    ReplicaRefused,
    RunBusy,
    UnsupportedTensor,
    WaitTimeout,
)
from sparsecast.messages.metrics import Event, TrainerMetrics, WorkerMetrics


@pytest.mark.parametrize("window", ["gloo", "bus"])
@pytest.mark.parametrize("share", [0.01, 0.3, 1.0], ids=["sparse", "bitmap", "dense"])
async def test_every_worker_gets_every_bit(site: Site, ear: Ear, window: str, share: float) -> None:
    """Two workers follow five updates through either window, whatever the encoding."""
    trained, first, second = weights(), weights(), weights()
    policy = _policy(window=window)
    publisher = await site.publisher(trained, policy=policy)
    await site.replica(first, "w0")
    await site.replica(second, "w1")
    assert await publisher.wait_members(2, timeout_s=10) == ["w0", "w1"]
    await eventually(lambda: publisher.window == window)
    for version in range(1, 6):
        step(trained, version, share)
        update = await publisher.publish(step=version)
        assert (update.base_version, update.version) == (version - 1, version)
        report = await update.wait_applied(timeout_s=10)
        assert sorted(report.applied) == ["w0", "w1"], report
        assert report.complete
        assert same_bits(trained, first)
        assert same_bits(trained, second)
    for worker in ("w0", "w1"):
        metrics = await ear.until(WorkerMetrics, worker=worker, version=5)
        assert metrics.verified
        assert metrics.transport == window
        assert metrics.step == 5
    settled = await ear.until(TrainerMetrics, version=5)
    assert (settled.members, settled.applied, settled.verified) == (2, 2, 2)
    assert settled.nbytes == update.nbytes
    assert 0 < settled.total_us < 10_000_000


async def test_nothing_changed_is_a_version_too(site: Site) -> None:
    """The first publish makes version 1 also when no bit changed."""
    publisher = await site.publisher(weights())
    replica = await site.replica(weights())
    await publisher.wait_members(1, timeout_s=10)
    update = await publisher.publish()
    assert (update.version, update.changed, update.density) == (1, 0, 0.0)
    assert (await update.wait_applied(timeout_s=10)).complete
    assert replica.version == 1


async def test_fp32_masters_are_published_as_bf16(site: Site) -> None:
    """The trainer's floating tensors are cast, integers are not, and bytes are those of bf16."""
    masters = {"w": torch.randn(1000), "n": torch.arange(10)}
    mine = {"w": masters["w"].to(torch.bfloat16), "n": torch.arange(10)}
    publisher = await site.publisher(masters, dtype=torch.bfloat16)
    await site.replica(mine)
    await publisher.wait_members(1, timeout_s=10)
    masters["w"] *= 1.01
    update = await publisher.publish()
    assert update.dense_nbytes == 1000 * 2 + 10 * 8
    assert (await update.wait_applied(timeout_s=10)).complete
    assert torch.equal(mine["w"], masters["w"].to(torch.bfloat16))


async def test_a_late_joiner_takes_the_log(site: Site, ear: Ear) -> None:
    """Six versions went by before it started: it replays them, and enters the next round."""
    trained, late = weights(), weights()
    publisher = await site.publisher(trained)
    for version in range(1, 7):
        step(trained, version)
        await publisher.publish()
    replica = await site.replica(late, "late")
    assert await replica.wait_version(6, timeout_s=10) == 6
    assert same_bits(trained, late)
    assert (await ear.until(WorkerMetrics, worker="late")).source == "log"
    await publisher.wait_members(1, timeout_s=10)
    await eventually(lambda: publisher.window == "gloo")
    step(trained, 7)
    update = await publisher.publish()
    assert (await update.wait_applied(timeout_s=10)).complete
    assert same_bits(trained, late)
    assert (await ear.until(WorkerMetrics, worker="late", version=7)).source == "window"


async def test_a_worker_may_come_before_its_trainer(site: Site) -> None:
    """It says that nobody is there, and follows as soon as somebody is."""
    trained, mine = weights(), weights()
    replica = await site.replica(mine)
    assert replica.status.startswith(f"no trainer on run {site.run} yet")
    with pytest.raises(WaitTimeout, match="no trainer on run"):
        await replica.wait_version(0, timeout_s=0.2)
    await site.publisher(trained)
    assert await replica.wait_version(0, timeout_s=10) == 0


async def test_other_weights_are_replaced_by_an_anchor(site: Site, ear: Ear) -> None:
    """The same model with other contents is not version 0: its digest says so."""
    trained, other = weights(), weights(seed=9)
    await site.publisher(trained)
    replica = await site.replica(other)
    assert await replica.wait_version(0, timeout_s=10) == 0
    assert same_bits(trained, other)
    assert (await ear.until(WorkerMetrics, version=0)).base_version == -1


async def test_a_flipped_bit_in_a_workers_memory_is_found_and_mended(site: Site, ear: Ear) -> None:
    """Something else wrote into the weights: the next digest names the worker, and it resyncs."""
    trained, mine = weights(), weights()
    publisher = await site.publisher(trained)
    replica = await site.replica(mine)
    await publisher.wait_members(1, timeout_s=10)
    mine["embed"].view(torch.int16)[7, 7] ^= 1
    step(trained, 1)
    await publisher.publish()
    event = await ear.until(Event, kind="mismatch")
    assert event.member == "w0"
    await ear.until(Event, kind="resync", member="w0")
    await eventually(lambda: replica.verified == 1)
    assert same_bits(trained, mine)
    assert replica.mismatches == 1
    step(trained, 2)
    update = await publisher.publish()
    assert (await update.wait_applied(timeout_s=10)).complete
    assert same_bits(trained, mine)


async def test_an_engine_may_replace_its_storage(site: Site) -> None:
    """Offloading moved a tensor: the patch goes where the weights are now."""
    model, trained = torch.nn.Linear(30, 30), torch.nn.Linear(30, 30)
    model.load_state_dict(trained.state_dict())
    publisher = await site.publisher(trained)
    await site.replica(model)
    await publisher.wait_members(1, timeout_s=10)
    for _ in range(3):
        model.weight.data = model.weight.data.clone()
        with torch.no_grad():
            trained.weight[3] += 1
        assert (await (await publisher.publish()).wait_applied(timeout_s=10)).complete
        assert torch.equal(model.weight, trained.weight)


async def test_publishing_faster_than_rounds_merges(site: Site, ear: Ear) -> None:
    """Thirty publishes at once: fewer rounds, every version reached, the last one exact."""
    trained, mine = weights(), weights()
    publisher = await site.publisher(trained)
    await site.replica(mine)
    await publisher.wait_members(1, timeout_s=10)
    updates = []
    for version in range(1, 31):
        step(trained, version)
        updates.append(await publisher.publish())
    for update in updates:
        assert (await update.wait_applied(timeout_s=10)).complete
    assert same_bits(trained, mine)
    await ear.until(TrainerMetrics, version=30)
    rounds = [m for m in ear.heard if isinstance(m, TrainerMetrics)]
    assert len(rounds) < 30
    assert sum(m.version - m.base_version for m in rounds) >= 30


async def test_on_busy_error(site: Site) -> None:
    """Whoever wants no merging is told that a patch is still waiting."""
    trained = weights()
    publisher = await site.publisher(trained, on_busy="error")

    async def hurry() -> None:
        for seed in range(50):
            step(trained, seed)
            await publisher.publish()

    with pytest.raises(PublisherBusy, match="publish less often"):
        await hurry()


async def test_wait_applied_returns_at_its_timeout(site: Site) -> None:
    """A reader holds the weights: the report names the worker and says why."""
    trained, mine = weights(), weights()
    publisher = await site.publisher(trained)
    replica = await site.replica(mine)
    await publisher.wait_members(1, timeout_s=10)
    release = asyncio.Event()
    reader = asyncio.create_task(asyncio.to_thread(_read_until, replica, release))
    await eventually(lambda: replica.engine.guard().readers == 1)
    step(trained, 1)
    update = await publisher.publish()
    report = await update.wait_applied(timeout_s=1.5)
    assert not report.applied
    assert "w0" in report.missing
    assert replica.version == 0
    release.set()
    await reader
    assert (await update.wait_applied(timeout_s=10)).complete
    assert same_bits(trained, mine)


def _read_until(replica: Replica, release: asyncio.Event) -> None:
    with replica.reading():
        while not release.is_set():
            torch.ones(1).add_(1)


# ---- who may be in


async def test_a_second_trainer_is_refused(site: Site) -> None:
    """The run is held: the newcomer learns by whom, and gets it once the holder has left."""
    async with AsyncPublisher(weights(), run=site.run, bus=site.url, policy=QUICK):
        with pytest.raises(RunBusy, match="held by trainer"):
            await site.publisher(weights())
    successor = await site.publisher(weights())
    assert successor.version == 1


async def test_an_ousted_trainer_is_fenced(site: Site, broker: object) -> None:
    """Another trainer claimed the run in the journal: the old one's publishes fail from then on."""
    trained = weights()
    old = await site.publisher(trained)
    # The lease gone as if the old trainer had been stopped for longer than it lasts.
    await old._tenure._lease.release(timeout_s=2.0)
    new = await site.publisher(weights())

    async def go_on() -> None:
        for seed in range(200):
            step(trained, seed)
            await old.publish()
            await asyncio.sleep(0.05)

    with pytest.raises(Fenced, match="fenced off"):
        await go_on()
    replica = await site.replica(weights())
    update = await new.publish()
    assert await replica.wait_version(update.version, timeout_s=10) == update.version


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda t: t.pop("layer.bias"), "'layer.bias' is only on the other side"),
        (lambda t: t.update(extra=torch.zeros(2)), "'extra' is missing on the other side"),
        (lambda t: t.update(embed=torch.zeros(300, 40, dtype=torch.bfloat16)), r"\[300, 40\] here"),
        (lambda t: t.update(embed=torch.zeros(300, 41, dtype=torch.float16)), "float16 here"),
    ],
    ids=["missing", "extra", "shape", "dtype"],
)
async def test_another_model_is_refused(site: Site, ear: Ear, change: object, names: str) -> None:
    """Before any byte moves, naming the first difference, and the run goes on without it."""
    publisher = await site.publisher(weights())
    other = weights()
    change(other)  # type: ignore[operator]
    replica = await site.replica(other)
    with pytest.raises(ReplicaRefused, match=names):
        await replica.wait_version(0, timeout_s=10)
    assert (await ear.until(Event, kind="refused")).member == "w0"
    assert (await publisher.publish()).version == 1


async def test_a_name_in_use_is_refused(site: Site) -> None:
    """A live worker keeps its name; the newcomer is told, and the first one goes on."""
    publisher = await site.publisher(weights())
    first = await site.replica(weights(), "twin")
    await publisher.wait_members(1, timeout_s=10)
    second = await site.replica(weights(), "twin")
    assert isinstance(await asyncio.wait_for(second.failed(), 10), NameInUse)
    update = await publisher.publish()
    assert (await update.wait_applied(timeout_s=10)).complete
    assert first.version == 1


async def test_a_dead_workers_name_passes_on(site: Site) -> None:
    """The holder vanished without a word: its successor has the name after one probe."""
    trained = weights()
    publisher = await site.publisher(trained)
    first = await site.replica(weights(), "phoenix")
    await publisher.wait_members(1, timeout_s=10)
    await first._driver.stop()  # as if its process were dead: no heartbeat, no answer
    reborn = weights()
    second = await site.replica(reborn, "phoenix")
    step(trained, 1)
    update = await publisher.publish()
    assert await second.wait_version(1, timeout_s=10) == 1
    assert (await update.wait_applied(timeout_s=10)).complete
    assert same_bits(trained, reborn)


async def test_a_worker_that_lags_refuses(site: Site) -> None:
    """max_lag and offline_s: the worker says why it will not generate."""
    publisher = await site.publisher(weights())
    replica = await site.replica(weights(), max_lag=2, offline_s=1.0)
    await replica.wait_version(0, timeout_s=10)
    assert replica.refusal() is None
    await publisher.close()
    await eventually(lambda: "unheard" in (replica.refusal() or ""))
    with pytest.raises(ReplicaLagging, match="offline_s is 1"):
        replica.require_current()


# ---- bad input


async def test_no_bus_fails_soon_and_says_where() -> None:
    """Nothing listens there: both sides say so, within five seconds, with the URL."""
    url = "nats://127.0.0.1:9"
    for side in (
        AsyncPublisher(weights(), run="r", bus=url),
        Replica(weights(), run="r", bus=url, name="w"),
    ):
        async with asyncio.timeout(6):
            with pytest.raises(BusUnavailable, match=r"127\.0\.0\.1:9"):
                await side.__aenter__()


async def test_tensors_that_cannot_be_published_are_named(site: Site) -> None:
    """A meta tensor, or two that share part of their storage, are refused before the run starts."""
    base = torch.zeros(10)
    with pytest.raises(UnsupportedTensor, match="'m'"):
        await site.publisher({"m": torch.zeros(3, device="meta")})
    with pytest.raises(UnsupportedTensor, match=r"'a'|'b'"):
        await site.publisher({"a": base[:6], "b": base[4:]})


async def test_a_publish_that_fails_loses_nothing(site: Site) -> None:
    """A tensor went to meta in mid-run: that publish raises, the next one brings everything."""
    trained, mine = weights(), weights()
    publisher = await site.publisher(trained)
    await site.replica(mine)
    await publisher.wait_members(1, timeout_s=10)
    step(trained, 1)
    whole = trained["embed"]
    trained["embed"] = whole.to("meta")
    with pytest.raises(UnsupportedTensor, match="embed"):
        await publisher.publish()
    trained["embed"] = whole
    update = await publisher.publish()
    assert update.version == 1
    assert (await update.wait_applied(timeout_s=10)).complete
    assert same_bits(trained, mine)


async def test_names_and_closed_objects(site: Site) -> None:
    """Names that are no token are refused at once; so is a publisher that was closed."""
    with pytest.raises(InvalidName, match="run"):
        AsyncPublisher(weights(), run="a.b")
    with pytest.raises(InvalidName, match="worker"):
        Replica(weights(), run="r", bus=site.url, name="w 1")
    publisher = await site.publisher(weights())
    await publisher.close()
    with pytest.raises(Closed):
        await publisher.publish()


async def test_garbage_on_the_control_subjects_is_ignored(site: Site, bus: object) -> None:
    """Random bytes and another's voice on the run's subjects: logged, and the run goes on."""
    trained, mine = weights(), weights()
    publisher = await site.publisher(trained)
    await site.replica(mine)
    await publisher.wait_members(1, timeout_s=10)
    for subject in ("worker.w0.control", "worker.ghost.control", "trainer.control"):
        for data in (b"", b"\xff\x00", b"\x81\xa4type\xa2Go", b"{}" * 50):
            await bus.publish(f"sparsecast.{site.run}.{subject}", data)  # type: ignore[attr-defined]
    step(trained, 1)
    assert (await (await publisher.publish()).wait_applied(timeout_s=10)).complete
    assert same_bits(trained, mine)


def _policy(**changes: object) -> object:
    from dataclasses import replace

    return replace(QUICK, **changes)  # type: ignore[arg-type]
