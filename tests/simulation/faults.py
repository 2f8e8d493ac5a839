"""What each kind of fault does to a world. Every one ends by itself, or when the world heals."""

import asyncio
from typing import TYPE_CHECKING

from .lives import Life, WorkerLife
from .plan import Fault
from .windows import Faults

if TYPE_CHECKING:
    from .world import World


def pick(lives: list[Life], where: float) -> Life | None:
    """One of them, or None of none."""
    return lives[int(where * len(lives))] if lives else None


async def happen(world: "World", fault: Fault) -> None:
    """Do it; returns when it is over."""
    workers: list[Life] = [life for life in world.workers if life.present]
    trainers: list[Life] = [life for life in world.trainers if life.present]
    worker, trainer = pick(workers, fault.where), pick(trainers[-1:], 0.0)
    anyone = pick(trainers + workers, fault.where)
    world.note("fault", fault.kind, f"for {fault.for_s:.2f} s", f"at {fault.where:.3f}")
    world.count(fault.kind)
    match fault.kind:
        case "cut":
            if anyone is not None:
                for bus in anyone.buses:
                    bus.cut(min(fault.for_s, 12.0))
        case "stall":
            if anyone is not None:
                for bus in anyone.buses:
                    bus.stall(min(fault.for_s, 8.0))
        case "broker restarts" | "broker forgets":
            if world.broker.up:
                world.broker.stop(keep_store=fault.kind == "broker restarts")
                await asyncio.sleep(min(fault.for_s, 6.0))
                world.broker.start()
        case "trainer killed":
            if trainer is not None:
                world.kill(trainer)
                world.start_trainer(delay_s=fault.for_s / 4)
        case "trainer frozen":
            if trainer is not None:
                await world.freeze(trainer, fault.for_s * 2)
        case "second trainer":
            if trainer is not None:
                world.start_trainer(delay_s=0.5, patience_s=15.0)
                await world.freeze(trainer, fault.for_s * 4)
        case "worker killed":
            if isinstance(worker, WorkerLife):
                world.kill(worker)
                world.start_worker(worker.worker, worker.slot, delay_s=fault.for_s / 4)
        case "worker frozen":
            if worker is not None:
                await world.freeze(worker, fault.for_s * 2)
        case "worker leaves":
            if worker is not None and len(workers) > 1:
                worker.leaving.set()
        case "worker joins":
            slot = len(world.workers)
            world.start_worker(f"late{slot}", slot, delay_s=0.0)
        case "name taken":
            if isinstance(worker, WorkerLife):
                world.start_worker(worker.worker, worker.slot, delay_s=0.0, retry=False)
        case "storm":
            broker = world.broker
            storm = 0.3 * fault.where
            broker.loss, broker.doubles, broker.deaf = storm, storm / 2, storm / 4
            broker.latency_s = 0.0003 * 10 ** (3 * fault.where)
            await asyncio.sleep(fault.for_s)
            world.calm()
        case "answers lost":
            world.broker.deaf = 0.1 + 0.5 * fault.where
            await asyncio.sleep(fault.for_s * 2)
            world.broker.deaf = 0.0
        case "window weather":
            share = 0.1 + 0.5 * fault.where
            names = ["open_fails", "open_hangs", "send_fails", "send_hangs", "loses", "breaks"]
            chosen = world.rng.sample([*names, "flips", "flips"], k=world.rng.randint(1, 4))
            for name in chosen:
                setattr(world.fabric.faults, name, share)
            await asyncio.sleep(fault.for_s * 2)
            world.fabric.faults = Faults(notices=world.fabric.faults.notices)
        case "log refuses":
            world.broker.full = lambda stream: stream.endswith("-log")
            await asyncio.sleep(fault.for_s * 2)
            world.broker.full = lambda stream: False
        case "disk full":
            world.disk.full = True
            await asyncio.sleep(fault.for_s * 2)
            world.disk.full = False
        case "disk hangs":
            world.disk.hang()
            await asyncio.sleep(fault.for_s)
            world.disk.release()
        case "disk lost":
            world.disk.lose()
            await asyncio.sleep(fault.for_s)
            world.disk.find()
        case "file damaged":
            if world.disk.damage(fault.where):
                world.count("files damaged")
        case "long reader":
            if isinstance(worker, WorkerLife):
                worker.hold_s = min(fault.for_s * 2, 12.0)
        case "engine fails":
            if isinstance(worker, WorkerLife) and worker.engine is not None:
                worker.engine.fail_next = True
        case "storage moves":
            if isinstance(worker, WorkerLife) and worker.engine is not None:
                worker.engine.move()
        case "clock jumps":
            if anyone is not None:
                anyone.process.clock_offset_s += 10.0**fault.where * fault.for_s
        case _:
            raise AssertionError(fault.kind)
