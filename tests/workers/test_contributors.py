"""Trainers of several ranks: each diffs its own shard, workers hold what all of them make up."""

import pytest

from ranks import split
from runs import Site, eventually, same_bits, step, weights
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
