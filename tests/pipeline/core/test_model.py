"""The whole protocol against a network, a log and processes that misbehave, seed by seed."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from sparsecast.pipeline.core.events import AnnounceFailed, Close
from sparsecast.pipeline.core.trainer import State
from toyreplica import Replica
from toytrainer import Trainer
from toyworld import Faults, World

OFFERS = [("gloo", "bus"), ("gloo", "bus"), ("bus",), ("gloo",)]


def faults(rng: random.Random) -> Faults:
    """A mix of misfortunes: most of them absent, some frequent."""

    def some(most: float) -> float:
        return rng.choice([0.0, 0.0, rng.uniform(0.0, most)])

    return Faults(
        lose=some(0.3), twice=some(0.3), slow=some(0.2), append=some(0.5), store=some(0.5),
        window=some(0.5), corrupt=some(0.3), flip=some(0.1), readers=some(0.5), torn=some(0.1),
        early=some(0.3), diff=some(0.3),
    )  # fmt: skip


def misfortune(world: World, rng: random.Random) -> None:
    """One thing that happens to a run."""
    trainer = world.trainer
    assert trainer is not None
    names = list(world.replicas)
    name = rng.choice(names)
    replica = world.replicas[name]
    match rng.randrange(14):
        case 0:
            replica.kill()
        case 1:
            replica.stop(rng.uniform(0.1, 4.0))
        case 2:
            replica.post(Close("the test is done with it"))
            replica.kill()
        case 3 | 4 | 5:
            if not replica.alive or rng.random() < 0.3:
                replica.kill()
                world.replicas[name] = Replica(world, name, replica.kinds)
        case 6:
            world.bus_away = world.now + rng.uniform(0.0, 3.0)
        case 7:
            world.log_away = world.now + rng.uniform(0.0, 5.0)
        case 8:
            if len(names) < 6:
                Replica(world, f"w{len(names)}", rng.choice(OFFERS))
        case 9:
            world.faults = faults(rng)
        case 10:
            trainer.stop(rng.uniform(0.0, 2.5))
        case 11:
            lose_journal(world)
        case 12:
            if rng.random() < 0.3:
                if rng.random() < 0.5:
                    trainer.kill()
                else:
                    world.zombies = [*world.zombies[-2:], trainer]
                Trainer(world).start()
        case _:
            world.faults = Faults()


def lose_journal(world: World) -> None:
    """The bus forgets everything; the keeper of the lease notices a little later."""
    trainer = world.trainer
    assert trainer is not None
    if trainer.core.state in (State.UNCLAIMED, State.RECLAIMING):
        return
    world.journal.clear()
    world.journals += 1
    world.journal_gone = True
    world.log.clear()
    world.after(
        0.05, lambda: trainer.post(AnnounceFailed(trainer.version, "lost", "the stream is gone"))
    )


def live_through(seed: int, seconds: float) -> World:
    """A run with misfortunes; then they end, and everyone has to come to the newest version."""
    rng = random.Random(seed)
    world = World(seed)
    Trainer(world).start()
    for number in range(rng.randrange(1, 5)):
        Replica(world, f"w{number}", rng.choice(OFFERS))
    world.faults = faults(rng)
    end = world.now + seconds
    while world.now < end:
        world.run(rng.choice([0.001, 0.02, 0.2, 1.0]))
        for _ in range(rng.choice([0, 1, 1, 3])):
            assert world.trainer is not None
            if world.trainer.core.state is not State.UNCLAIMED:
                world.trainer.publish()
        if rng.random() < 0.3:
            misfortune(world, rng)
    world.faults = Faults()
    world.bus_away = world.log_away = 0.0
    world.run(1.5)  # what the dead said last has arrived, and speaks for nobody's life any more
    for name, replica in list(world.replicas.items()):
        if replica.alive and replica.core.error is None:
            continue
        replica.kill()
        world.replicas[name] = Replica(world, name, replica.kinds)
    trainer = world.trainer
    assert trainer is not None
    trainer.publish()

    def converged() -> bool:
        return trainer.core.quiet and all(r.current for r in world.replicas.values())

    if not world.run(60.0, converged):
        core = trainer.core
        told = [f"{r}: {r.core.why()}, {r.version} torn={r.torn}" for r in world.replicas.values()]
        raise AssertionError(
            f"after 60 s of peace: {core.state}, head {core.head} of {trainer.version}, stored "
            f"{core.stored}, unsafe {core._safekeeping.unsafe}; {told}"
        )
    world.run(5.0)
    assert not core_awaits(world)
    return world


def core_awaits(world: World) -> list[str]:
    """What is still awaited when all is quiet: nothing should be."""
    trainer = world.trainer
    assert trainer is not None
    inner = trainer.core
    exchange, ledger, log = inner._windows.exchange, inner._ledger, inner._safekeeping
    left = []
    if exchange is not None or len(ledger) or log.storing or log.unsafe:
        left.append(f"trainer: {exchange}, {ledger}, {log}")
    for replica in world.replicas.values():
        seat, staged = replica.core._seat, replica.core._lane.staging.patches
        if seat.commitment or seat.receiving or staged or replica.staged:
            left.append(f"{replica}: {seat.commitment}, {staged}, {replica.staged}")
    return left


def test_rounds_go_before_the_journal_is_asked() -> None:
    """Nothing goes wrong, and one version follows on the other: members have committed to most of
    them by the time that the patch is there."""
    world = World(1)
    trainer = Trainer(world)
    trainer.start()
    for number in range(3):
        Replica(world, f"w{number}")
    world.run(2.0)
    for _ in range(50):
        trainer.publish()
        world.run(0.5)
    assert len(world.settled) == 50
    early = [record for record in world.settled if record.went_at < record.announced_at]
    assert len(early) > 40


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32))
def test_any_misfortune_ends_with_everyone_at_the_newest_version(seed: int) -> None:
    """Workers die, stop, lie and come back, messages are lost, doubled, late and out of order,
    journal, log and windows fail: no rule breaks at any step, and once it is over everyone holds
    the newest version, proven."""
    live_through(seed, 12.0)
