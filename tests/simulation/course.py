"""The course of one run: it is played, its faults come and heal, all converge, and all leave.

After the faults everything heals; from then on every worker has BOUND_S to hold the newest version,
verified, and every process LEAVE_S to leave in order.
"""

import asyncio
from typing import TYPE_CHECKING, Any

from sparsecast.messages.errors import Fenced

from .faults import happen
from .lives import Life, TrainerLife
from .loop import Gone
from .windows import Faults

if TYPE_CHECKING:
    from .world import World

#: After the last fault: until one trainer is left, until everyone holds the newest version, and
#: until all have left.
LAST_S = 40.0
BOUND_S = 60.0
LEAVE_S = 60.0


class Broken(Exception):
    """A rule was broken: the run ends here."""


class Course:
    """Plays a world's plan; raises Broken at the first violation."""

    def __init__(self, world: "World") -> None:
        self.world = world

    async def play(self) -> None:
        """From the first start to the last end."""
        world, plan = self.world, self.world.plan
        world.start_trainer(delay_s=world.rng.uniform(0, 2))
        for slot in range(plan.workers):
            world.start_worker(f"w{slot}", slot, delay_s=world.rng.uniform(0, 3))
        for slot, name in enumerate(plan.evaluators):
            world.start_worker(name, slot, delay_s=world.rng.uniform(0, 6))
        world.spawn(self._bring_faults())
        await self._until(lambda: world.loop.time() >= world.began + plan.fault_s, None)
        await self._heal()
        await self._converge()
        await self._leave()

    async def _bring_faults(self) -> None:
        world = self.world
        for fault in world.plan.faults:
            await asyncio.sleep(max(0.0, world.began + fault.at - world.loop.time()))
            world.spawn(happen(world, fault))

    async def _heal(self) -> None:
        """No fault from here on."""
        world = self.world
        world.note("heal", "the faults are over")
        for task in list(world.tasks):
            task.cancel()
        await asyncio.gather(*world.tasks, return_exceptions=True)
        world.healed = True
        world.calm()
        world.broker.full = lambda stream: False
        world.disk.heal()
        world.fabric.faults = Faults(notices=world.fabric.faults.notices)
        if not world.broker.up:
            world.broker.start()
        for worker in world.workers:
            worker.hold_s = 0.0
            if worker.engine is not None:
                worker.engine.fail_next = False
        for life in [*world.trainers, *world.workers]:
            if life.process.frozen and not life.process.dead:
                life.process.thaw()
        for trainer in world.trainers:
            trainer.patience_s = 0.0
        if not any(trainer.present for trainer in world.trainers):
            world.start_trainer(delay_s=0.0)
        staying = (life for life in world.workers if life.present and not life.leaving.is_set())
        if all(life.follow is not None for life in staying):
            world.start_worker("w0", 0, delay_s=0.0)

    async def _converge(self) -> None:
        world = self.world
        healed = world.loop.time()
        while True:
            trainer = await self._last_trainer()
            try:
                for _ in range(2):
                    await trainer.process.ask(trainer.publish())
                    await asyncio.sleep(0.2)
            except (Fenced, Gone) as exc:
                world.note(trainer.name, "lost the run", exc)
                continue
            await self._until(
                lambda trainer=trainer: self._settled(trainer) or self._lost(trainer),
                BOUND_S,
                lambda trainer=trainer: self._why(trainer),
            )
            if self._settled(trainer):
                break
            # A successor had the run before it died, and this one had not heard of it: its own
            # successor follows. That can happen as often as there were trainers.
            world.note(trainer.name, "lost the run")
        world.result.converged_s = world.loop.time() - healed
        world.note("converged", f"after {world.result.converged_s:.1f} s")
        report = await trainer.process.ask(trainer.last.wait_applied(10.0, at_least="all"))
        world.check_report(trainer, report)
        names = sorted({life.worker for life in world.live_workers() if life.follow is None})
        if not report.complete or sorted(report.applied) != names:
            world.violation(f"wait_applied() reports {report}, there are {names}")
        for worker in world.live_workers():
            left = len(worker.replica._incoming._staged)
            if left:
                world.violation(f"{worker.name} has {left} patches in staging, and no use for them")
        outgoing = trainer.publisher._outgoing
        if outgoing._kept or outgoing._pending:
            world.violation(f"{trainer.name} keeps {list(outgoing._kept)}, {outgoing._pending}")

    async def _last_trainer(self) -> TrainerLife:
        """The one trainer that is left on the run."""
        world = self.world

        def there() -> list[str]:
            return [trainer.name for trainer in world.trainers if trainer.present]

        await self._until(
            lambda: (
                len(there()) == 1
                and bool(world.live_trainers())
                and world.live_trainers()[0].publisher._error is None
            ),
            LAST_S,
            lambda: f"not one trainer but {there()}",
        )
        return world.live_trainers()[0]

    async def _leave(self) -> None:
        world = self.world
        world.closing = True
        everyone: list[Life] = [*world.live_trainers(), *world.live_workers()]
        world.rng.shuffle(everyone)
        for life in everyone:
            life.leaving.set()
            await asyncio.sleep(world.rng.choice([0.0, 0.5]))
        await self._until(
            lambda: not any(life.present for life in [*world.trainers, *world.workers]),
            LEAVE_S,
            lambda: f"{[life.name for life in everyone if life.present]} have not left",
        )

    # ---- how far it has come

    def _lost(self, trainer: TrainerLife) -> bool:
        return isinstance(trainer.publisher._error, Fenced)

    def _settled(self, trainer: TrainerLife) -> bool:
        core = trainer.publisher._core
        if core is None or not core.quiet:
            return False
        members, newest = core.membership.members, trainer.publisher.version
        present = [worker for worker in self.world.workers if worker.present]
        return bool(present) and all(
            worker.settled(trainer)
            and worker.worker in members
            and (worker.follow is not None or members[worker.worker].verified == newest)
            for worker in present
        )

    def _why(self, trainer: TrainerLife) -> str:
        core = trainer.publisher._core
        assert core is not None
        told = [
            f"{trainer.name} at {trainer.publisher.version}, {core.state.value}, head {core.head}, "
            f"stored {core.stored}, epoch {core.epoch}, in: {list(core.membership.members)}"
        ]
        for worker in self.world.workers:
            if worker.present:
                inner = worker.replica._core
                told.append(
                    f"{worker.name}: version {worker.replica.version}, verified "
                    f"{worker.replica.verified}, epoch {inner.epoch if inner else 0}: "
                    f"{worker.replica.status}; {worker.replica.refusal()}"
                )
        return "not converged: " + "; ".join(told)

    async def _until(self, condition: Any, timeout_s: float | None, why: Any = None) -> None:
        """Look every tenth of a second; Broken at the first violation, or at the deadline."""
        world = self.world
        end = None if timeout_s is None else world.loop.time() + timeout_s
        while not condition():
            if world.result.violations or world.loop.complaints:
                raise Broken
            if end is not None and world.loop.time() > end:
                world.violation(f"{timeout_s:g} s after the faults: {why()}")
                raise Broken
            await asyncio.sleep(0.1)
        if world.result.violations or world.loop.complaints:
            raise Broken
