"""The network between a process and the broker breaks, is refused, swallows and delays; a trainer
that was away meets its successor."""

import asyncio

import pytest

from .site import SHORT, Site

pytestmark = [pytest.mark.timeout(60), pytest.mark.asyncio(loop_scope="session")]

#: Longer than a member may be silent and than a lease lives.
AWAY_S = max(SHORT.silence_s, SHORT.lease_s) + 0.5


@pytest.mark.parametrize("how", ["broken", "refused", "swallowed", "deaf", "slow"])
@pytest.mark.parametrize("who", ["trainer", "w1"])
async def test_the_way_to_the_broker_is(site: Site, who: str, how: str) -> None:
    """It breaks and is there again at once; or for a while it takes no connection, swallows all and
    gives it back late, lets only what the process says through, takes a fifth of a second for
    everything."""
    way = site.actors[who].way
    match how:
        case "broken":
            way.cut()
        case "refused":
            way.cut(refuse=True)
        case "swallowed":
            way.stall(both=True)
        case "deaf":
            way.stall()
        case "slow":
            way.delay_s = 0.2
    if how != "broken":
        await asyncio.sleep(AWAY_S)
    await site.settle()


@pytest.mark.parametrize("away", ["stopped", "cut-off"])
async def test_a_trainer_meets_its_successor(site: Site, away: str) -> None:
    """It was away for longer than its lease, another one has the run by then, and it is fenced off
    as soon as it speaks: nothing of it is ever applied after that."""
    old = site.trainer
    if away == "stopped":
        old.stop()
    else:
        old.way.cut(refuse=True)
    await site.supersede()
    await site.settle(heal=False)
    site.run()
    site.heal()
    await site.until(lambda: "left" in old.said, 15.0, "the old trainer is fenced off")
    assert "fenced" in old.said
    old.kill()
    await site.settle()
