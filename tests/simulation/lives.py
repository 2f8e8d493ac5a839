"""The lives of the simulated processes: a trainer that publishes, a worker with its readers.

They use the product as a user does; what they see is checked at every step.
"""

import asyncio
import copy
import random
from typing import TYPE_CHECKING, Any

from sparsecast.messages.errors import (
    BusError,
    CannotResume,
    Fenced,
    LogError,
    ManifestMismatch,
    NameInUse,
    ReplicaTorn,
    RunBusy,
    WaitTimeout,
)
from sparsecast.pipeline.log.base import Log
from sparsecast.pipeline.log.directory import DirectoryLog
from sparsecast.pipeline.log.jetstream import JetStreamLog
from sparsecast.pipeline.log.tiered import TieredLog
from sparsecast.workers.driver import Ports
from sparsecast.workers.entries import PatchPayloads
from sparsecast.workers.publisher import AsyncPublisher
from sparsecast.workers.replica import Replica

from .bus import URL, SimBus
from .engine import SimEngine, fingerprint
from .loop import Process
from .plan import change

if TYPE_CHECKING:
    from .world import World

RUN = "sim"
#: Simulated threads: the torch thread, and readers from there on.
TORCH = 1


class Life:
    """What a trainer's and a worker's life have in common."""

    def __init__(self, world: "World", name: str) -> None:
        self.world = world
        self.name = name
        self.rng = random.Random(f"{world.plan.seed} {name}")
        self.process = Process(world.loop, name, clock_offset_s=self.rng.uniform(-900, 9000))
        self.tokens: list[str] = []
        self.buses: list[SimBus] = []
        self.ended = False
        self.live = False
        self.leaving = asyncio.Event()
        #: Whether another is started when this one has failed.
        self.retry = True
        self.engine: SimEngine | None = None
        #: Counts what changes the passing of time for this process.
        self.stops = 0

    @property
    def present(self) -> bool:
        """Whether the process is there, started or starting."""
        return not (self.ended or self.process.dead)

    async def ports(self) -> Ports:
        """Everything that a driver needs, simulated."""
        world, process, rng = self.world, self.process, self.rng
        if not world.broker.up:
            raise BusError("nobody listens there")
        bus, bulk = SimBus(world.broker, process), SimBus(world.broker, process)
        self.buses = [bus, bulk]
        lane = asyncio.Lock()

        async def run(function: Any, *args: Any) -> Any:
            async with lane:
                await asyncio.sleep(rng.expovariate(1 / 0.002) + 1e-5)
                if self.engine is None:
                    return function(*args)
                return await self.engine.guard().call(TORCH, lambda: function(*args))

        beside = random.Random(f"{world.plan.seed} {self.name} aside")

        async def aside(function: Any, *args: Any, timeout_s: float) -> Any:
            async with asyncio.timeout(timeout_s):
                await asyncio.sleep(beside.expovariate(1 / 0.01))
            return function(*args)

        def token() -> str:
            self.tokens.append(f"{rng.getrandbits(64):016x}")
            return self.tokens[-1]

        async def close() -> None:
            await asyncio.gather(bus.close(), bulk.close())

        return Ports(
            bus=bus,
            log=self.log(bulk),
            windows=world.fabric.factory(process),
            kinds=self.kinds(),
            clock=process.clock,
            wall=lambda: world.loop.time() + 1.7e9,
            run=run,
            aside=aside,
            token=token,
            close=close,
        )

    def log(self, bulk: SimBus) -> Log:
        """The log in the tiers that the plan says."""
        disk = self.world.disk
        tiers: dict[str, Log] = {}
        for tier in self.world.plan.tiers:
            if tier == "jetstream":
                tiers[tier] = JetStreamLog(bulk, RUN)
            else:
                threads = disk.threads(self.process)
                tiers[tier] = DirectoryLog(disk.root, RUN, self.payloads(), threads=threads)
        return next(iter(tiers.values())) if len(tiers) == 1 else TieredLog(tiers)

    def payloads(self) -> PatchPayloads:
        """What reads the log's payloads."""
        return PatchPayloads()

    def kinds(self) -> Any:
        """The kinds of window that this process can open."""
        return ("gloo", "bus")

    async def main(self) -> None:
        """Live, until leaving is set or it is over."""
        raise NotImplementedError

    async def _live(self) -> None:
        try:
            await self.main()
        except BusError as exc:
            self.world.note(self.name, "gives up", exc)
        finally:
            if not self.process.dead and not self.world.over:
                self.live = False
                self.ended = True
                self.process.kill()
                self.world.ended(self)


class TrainerLife(Life):
    """A trainer: it changes its weights, publishes, and now and then waits for its workers."""

    def __init__(self, world: "World", number: int, *, patience_s: float) -> None:
        super().__init__(world, f"trainer#{number}")
        plan = world.plan
        self.patience_s = patience_s
        lot = self.rng.random()
        if number == 1 or lot < 0.2:
            self.weights = plan.weights(random.Random(f"{plan.seed} start"))
        elif lot < 0.8 and world.checkpoints:
            self.weights = copy.deepcopy(self.rng.choice(world.checkpoints))
        else:
            self.weights = plan.weights(self.rng)
        self.initial = world.know(self.weights)
        #: What each version is, by its bits.
        self.table: dict[int, str] = {}
        #: Of what publishes: one at a time.
        self.publishing = asyncio.Lock()
        resume: Any = self.rng.choice(["auto", "auto", "auto", "must", "never"])
        self.publisher = AsyncPublisher(
            self.weights,
            run=RUN,
            bus=URL,
            dtype=plan.dtypes or None,
            policy=plan.policy,
            resume="auto" if world.healed else resume,
            linger_s=20.0,
            ports=self.ports,
        )
        self.last: Any = None

    async def main(self) -> None:
        world, loop = self.world, self.world.loop
        try:
            await self.publisher.__aenter__()
        except (RunBusy, CannotResume) as exc:
            world.note(self.name, "refused", exc)
            if isinstance(exc, CannotResume):
                world.count("not resumed")
            return
        self.live = True
        world.note(self.name, "begins at version", self.publisher.version)
        published = 0
        while not self.leaving.is_set():
            pause = world.plan.pause_s * self.rng.choice([0.0, 0.1, 1.0, 1.0, 2.0])
            if published >= world.plan.updates:
                pause += 5.0
            if pause:
                try:
                    async with asyncio.timeout(pause):
                        await self.leaving.wait()
                    break
                except TimeoutError:
                    pass
            if world.healed and self.publisher._error is None:
                await asyncio.sleep(0.1)
                continue
            try:
                await self.publish()
                if self.rng.random() < 0.1:
                    await self.rollback()
            except Fenced as exc:
                world.note(self.name, "fenced", exc)
                break
            published += 1
            if self.rng.random() < 0.2:
                try:
                    report = await self.last.wait_applied(self.rng.uniform(0.1, 3.0))
                except Fenced as exc:
                    world.note(self.name, "fenced", exc)
                    break
                world.check_report(self, report)
        began = loop.time()
        await self.publisher.close()
        if loop.time() - began > 60 and not self.stops:
            world.violation(f"{self.name} took {loop.time() - began:.1f} s to close")

    def payloads(self) -> PatchPayloads:
        """What reads the log's payloads, and stores anchors."""
        return PatchPayloads(lambda: self.publisher._outgoing.manifest)

    async def publish(self) -> None:
        """Change something, and publish it: it must take no time."""
        async with self.publishing:
            await self._publish()

    async def rollback(self) -> None:
        """Publish an old version again, if the log has it: the trainer's weights stay."""
        world, publisher = self.world, self.publisher
        async with self.publishing:
            version = publisher.version - self.rng.randint(0, 6)
            before = publisher.version
            try:
                self.last = await publisher.rollback(version)
            except (LogError, BusError) as exc:
                world.note(self.name, "no way back", exc)
                if publisher.version != before:
                    world.violation(f"{self.name}: a rollback failed, and made a version")
                return
            made = self.last.version
            was = world.bits_of(self, version)
            self.table[made] = world.states[publisher._outgoing.digest]
            if made != before + 1 or self.table[made] != was:
                world.violation(f"{self.name} went back to {version}, which was {was}, by {made}")
            world.note(self.name, "goes back to", version, "by", made)
            world.count("rolled back")

    async def _publish(self) -> None:
        world, loop = self.world, self.world.loop
        if self.rng.random() < 0.1:
            await self._fail()
        density = self.rng.choice([0.0, 0.002, 0.01, 0.01, 0.1, 0.5, 1.0])
        change(self.weights, self.rng, density)
        began, stops = loop.time(), self.stops
        version = self.publisher.version + 1
        self.last = await self.publisher.publish(step=version)
        self.table[version] = world.know(self.weights)
        if self.rng.random() < 0.3:
            world.checkpoints.append(copy.deepcopy(self.weights))
        if loop.time() != began and stops == self.stops:
            world.violation(f"{self.name}: publish() took {loop.time() - began} s")
        if self.last.version != version:
            world.violation(f"{self.name}: publish() made {self.last.version}, not {version}")
        world.note(self.name, "publishes", version, density, self.last.nbytes)
        world.published += 1
        core = self.publisher._core
        assert core is not None
        kept = len(self.publisher._outgoing._kept)
        world.kept_most = max(world.kept_most, kept)

    async def _fail(self) -> None:
        """Publish without one of the tensors: nothing is published."""
        lost = self.weights.pop("scale")
        try:
            await self.publisher.publish()
        except ManifestMismatch:
            self.world.count("publish failed")
        else:
            self.world.violation(f"{self.name} published a model that is not its manifest's")
        finally:
            self.weights["scale"] = lost


class WorkerLife(Life):
    """A worker: it follows the run, while readers hold the guard and look at the weights."""

    def __init__(self, world: "World", name: str, number: int, slot: int) -> None:
        super().__init__(world, f"{name}#{number}")
        plan = world.plan
        self.worker = name
        self.slot = slot
        #: What it follows, if it evaluates.
        self.follow = plan.evaluators.get(name)
        start = random.Random(f"{plan.seed} start") if plan.same_start else self.rng
        weights = plan.published(plan.weights(start))
        self.engine = SimEngine(self.process, weights, self.on_version)
        #: What is served: its version and its bits.
        self.served: tuple[int | None, str] = (None, fingerprint(self.engine.weights))
        #: The newest version that was served under this claim since the last resync.
        self.floor = ("", -1)
        #: The newest version held of each trainer, by its incarnation.
        self.held: dict[str, int] = {}
        self.replica = Replica(
            self.engine,
            run=RUN,
            bus=URL,
            name=name,
            role="rollout" if self.follow is None else "evaluation",
            follow=self.follow or "latest",
            policy=plan.policy,
            ports=self.ports,
        )
        self.resyncs = 0
        self.reads = 0
        self.hold_s = 0.0

    def kinds(self) -> Any:
        return self.world.plan.kinds[self.slot % len(self.world.plan.kinds)]

    # ---- what is seen

    def on_version(self, version: int | None) -> None:
        """The version that readers see has flipped."""
        world, engine = self.world, self.engine
        if engine is None or version is None:
            return
        bits = fingerprint(engine.weights)
        origins = [trainer for trainer in world.trainers if trainer.table.get(version) == bits]
        if not origins:
            world.violation(
                f"{self.name} serves as version {version} what no trainer published as that"
            )
        staged = self.replica._incoming._staged.get(version)
        # An anchor is what was published, announced or not.
        if staged is not None and staged.base_version is not None:
            takers = [trainer.tokens[0] for trainer in origins]
            if not any((taker, version) in world.announced for taker in takers):
                world.violation(f"{self.name} serves version {version}, which was not announced")
        self.served = (version, bits)
        for trainer in origins:
            if trainer.tokens:
                incarnation = trainer.tokens[0]
                self.held[incarnation] = max(self.held.get(incarnation, -1), version)
        core = self.replica._core
        claim = core.claim if core is not None else None
        if core is not None and core._lane.to_prove:
            claim = None  # it was begun under the claim before
        under = f"{claim.epoch} of {claim.sender.incarnation}" if claim is not None else ""
        if under == self.floor[0] and version < self.floor[1]:
            world.violation(
                f"{self.name} went from version {self.floor[1]} back to {version} in epoch {under}"
            )
        self.floor = (under, version)

    def _meant(self, trainer: TrainerLife, version: int) -> str | None:
        """What this version has to be to it: what it follows may be of an earlier epoch."""
        if self.replica.follow.pinned is not None:
            return self.world.bits_of(trainer, version)
        return trainer.table.get(version)

    def settled(self, trainer: TrainerLife) -> bool:
        """Whether it holds what it should, once nothing more is published."""
        replica, core = self.replica, self.replica._core
        if not self.live or core is None or core._lane.applying is not None:
            return False
        wanted = core.goal
        if replica.follow.pinned is not None and (wanted is None or core.version != wanted):
            # Not announced yet, or not in the log any more: it says so.
            return replica.refusal() is not None
        return (
            wanted is not None
            and replica.version is not None
            and (self.follow is not None or wanted == trainer.publisher.version)
            and replica.verified == replica.version
            and replica.version >= wanted
            and replica.refusal() is None
            and self.served[1] == self._meant(trainer, replica.version)
        )

    def on_resync(self) -> None:
        """The replica says that it starts again."""
        self.resyncs += 1
        self.floor = ("", -1)

    def check(self) -> None:
        """After every event: what the core believes of the weights must be so."""
        core, engine, world = self.replica._core, self.engine, self.world
        if core is None or engine is None or core.claim is None:
            return
        incoming = self.replica._incoming
        staged = sum(patch.nbytes for patch in incoming._staged.values())
        most = 2 * world.plan.policy.staging_nbytes + 2 * world.largest
        if staged > most:
            world.violation(f"{self.name} has {staged} bytes in staging, {most} are the bound")
        if core.mismatches:
            world.violation(f"{self.name}: a digest was not the announced one")
        lane = core._lane
        if core.version is None or lane.applying is not None or lane.to_prove:
            return
        incarnation = core.claim.sender.incarnation
        self.held[incarnation] = max(self.held.get(incarnation, -1), core.version)
        trainer = world.trainer_of(incarnation)
        bits = fingerprint(engine.weights)
        if trainer is not None and self._meant(trainer, core.version) != bits:
            world.violation(
                f"{self.name} believes that it holds version {core.version} of {trainer.name}, "
                "and holds other bits"
            )

    async def _read(self, thread: int) -> None:
        guard = self.engine.guard() if self.engine else None
        assert guard is not None
        assert self.engine is not None
        world = self.world
        while True:
            await asyncio.sleep(self.rng.expovariate(1 / 0.7))
            hold_s, self.hold_s = self.hold_s or self.rng.expovariate(1 / 0.05), 0.0

            def enter() -> Any:
                holding = guard.reading(timeout_s=3.0)
                return holding, holding.__enter__()

            try:
                holding, version = await guard.call(thread, enter)
            except (ReplicaTorn, WaitTimeout):
                continue
            self.reads += 1
            served = self.served
            if (version, fingerprint(self.engine.weights)) != served:
                world.violation(
                    f"a reader of {self.name} saw bits that are not version {version} as served"
                )
            await asyncio.sleep(hold_s)
            if fingerprint(self.engine.weights) != served[1]:
                world.violation(f"the weights of {self.name} changed under a reader")
            holding.__exit__(None, None, None)

    # ---- life

    async def main(self) -> None:
        world = self.world
        await self.replica.__aenter__()
        self.live = True
        world.note(self.name, "begins")
        readers = [asyncio.ensure_future(self._read(TORCH + 1 + n)) for n in range(2)]
        failed = asyncio.ensure_future(self.replica.failed())
        leaving = asyncio.ensure_future(self.leaving.wait())
        await asyncio.wait({failed, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if failed.done():
            error = failed.result()
            world.note(self.name, "failed", error)
            if not isinstance(error, NameInUse):
                world.violation(f"{self.name} failed: {error!r}")
        for task in (*readers, failed, leaving):
            task.cancel()
        await asyncio.gather(*readers, failed, leaving, return_exceptions=True)
        began = world.loop.time()
        await self.replica.close()
        if world.loop.time() - began > 30 and not self.stops:
            world.violation(f"{self.name} took {world.loop.time() - began:.1f} s to close")
