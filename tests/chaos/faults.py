"""Faults by lot: each is begun, lasts, and is taken back; several go on at once."""

import asyncio
import random
import signal
from collections.abc import Awaitable, Callable

from .roles import TRAINER_STAGES, WORKER_STAGES
from .site import Actor, Site

Fault = Callable[[Site, random.Random], Awaitable[None]]


def actor(site: Site, name: str) -> Actor:
    """Who plays this part by now."""
    return site.trainer if name == "trainer" else site.actors[name]


async def at_some_stage(site: Site, who: Actor, lot: random.Random) -> None:
    """Wait for a stage of a round, for half of the faults; where it does not come, go on."""
    if lot.random() < 0.5:
        return
    stages = TRAINER_STAGES if who is site.trainer else (*WORKER_STAGES, "fetch")
    try:
        await who.arrive(lot.choice(stages), timeout_s=1.0)
    except TimeoutError:
        who.tell("go on")


def dies(name: str) -> Fault:
    async def fault(site: Site, lot: random.Random) -> None:
        who = actor(site, name)
        await at_some_stage(site, who, lot)
        who.kill()
        await asyncio.sleep(lot.choice((0.0, 0.0, 0.5, 2.0)))
        who.start()
        if who is site.trainer:
            site.run()

    return fault


def stops(name: str) -> Fault:
    async def fault(site: Site, lot: random.Random) -> None:
        who = actor(site, name)
        await at_some_stage(site, who, lot)
        who.stop()
        await asyncio.sleep(lot.choice((0.1, 0.4, 1.2, 3.0)))
        who.go_on()

    return fault


def is_held(name: str) -> Fault:
    """It is slow: it stands still at one stage for a while, and its other threads go on."""

    async def fault(site: Site, lot: random.Random) -> None:
        who = actor(site, name)
        await at_some_stage(site, who, lot)
        await asyncio.sleep(lot.choice((0.05, 0.3, 1.0)))
        who.go_on()

    return fault


def is_cut(name: str) -> Fault:
    async def fault(site: Site, lot: random.Random) -> None:
        who, how = actor(site, name), lot.choice(("broken", "refused", "swallowed", "slow"))
        site.note(f"{name}: its way is {how}")
        match how:
            case "broken":
                who.way.cut()
            case "refused":
                who.way.cut(refuse=True)
            case "swallowed":
                who.way.stall(both=lot.random() < 0.5)
            case "slow":
                who.way.delay_s = lot.choice((0.01, 0.05, 0.3))
        await asyncio.sleep(lot.choice((0.1, 0.5, 1.5, 4.0)))
        if how == "swallowed" and lot.random() < 0.5:
            who.way.cut()  # what was swallowed is lost
        who.way.accept()
        who.way.flow()
        who.way.delay_s = 0.0
        site.note(f"{name}: its way is open")

    return fault


async def broker_dies(site: Site, lot: random.Random) -> None:
    await site.broker.kill()
    site.note("broker: SIGKILL")
    await asyncio.sleep(lot.choice((0.0, 0.5, 3.0)))
    await site.restart_broker(forgetful=lot.random() < 0.4)


async def broker_stops(site: Site, lot: random.Random) -> None:
    site.broker.signal(signal.SIGSTOP)
    site.note("broker: SIGSTOP")
    await asyncio.sleep(lot.choice((0.1, 0.5, 1.5, 4.0)))
    site.broker.signal(signal.SIGCONT)
    site.note("broker: SIGCONT")


async def trainer_is_superseded(site: Site, lot: random.Random) -> None:
    """It is away for so long that another one gets the run; and comes back."""
    old = site.trainer
    if lot.random() < 0.5:
        old.stop()
    else:
        old.way.cut(refuse=True)
    await site.supersede()
    site.run()
    await asyncio.sleep(lot.choice((0.0, 0.5)))
    old.go_on()
    old.way.accept()
    await site.until(lambda: "fenced" in old.said, 15.0, "the old trainer is fenced off")
    old.kill()


def choose(lot: random.Random) -> list[Fault]:
    """What happens next: one to three faults at once, of different things."""
    if lot.random() < 0.08:
        return [trainer_is_superseded]
    kinds: dict[str, list[Fault]] = {
        "broker": [broker_dies, broker_stops],
        **{name: [dies(name), stops(name), is_held(name)] for name in ("trainer", "w0", "w1")},
        **{f"way of {name}": [is_cut(name)] for name in ("trainer", "w0", "w1")},
    }
    what = lot.sample(sorted(kinds), lot.choice((1, 1, 2, 3)))
    return [lot.choice(kinds[each]) for each in what]


async def episode(site: Site, lot: random.Random) -> int:
    """Train; let faults happen; then all is to be well again. How many there were."""
    site.run()
    await asyncio.sleep(lot.uniform(0.0, 1.0))
    faults = choose(lot)
    async with asyncio.TaskGroup() as group:
        for fault in faults:
            group.create_task(fault(site, lot))  # type: ignore[arg-type]
    await asyncio.sleep(lot.choice((0.0, 0.0, 0.5)))
    await site.settle()
    site.check()
    return len(faults)
