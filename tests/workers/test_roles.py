"""Workers that evaluate beside those for rollouts, and members that nobody waits for any longer."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from runs import (
    QUICK,
    Ear,
    Site,
    checkpoint,
    eventually,
    published,
    same_bits,
    step,
    until_stored,
    weights,
)
from sparsecast import AsyncPublisher, AsyncRollouts, GenerationFailed, Replica, SettingsError
from sparsecast.messages.control import LogEntry
from sparsecast.messages.metrics import Event, TrainerMetrics
from sparsecast.messages.rollouts import Generate, Sample, Span
from sparsecast.messages.subjects import Subjects
from sparsecast.pipeline.bus.nats import NatsBus
from sparsecast.pipeline.log.memory import MemoryLog
from sparsecast.workers.generation import GenerationService


def at(replica: Replica, version: int) -> bool:
    """Whether a worker holds just that version, proven."""
    return replica.version == replica.verified == version


async def test_each_evaluates_what_it_follows_and_delays_nobody(site: Site, ear: Ear) -> None:
    """Beside a worker for rollouts there are three that evaluate: one takes every version, one each
    third, one the second alone. Every update is done when the first one has it; only that one is
    ever in a window; all hold their bits."""
    trained = weights()
    publisher = await site.publisher(trained)
    states = {name: weights() for name in ("w0", "latest", "third", "second")}
    await site.replica(states["w0"], "w0")
    followed = {"latest": "latest", "third": "every:3", "second": "version:2"}
    evaluators: dict[str, Replica] = {
        name: await site.replica(states[name], name, role="evaluation", follow=follow)
        for name, follow in followed.items()
    }
    assert await publisher.wait_members(1, timeout_s=10) == ["w0"]
    core = publisher._core
    assert core is not None
    await eventually(lambda: len(core.membership.members) == 4)
    await eventually(lambda: publisher.window == "gloo")
    for version in range(1, 8):
        step(trained, version)
        update = await publisher.publish()
        report = await update.wait_applied(timeout_s=10)
        assert (sorted(report.applied), report.missing) == (["w0"], {})
        expected = {"latest": version, "third": version // 3 * 3, "second": version // 2 and 2}
        for name, wanted in expected.items():
            await eventually(lambda name=name, wanted=wanted: at(evaluators[name], wanted))
            assert same_bits(states[name], checkpoint(wanted))
            assert evaluators[name].refusal() is None or version < 2
    settled = await ear.until(TrainerMetrics, version=7)
    assert (settled.members, settled.applied, settled.verified) == (1, 1, 1)
    opened = [e.reason for e in ear.heard if isinstance(e, Event) and e.kind == "window-open"]
    assert opened == ["gloo 1: w0"]
    joined = {e.member: e.reason for e in ear.heard if isinstance(e, Event) and e.kind == "join"}
    assert joined["third"].endswith("evaluates every:3")


async def test_a_stopped_evaluator_costs_nobody_anything(site: Site, ear: Ear) -> None:
    """It holds its guard for ever, and so cannot apply: rounds go on, and no window is broken."""
    trained, blocked = weights(), weights()
    publisher = await site.publisher(trained)
    await site.replica(weights(), "w0")
    evaluator = await site.replica(blocked, "eval", role="evaluation")
    await publisher.wait_members(1, timeout_s=10)
    await eventually(lambda: evaluator.version == 0 and publisher.window == "gloo")
    with evaluator.reading():
        for version in range(1, 5):
            step(trained, version)
            update = await publisher.publish()
            assert (await update.wait_applied(timeout_s=10)).complete
        assert evaluator.version == 0
    await eventually(lambda: at(evaluator, 4))
    assert same_bits(trained, blocked)
    assert not [e for e in ear.heard if isinstance(e, Event) and e.kind in ("evict", "log-only")]


async def test_a_version_of_an_epoch_that_is_over(site: Site) -> None:
    """A trainer made versions 1 to 3 and left; another one goes on from there. A new worker follows
    version 2: it is made again from what the first one has stored, which the log still leads to."""
    policy = replace(QUICK, keep_versions=100)
    await published(site, 3, policy=policy)
    trained = checkpoint(3)
    publisher = await site.publisher(trained, policy=policy)
    step(trained, 4)
    await publisher.publish()
    state = weights(7)
    old = await site.replica(state, "old", role="evaluation", follow="version:2")
    await eventually(lambda: at(old, 2))
    assert same_bits(state, checkpoint(2))
    await until_stored(publisher, publisher.version)
    assert at(old, 2)


async def test_a_version_that_is_still_to_come(site: Site) -> None:
    """Version 3 is followed and the run is at 0: the worker waits, says so and refuses; then it
    holds that one, while the run goes on."""
    trained, state = weights(), weights(8)
    publisher = await site.publisher(trained)
    later = await site.replica(state, "later", role="evaluation", follow="version:3")
    await eventually(lambda: "waiting for version 3" in later.status)
    assert later.refusal() == "version 3 is followed, the weights are at None"
    for version in range(1, 6):
        step(trained, version)
        await publisher.publish()
        await until_stored(publisher, version)
    await eventually(lambda: at(later, 3))
    assert same_bits(state, checkpoint(3))
    assert later.refusal() is None


async def test_a_version_of_a_run_that_was_dropped(site: Site, bus: NatsBus) -> None:
    """Version 2 is followed and held when the run is dropped and begun anew, with other weights:
    what is held is no version 2 any more, and refused as one. When there is one again, that is
    taken."""
    trained, state = weights(), weights()
    async with AsyncPublisher(trained, run=site.run, bus=site.url, policy=QUICK) as first:
        for version in range(1, 3):
            step(trained, version)
            await first.publish()
            await until_stored(first, version)
        pinned = await site.replica(state, "pinned", role="evaluation", follow="version:2")
        await eventually(lambda: at(pinned, 2))
    for stream in (Subjects(site.run).log_stream, Subjects(site.run).journal_stream):
        await bus.delete_stream(stream, timeout_s=5.0)
    assert pinned.refusal() is None
    others = weights(5)
    second = await site.publisher(others)
    await eventually(lambda: pinned.head == 0)
    assert "not known to be version 2: waiting for version 2, 0 is the" in (pinned.refusal() or "")
    for version in range(1, 3):
        step(others, version)
        await second.publish()
        await until_stored(second, version)
    await eventually(lambda: at(pinned, 2) and pinned.refusal() is None)
    assert same_bits(state, others)


async def test_a_version_that_the_log_has_not_any_more(site: Site) -> None:
    """Version 1 was pruned: the worker serves nothing, and its status says that no way leads
    there."""
    policy = replace(QUICK, anchor_every=2, keep_versions=1)
    await published(site, 8, policy=policy)
    await site.publisher(checkpoint(8), policy=policy)
    gone = await site.replica(weights(7), "gone", role="evaluation", follow="version:1")
    await eventually(lambda: "to 1" in gone.status)
    assert gone.version is None


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"follow": "every:3"}, "for workers of role 'evaluation'"),
        ({"role": "evaluation", "follow": "each:3"}, "none of latest, every:K and version:N"),
        ({"role": "teacher"}, "rollout, evaluation"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], says: str) -> None:
    """A rollout worker that leaves versions out, a slip, a role that does not exist."""
    with pytest.raises(SettingsError, match=says):
        Replica(weights(), run="r", bus="nats://127.0.0.1:1", name="w", **options)


class Named:
    """Answers every prompt by one token."""

    def generate(self, request: Generate, *, cancelled: Any) -> list[Sample]:
        return [
            Sample(prompt=(), tokens=(1,), logprobs=(0.0,), spans=(Span(0, 1, 5),), worker="",
                   finish="length")
            for _ in request.prompts
        ]  # fmt: skip


async def test_samples_are_of_workers_for_rollouts_unless_asked_otherwise(
    bus: NatsBus, run: str
) -> None:
    """One of each role generates. Prompts go to the first; by name or by role to the other one;
    where only that one is left, prompts without a role fail rather than reach it."""

    async def never(version: int, timeout_s: float) -> None:
        raise AssertionError

    services: dict[str, GenerationService] = {}
    for name, role in (("w0", "rollout"), ("eval", "evaluation")):
        services[name] = GenerationService(
            bus, run=run, name=name, generator=Named(), version=lambda: 5, wait_version=never,
            role=role,  # type: ignore[arg-type]
        )  # fmt: skip
        await services[name].start()

    async def ask(rollouts: AsyncRollouts, **options: Any) -> set[str]:
        samples = rollouts.generate([[n] for n in range(8)], timeout_s=2.0, **options)
        return {sample.worker async for sample in samples}

    async with AsyncRollouts(run, bus) as rollouts:
        async with AsyncRollouts(run, bus, role="evaluation") as evaluations:
            await asyncio.sleep(0.2)
            assert await ask(rollouts) == {"w0"}
            assert await ask(rollouts, worker="eval") == {"eval"}
            assert await ask(evaluations) == {"eval"}
        await services["w0"].close()
        with pytest.raises(GenerationFailed):
            await ask(rollouts)
    await services["eval"].close()


async def test_a_quorum_and_no_patience_with_the_rest(site: Site, ear: Ear) -> None:
    """Two of three workers are enough, and the third one, which reads for long, is not waited for:
    an update is done with two; the third comes back by itself when it can."""
    policy = replace(QUICK, quorum=2, straggler_s=0.1, backoff_s=0.3)
    trained, slow = weights(), weights()
    publisher = await site.publisher(trained, policy=policy)
    for name in ("w0", "w1"):
        await site.replica(weights(), name, policy=policy)
    third = await site.replica(slow, "w2", policy=replace(policy, staging_nbytes=1))
    await publisher.wait_members(3, timeout_s=10)
    await eventually(lambda: publisher.window == "gloo")
    with third.reading():
        for version in range(1, 5):
            step(trained, version)
            report = await (await publisher.publish()).wait_applied(timeout_s=10)
            assert set(report.applied) >= {"w0", "w1"}
        assert report.missing.keys() == {"w2"}
    step(trained, 5)
    report = await (await publisher.publish()).wait_applied(timeout_s=10, at_least="all")
    assert report.complete
    assert same_bits(trained, slow)
    await eventually(
        lambda: any(
            isinstance(e, Event) and e.kind == "window-open" and e.reason.endswith("w0, w1, w2")
            for e in ear.heard[-20:]
        )
    )


class Slow(MemoryLog):
    """A log that takes its time to say what it has."""

    async def entries(self, *, timeout_s: float) -> list[LogEntry]:
        found = await super().entries(timeout_s=timeout_s)
        await asyncio.sleep(0.3)
        return found


async def test_a_joiner_gets_in_though_updates_outpace_the_log(site: Site) -> None:
    """An update every 50 ms, and a log that is asked for 300 ms: a late worker is several
    versions behind whatever it fetches, and enters the window all the same."""
    log, trained, late = Slow(), weights(), weights(9)
    publisher = await site.publisher(trained, log=log)
    await site.replica(weights(), "w0", log=log)
    await publisher.wait_members(1, timeout_s=10)
    received: list[int] = []

    async def train() -> None:
        for version in range(1, 200):
            step(trained, version)
            update = await publisher.publish()
            await asyncio.sleep(0.05)
            core = publisher._core
            assert core is not None
            record = core.record(update.version)
            if record is not None and "w1" in {member.name for member in record.received}:
                received.append(version)
            if len(received) >= 3:
                return

    training = asyncio.create_task(train())
    await asyncio.sleep(0.3)
    replica = await site.replica(late, "w1", log=log)
    await training
    assert len(received) >= 3, "it never came into the window"
    await eventually(lambda: at(replica, publisher.version))
    assert same_bits(trained, late)


class Counting(MemoryLog):
    """A log that tells what was read of it."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[tuple[int | None, int]] = []

    async def load(self, entry: LogEntry, **options: Any) -> bytes | bytearray:
        self.loaded.append((entry.base_version, entry.version))
        return await super().load(entry, **options)


async def test_who_comes_back_takes_no_more_than_it_lacks(site: Site) -> None:
    """A worker holds version 3, leaves, and comes back at 6, as another process would: with the
    weights alone. It takes three patches, and no full copy."""
    log, trained, state = Counting(), weights(), weights()
    publisher = await site.publisher(trained, log=log)
    for version in range(1, 7):
        step(trained, version)
        await publisher.publish()
        await until_stored(publisher, version)
    state = checkpoint(3)
    log.loaded.clear()
    replica = await site.replica(state, "back", log=log)
    await eventually(lambda: at(replica, 6))
    assert same_bits(trained, state)
    assert log.loaded == [(3, 4), (4, 5), (5, 6)]


async def test_a_replica_that_starts_again_shows_its_version_anew(site: Site) -> None:
    """Somebody writes to the weights between two lives of one Replica: the version of the life
    before is not theirs any more, and they are made right before they are served."""
    trained, state = weights(), weights()
    publisher = await site.publisher(trained)
    replica = Replica(state, run=site.run, bus=site.url, name="w0", policy=QUICK)
    async with replica:
        await replica.wait_version(0, timeout_s=10)
    step(state, 99)
    async with replica:
        assert replica.version is None
        await replica.wait_version(0, timeout_s=10)
        assert same_bits(trained, state)
    await publisher.close()
