"""Trainers of several ranks: each diffs its own shard, workers hold what all of them make up."""

from dataclasses import replace

import pytest

from ranks import same, split
from runs import QUICK, Ear, Site, eventually, same_bits, step, weights
from sparsecast import AsyncPublisher
from sparsecast.messages.metrics import Event, WorkerMetrics
from teams import Team
from trainers import Trainers


@pytest.mark.parametrize("ranks", [2, 3])
async def test_workers_follow_what_all_ranks_publish(site: Site, ranks: int) -> None:
    """Every version is on a worker of one rank and on one that holds a part, bit for bit, each
    proven by a digest to which every rank of the trainer has given its share."""
    whole, mine = weights(), weights()
    trainers = Trainers(site, whole, split(whole, ranks))
    publisher = await trainers.start()
    replica = await site.replica(mine)
    await publisher.wait_members(1, timeout_s=10)
    await eventually(lambda: publisher.window == "gloo")
    for version in range(1, 8):
        step(whole, version)
        update = await trainers.publish()
        report = await update.wait_applied(timeout_s=10)
        assert report.complete, report
        assert same_bits(whole, mine)
        await eventually(lambda version=version: replica.verified == version)
    assert replica.mismatches == 0


@pytest.mark.parametrize("roots", [1, 2, 3])
async def test_each_rank_receives_what_it_holds(site: Site, ear: Ear, roots: int) -> None:
    """All-to-all: two workers of two ranks that hold the same, and one that holds everything. Each
    class of ranks has ends of its own, gets its parts alone, and all of them are proven."""
    whole, mine = weights(), weights()
    policy = replace(QUICK, routing="all-to-all")
    publisher: AsyncPublisher
    if roots == 1:
        publisher = await site.publisher(whole, policy=policy)
    else:
        trainers = Trainers(site, whole, split(whole, roots))
        publisher = await trainers.start(policy=policy)
    teams = [Team(site, whole, 2, name) for name in ("a", "b")]
    replicas = [(await team.start())[0] for team in teams]
    replicas.append(await site.replica(mine, "c"))
    await publisher.wait_members(3, timeout_s=10)

    def all_in() -> bool:
        opened = [e.reason for e in ear.heard if isinstance(e, Event) and e.kind == "window-open"]
        return any(reason.endswith(": a, b, c") for reason in opened)

    await eventually(all_in)
    for version in range(1, 6):
        step(whole, version)
        update = await (publisher.publish() if roots == 1 else trainers.publish())
        report = await update.wait_applied(timeout_s=10)
        assert report.complete, report
        assert same_bits(whole, mine)
        assert all(same(team.layouts, team.held, whole) for team in teams)
        await eventually(lambda version=version: all(r.verified == version for r in replicas))
        told = {
            name: await ear.until(WorkerMetrics, worker=name, version=version) for name in "abc"
        }
        assert {one.source for one in told.values()} == {"window"}
        assert told["a"].nbytes == told["b"].nbytes < 0.8 * told["c"].nbytes
