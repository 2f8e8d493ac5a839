"""A trainer of several ranks starts again on its run, on as many ranks or others."""

import asyncio

import pytest

from ranks import fully_sharded, split
from runs import (
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
from sparsecast import AsyncPublisher, CannotResume, Closed
from sparsecast.messages.metrics import Event, WorkerMetrics
from trainers import Trainers


class Life:
    """One life of a trainer of so many ranks: one holds the whole model."""

    def __init__(self, site: Site, whole: Tensors, ranks: int, way: object = split) -> None:
        self.site = site
        self.whole = whole
        self.ranks = ranks
        self.trainers = Trainers(site, whole, way(whole, ranks)) if ranks > 1 else None  # type: ignore[operator]
        self.publisher: AsyncPublisher

    async def start(self, **options: object) -> None:
        """Enter with all ranks."""
        if self.trainers is not None:
            self.publisher = await self.trainers.start(**options)
        else:
            self.publisher = await self.site.publisher(self.whole, **options)

    async def publish(self, seed: int) -> int:
        """A step, and its version once the log has it."""
        step(self.whole, seed)
        publish = self.trainers.publish if self.trainers is not None else self.publisher.publish
        update = await publish()
        await until_stored(self.publisher, update.version)
        return int(update.version)

    async def end(self) -> None:
        """Leave in order, on every rank."""
        await self.publisher.close()
        if self.trainers is not None:
            for other in self.trainers.others:
                await other.close()


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 3), (1, 2), (3, 1)])
async def test_a_run_goes_on_from_its_log(site: Site, ear: Ear, before: int, after: int) -> None:
    """A trainer leaves after some versions; from an older checkpoint it starts again, on as many
    ranks, on more, or on one. Each rank makes again what it holds, by the layouts of those that
    stored it, and what differs is the next version: a worker that served on needs no full copy."""
    mine = weights()
    life = Life(site, weights(), before)
    await life.start()
    replica = await site.replica(mine)
    await life.publisher.wait_members(1, timeout_s=10)
    for seed in range(1, 5):
        last = await life.publish(seed)
    await eventually(lambda: replica.verified == last)
    await life.end()
    again = Life(site, checkpoint(2), after, fully_sharded)
    await again.start(resume="must")
    assert again.publisher.version == last + 2
    await eventually(lambda: replica.verified == last + 2)
    assert same_bits(again.whole, mine)
    told = await ear.until(WorkerMetrics, worker="w0", version=last + 2)
    assert told.base_version == last + 1
    assert not [e for e in ear.heard if isinstance(e, Event) and "anchor" in e.reason]
    version = await again.publish(9)
    await eventually(lambda: replica.verified == version)
    assert same_bits(again.whole, mine)
    assert replica.mismatches == 0


async def test_the_same_weights_are_the_same_version(site: Site) -> None:
    """A trainer of two ranks starts again with just the weights that it had published: nothing is
    pending, and whoever holds them holds the claim's version."""
    life = Life(site, weights(), 2)
    await life.start()
    last = await life.publish(1)
    await life.end()
    again = Life(site, checkpoint(1), 2)
    await again.start(resume="must")
    assert again.publisher.version == last + 1
    mine = checkpoint(1)
    replica = await site.replica(mine)
    await eventually(lambda: replica.verified == last + 1)


async def test_what_the_log_does_not_have_cannot_be_gone_on_from(site: Site) -> None:
    """Nothing was published on the run: "must" is refused on the first rank, and the others, whose
    entering ends with it, hear why."""
    trainers = Trainers(site, weights(), split(weights(), 2))
    entering = (trainers.first(resume="must").__aenter__(), trainers.other(1).__aenter__())
    first, other = await asyncio.gather(*entering, return_exceptions=True)
    assert isinstance(first, CannotResume)
    assert isinstance(other, Closed)
    assert "cannot be resumed" in str(other)
