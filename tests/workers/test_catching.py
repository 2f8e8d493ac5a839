"""A worker that catches up says how far it is: the figures alone, and a late joiner end to end."""

import asyncio
import itertools
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from runs import QUICK, Ear, Site, Tensors, eventually, same_bits, step, until_stored, weights
from sparsecast import MemoryLog, Policy, digest
from sparsecast.messages.control import LogEntry
from sparsecast.messages.errors import LogError
from sparsecast.messages.metrics import Event, WorkerMetrics
from sparsecast.pipeline.log.base import Progress as Hear
from sparsecast.workers.catching import Catching

POLICY = Policy(tell_s=1.0, tell_nbytes=1000)


def entry(base: int | None, version: int, nbytes: int) -> LogEntry:
    """An entry of so many bytes."""
    return LogEntry(
        name=f"{base}-{version}", epoch=1, base_version=base, version=version, nbytes=nbytes,
        checksum=0, digest=0, manifest_hash="m", chunks=1, writer="w",
    )  # fmt: skip


class Bench:
    """A Catching on a clock of the test's, and what it has told."""

    def __init__(self) -> None:
        self.now = 100.0
        self.told: list[tuple[str, Mapping[str, Any]]] = []
        self.catching = Catching(POLICY, lambda: self.now, lambda *said: self.told.append(said))

    @property
    def states(self) -> list[str]:
        """Of all that was told."""
        return [details["state"] for _, details in self.told]


def test_a_large_one_is_told_from_its_beginning_once_a_second_and_at_its_end() -> None:
    """An anchor and a patch, 1500 bytes: told at once, then at most once a second however often
    bytes come, and at the end, which is the digest and not the last byte."""
    bench = Bench()
    anchor, patch = entry(None, 4, 1200), entry(4, 5, 300)
    bench.catching.begin(None, [anchor, patch], since=99.5)
    assert bench.states == ["under way"]
    for nbytes in range(0, 1201, 100):
        bench.now += 0.25
        bench.catching.loaded(nbytes)
    bench.catching.staged(anchor)
    bench.catching.loaded(300)
    bench.catching.staged(patch)
    assert bench.states == ["under way"] * 4
    assert [details["nbytes"] for _, details in bench.told] == [0, 300, 700, 1100]
    at = bench.catching.progress
    assert at is not None
    assert (at.nbytes, at.of_nbytes, at.entries, at.of_entries) == (1500, 1500, 2, 2)
    assert (at.base_version, at.version, at.target, at.share) == (None, None, 5, 1.0)
    bench.now = 104.0
    bench.catching.verified(5)
    assert bench.catching.progress is None
    assert bench.told[0][0] == (
        "catching up from a full copy to version 5: 0 of 1500 bytes, 0 of 2 entries, 0.5 s"
    )
    assert bench.told[-1] == (
        "caught up to version 5: 1500 bytes in 4.5 s",
        {
            "base_version": None, "version": 5, "target": 5, "nbytes": 1500, "of_nbytes": 1500,
            "entries": 2, "of_entries": 2, "elapsed_s": 4.5, "state": "done",
        },
    )  # fmt: skip
    bench.catching.verified(6)
    bench.catching.broke_off("nothing is under way")
    assert len(bench.told) == 5


def test_a_short_one_is_told_by_nobody() -> None:
    """A patch of a few bytes in less than a second, as a worker takes them all day that follows by
    the log alone: there is progress to ask for, and no event, whatever becomes of it."""
    bench = Bench()
    for version in range(1, 20):
        patch = entry(version - 1, version, 500)
        bench.catching.begin(version - 1, [patch], since=bench.now)
        bench.now += 0.9
        bench.catching.loaded(500)
        bench.catching.staged(patch)
        at = bench.catching.progress
        assert at is not None
        assert not at.notable
        bench.now += 30.0  # readers hold the weights: nothing of the log's
        if version % 2:
            bench.catching.verified(version)
        else:
            bench.catching.broke_off("an apply failed")
        assert bench.catching.progress is None
    assert bench.told == []


def test_one_that_lasts_is_told_though_it_is_small() -> None:
    """The log is slow: after a second a few bytes are news."""
    bench = Bench()
    bench.catching.begin(3, [entry(3, 4, 500)], since=100.0)
    bench.now = 100.9
    bench.catching.loaded(100)
    assert bench.told == []
    bench.now = 101.1
    bench.catching.loaded(200)
    [(said, details)] = bench.told
    assert said.startswith("catching up from version 3 to version 4: 200 of 500 bytes")
    assert (details["version"], details["target"], details["state"]) == (3, 4, "under way")


def test_what_took_several_fetches_is_one() -> None:
    """Staging is full after the anchor: it is proven, and the rest is fetched, of which there is
    more by then. Bytes and entries go on counting, and the end says all of them."""
    bench = Bench()
    anchor = entry(None, 4, 2000)
    bench.catching.begin(None, [anchor, entry(4, 5, 10), entry(5, 6, 10)], since=100.0)
    bench.catching.loaded(2000)
    bench.catching.staged(anchor)
    bench.now = 110.0
    bench.catching.verified(4)
    rest = [entry(4, 5, 10), entry(5, 6, 10), entry(6, 7, 10)]
    bench.catching.begin(4, rest, since=bench.now)
    at = bench.catching.progress
    assert at is not None
    assert (at.base_version, at.version, at.target) == (None, 4, 7)
    assert (at.nbytes, at.of_nbytes, at.entries, at.of_entries) == (2000, 2030, 1, 4)
    for patch in rest:
        bench.catching.loaded(10)
        bench.catching.staged(patch)
    bench.catching.verified(7)
    assert bench.states == ["under way", "under way", "done"]
    assert bench.told[-1][0] == "caught up to version 7: 2030 bytes in 10.0 s"


def test_a_window_may_bring_the_rest() -> None:
    """The log gave one of two patches, and a round was quicker with the second: the end says what
    the log gave, and no more."""
    bench = Bench()
    first = entry(0, 1, 900)
    bench.catching.begin(0, [first, entry(1, 2, 900)], since=100.0)
    bench.catching.loaded(900)
    bench.catching.staged(first)
    bench.catching.loaded(450)
    bench.catching.verified(3)
    said, details = bench.told[-1]
    assert said == "caught up to version 3: 900 bytes in 0.0 s"
    assert (details["nbytes"], details["of_nbytes"]) == (900, 900)
    assert (details["entries"], details["of_entries"]) == (1, 1)
    bench.catching.loaded(900)  # what the fetch that is under way still brings
    assert bench.catching.progress is None


def test_one_that_breaks_off_says_why_and_does_not_flood_the_bus() -> None:
    """The log breaks off again and again: each end is told whose beginning was, and a new beginning
    only a second after the last word."""
    bench = Bench()
    for _ in range(10):
        bench.catching.begin(None, [entry(None, 4, 2000)], since=bench.now)
        bench.now += 0.1
        bench.catching.loaded(700)
        bench.catching.broke_off("the disk is gone")
        bench.now += 0.2
    assert bench.states == ["under way", "broken off"] * 3
    assert bench.told[1][0] == (
        "catching up to version 4 broke off after 700 of 2000 bytes: the disk is gone"
    )


def test_every_figure_is_on_the_page() -> None:
    """docs/metrics.md names what an event's details hold, and nothing else."""
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    rows = re.findall(r"^\| (`[^|]+) \|", page.partition("### Catching up")[2], re.M)
    bench = Bench()
    bench.catching.begin(None, [entry(None, 4, 1200)], since=100.0)
    assert set(re.findall(r"`(\w+)`", " ".join(rows))) == bench.told[0][1].keys()


# ---- end to end


def large(seed: int = 0) -> Tensors:
    """A model whose full copy has several chunks in every tier: 12 MB in two tensors."""
    random = torch.Generator().manual_seed(seed)
    return {
        "first": torch.randn(2_500_000, generator=random).to(torch.bfloat16),
        "second": torch.randn(3_500_000, generator=random).to(torch.bfloat16),
    }


#: Everything is worth an event, fifty times a second.
EAGER = replace(QUICK, tell_s=0.02, tell_nbytes=1)


def caught(ear: Ear) -> list[Event]:
    """The events of catching up so far."""
    return [e for e in ear.heard if isinstance(e, Event) and e.kind == "catch-up"]


async def until_in(ear: Ear, state: str = "done") -> list[Event]:
    """The events of catching up, up to the first one of this state."""

    def ended() -> bool:
        return any((event.details or {})["state"] == state for event in caught(ear))

    await eventually(ended, timeout_s=20.0)
    return caught(ear)


def figures(events: list[Event], name: str) -> list[Any]:
    """One of the details, event by event."""
    return [(event.details or {})[name] for event in events]


@pytest.mark.parametrize("tiers", ["jetstream", "dir", "dir,jetstream"])
async def test_a_late_joiner_is_told_of(site: Site, ear: Ear, tmp_path: Path, tiers: str) -> None:
    """A full copy and three patches are in the log when a worker with other weights comes: events
    say how far it is, never less than before, and the last one, once its digest was right, all."""
    log = tiers.replace("dir", f"dir:{tmp_path}")
    trained, late = large(), large(9)
    publisher = await site.publisher(trained, log=log)
    await until_stored(publisher, 0, anchor=True)
    for version in range(1, 4):
        step(trained, version)
        await publisher.publish()
        await until_stored(publisher, version)
    entries = await publisher._ports.log.entries(timeout_s=10)
    replica = await site.replica(late, "late", log=log, policy=EAGER)
    snapshots = []
    while replica.verified != 3:
        if (at := replica.catching_up) is not None:
            snapshots.append(at)
        await asyncio.sleep(0.001)
    assert replica.catching_up is None
    assert same_bits(trained, late)
    events = await until_in(ear)
    assert len(events) >= 3
    assert {event.member for event in events} == {"late"}
    assert figures(events, "state") == ["under way"] * (len(events) - 1) + ["done"]
    whole = sum(entry.nbytes for entry in entries)
    assert figures(events, "nbytes")[0] == 0
    assert figures(events, "nbytes") == sorted(figures(events, "nbytes"))
    assert figures(events, "nbytes")[-1] == whole
    assert set(figures(events, "of_nbytes")) == {whole}
    assert set(figures(events, "of_entries")) == {len(entries)}
    assert figures(events, "entries") == sorted(figures(events, "entries"))
    assert figures(events, "entries")[-1] == len(entries) == 4
    assert figures(events, "version") == [None] * (len(events) - 1) + [3]
    assert set(figures(events, "target")) == {3}
    told_s = figures(events[:-1], "elapsed_s")
    assert all(b - a > 0.015 for a, b in itertools.pairwise(told_s))
    assert events[-1].reason.startswith(f"caught up to version 3: {whole} bytes in ")
    assert len({at.nbytes for at in snapshots}) > 1
    assert [at.nbytes for at in snapshots] == sorted(at.nbytes for at in snapshots)
    assert (await ear.until(WorkerMetrics, worker="late", version=3)).verified


async def test_a_quick_one_is_no_event(site: Site, ear: Ear) -> None:
    """A small model's late joiner, with the bounds as they come: it is in within a moment, and
    nobody is told but by its metrics."""
    trained, late = weights(), weights(9)
    publisher = await site.publisher(trained)
    for version in range(1, 4):
        step(trained, version)
        await publisher.publish()
        await until_stored(publisher, version)
    replica = await site.replica(late, "late")
    await eventually(lambda: replica.verified == 3)
    assert same_bits(trained, late)
    assert (await ear.until(WorkerMetrics, worker="late")).source == "log"
    await publisher.close()
    await ear.until(Event, kind="bye")
    assert caught(ear) == []


async def test_more_than_staging_holds_is_one_catch_up(site: Site, ear: Ear) -> None:
    """Staging takes the full copy and nothing beside it: the patches come with further fetches, and
    the figures go on to the sum of all."""
    trained, late = large(), large(9)
    publisher = await site.publisher(trained)
    await until_stored(publisher, 0, anchor=True)
    for version in range(1, 4):
        step(trained, version)
        await publisher.publish()
        await until_stored(publisher, version)
    whole = sum(e.nbytes for e in await publisher._ports.log.entries(timeout_s=10))
    replica = await site.replica(late, "late", policy=replace(EAGER, staging_nbytes=1_000_000))
    await eventually(lambda: replica.verified == 3, timeout_s=20.0)
    events = await until_in(ear)
    assert figures(events, "state").count("done") == 1
    assert figures(events, "nbytes") == sorted(figures(events, "nbytes"))
    assert figures(events, "nbytes")[-1] == whole
    assert len(set(figures(events, "version"))) > 2  # each step is proven before the next


class Halting(MemoryLog):
    """A tier that gives half of the first anchor that it is asked for, and fails then."""

    halts = True

    async def load(
        self, entry: LogEntry, *, timeout_s: float, progress: Hear | None = None
    ) -> bytes:
        if self.halts and entry.base_version is None:
            self.halts = False
            if progress is not None:
                progress(entry.nbytes // 2)
            await asyncio.sleep(0.2)
            raise LogError("the disk is gone")
        return await super().load(entry, timeout_s=timeout_s, progress=progress)


async def test_a_tier_that_fails_midway_begins_anew_with_the_next(site: Site, ear: Ear) -> None:
    """Half of the full copy is here when its tier fails: the bytes fall to nothing, the other tier
    gives all, and the worker is in by one and the same catch-up."""
    trained, late = large(), large(9)
    log: Any = [Halting(), "jetstream"]
    publisher = await site.publisher(trained, log=log)
    await until_stored(publisher, 0, anchor=True)
    replica = await site.replica(late, "late", log=log, policy=EAGER)
    seen = []
    while replica.verified != 0:
        if (at := replica.catching_up) is not None:
            seen.append(at.nbytes)
        await asyncio.sleep(0.001)
    events = await until_in(ear)
    half = figures(events, "of_nbytes")[0] // 2
    falls = [(a, b) for a, b in itertools.pairwise(seen) if b < a]
    assert [a for a, _ in falls] == [half]
    assert falls[0][1] < half
    assert figures(events, "state") == ["under way"] * (len(events) - 1) + ["done"]
    assert figures(events, "nbytes")[-1] == figures(events, "of_nbytes")[-1] == 2 * half
    assert same_bits(trained, late)


async def test_a_log_that_breaks_off_is_told_and_tried_again(site: Site, ear: Ear) -> None:
    """Its only tier fails midway: the event says so with the tier's words; the next try is a
    catch-up of its own, and ends well."""
    trained, late = large(), large(9)
    log = Halting()
    publisher = await site.publisher(trained, log=log)
    await until_stored(publisher, 0, anchor=True)
    replica = await site.replica(late, "late", log=log, policy=EAGER)
    events = await until_in(ear, "broken off")
    assert events[-1].reason.startswith("catching up to version 0 broke off after ")
    assert events[-1].reason.endswith("bytes: the disk is gone")
    await eventually(lambda: replica.verified == 0)
    assert replica.catching_up is None
    assert figures(await until_in(ear), "state")[-1] == "done"
    assert same_bits(trained, late)


async def test_a_digest_that_is_not_right_is_no_end(site: Site, ear: Ear) -> None:
    """The weights are overwritten between apply and digest: all bytes were there, and the worker is
    not in. The catch-up broke off by the digest, and the next one, from a full copy, is the end."""
    trained, late = large(), large(9)
    publisher = await site.publisher(trained)
    await until_stored(publisher, 0, anchor=True)
    replica = await site.replica(late, "late", policy=replace(EAGER, verify_after_s=0.5))
    await eventually(lambda: replica.version == 0)
    late["first"].view(torch.int16)[7] ^= 1
    events = await until_in(ear, "broken off")
    assert figures(events, "nbytes")[-1] == figures(events, "of_nbytes")[-1]
    assert "digest " in events[-1].reason
    assert f"announced was {digest(trained):016x}" in events[-1].reason
    await until_in(ear)
    assert same_bits(trained, late)


async def test_whoever_leaves_on_the_way_says_so(site: Site, ear: Ear) -> None:
    """A worker is told to end while half of a full copy is here: its last word on it is the end."""
    trained, late = large(), large(9)

    class Slow(MemoryLog):
        async def load(
            self, entry: LogEntry, *, timeout_s: float, progress: Hear | None = None
        ) -> bytes:
            assert progress is not None
            progress(entry.nbytes // 2)
            await asyncio.sleep(3600)
            raise AssertionError

    log = Slow()
    publisher = await site.publisher(trained, log=log)
    await until_stored(publisher, 0, anchor=True)
    replica = await site.replica(late, "late", log=log, policy=EAGER)
    await eventually(lambda: (at := replica.catching_up) is not None and at.share > 0.4)
    await replica.close()
    assert replica.catching_up is None
    events = await until_in(ear, "broken off")
    assert events[-1].reason.endswith("bytes: the worker left")
