"""The broker dies, stops and comes back, with and without what it stored, while rounds go on."""

import asyncio
import signal

import pytest

from .site import SHORT, Site

pytestmark = [pytest.mark.timeout(60), pytest.mark.asyncio(loop_scope="session")]


@pytest.mark.parametrize("forgetful", [False, True], ids=["with-its-store", "without"])
@pytest.mark.parametrize("stage", ["announce", "announced", "broadcast", "store"])
async def test_it_dies_at(site: Site, stage: str, forgetful: bool) -> None:
    """SIGKILL while the trainer stands at this stage: it goes on publishing without a broker, and
    all follow once there is one."""
    await site.trainer.arrive(stage)
    await site.broker.kill()
    site.note("broker: SIGKILL")
    site.trainer.said.pop("made", None)
    site.trainer.go_on()
    await site.until(lambda: "made" in site.trainer.said, 5.0, "publish() goes on")
    await site.restart_broker(forgetful=forgetful)
    await site.settle()


async def test_it_stops(site: Site) -> None:
    """SIGSTOP for longer than an exchange with it may take: nobody notices but by the clock."""
    site.broker.signal(signal.SIGSTOP)
    site.note("broker: SIGSTOP")
    await asyncio.sleep(SHORT.bus_s + 0.5)
    await site.settle()
