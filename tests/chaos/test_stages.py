"""A trainer or a worker dies, or stops for longer than it is waited for, at every stage of a
round."""

import asyncio

import pytest

from .roles import TRAINER_STAGES, WORKER_STAGES
from .site import SHORT, Site

pytestmark = [pytest.mark.timeout(60), pytest.mark.asyncio(loop_scope="session")]


@pytest.mark.parametrize("stage", WORKER_STAGES)
async def test_a_worker_at(site: Site, stage: str) -> None:
    """It is killed there, and one of its name starts; that one is stopped there until it is put
    out, and longer. Both times it comes back to the head and into the run, and the other worker is
    never held up for good."""
    victim = site.workers[1]
    await victim.arrive(stage)
    victim.kill()
    victim.start()
    await site.event("join", victim.name)  # else it is the dead one that is put out
    await site.settle()
    site.run()
    await victim.arrive(stage)
    victim.stop()
    await site.event("evict", victim.name)
    await asyncio.sleep(SHORT.silence_s)
    await site.settle()


@pytest.mark.parametrize("stage", TRAINER_STAGES)
async def test_the_trainer_at(site: Site, stage: str) -> None:
    """It is killed there, and another one with other weights takes the run; that one is stopped
    there for longer than its lease, and goes on. The workers follow both."""
    trainer = site.trainer
    await trainer.arrive(stage)
    trainer.kill()
    trainer.start()
    await site.settle()
    site.run()
    await trainer.arrive(stage)
    trainer.stop()
    await asyncio.sleep(SHORT.lease_s + 0.5)
    await site.settle()
