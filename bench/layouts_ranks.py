"""The processes of bench/layouts.py: first the ranks of a trainer, then those of one worker.

Each has weights of its own for every method; the trainer's take one step a turn, then each method
brings it to the worker.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as Sharded

from control import Control, run_rank
from devices import Device
from gathering import HOST, World
from heard import Heard
from shapes import Cut, Tensors, make_weights, train_step
from sharding import Holding, manifest_of_shapes, rows_of
from sparsecast import Broker, Layout, Policy, Publisher, Replica, Shard, digest

#: No single step takes so long; a process for which one does is broken.
PATIENCE_S = 60.0
NAME = "worker"
#: The methods, in the order of the first turn; the first two are runs of these names.
METHODS = ("sharded", "gathered", "dense")
#: Stages of a round of ours by the trainer's metrics.
STAGES = ("seal", "ready", "broadcast", "apply")


@dataclass(frozen=True, slots=True)
class Config:
    """What the parent asks of all ranks. `layouts` are those of the worker's ranks."""

    cut: Cut
    ranks: int
    layouts: tuple[Layout, ...]
    device: str
    rounds: int
    warmup: int
    density: float
    routing: Literal["auto", "broadcast", "all-to-all"]
    threads: int
    seed: int

    @property
    def policy(self) -> Policy:
        """Deadlines as they come; an anchor in mid-measurement would be no part of a round."""
        return Policy(anchor_every=1_000_000, routing=self.routing)


def main(control: Control, config: Config) -> Any:
    """Run a rank to its end; the first one's result is what the parent writes down."""
    torch.set_num_threads(config.threads)
    device = Device(config.device, control.rank)
    if control.rank == 0:
        return _First(control, config, device).run()
    if control.rank < config.ranks:
        return _Other(control, config, device).run()
    return _Worker(control, config, device).run()


def _store(port: int, size: int, *, first: bool) -> Any:
    stores: Any = dist  # its stubs leave the stores out
    return stores.TCPStore(HOST, port, size, first, wait_for_workers=False)


def _ms(since: float) -> float:
    return 1e3 * (time.perf_counter() - since)


def _publish(publisher: Publisher) -> tuple[Any, float]:
    """The update, and the ms of CPU that this thread has spent on it, which no other load moves."""
    began = time.thread_time()
    update = publisher.publish()
    return update, 1e3 * (time.thread_time() - began)


def _part(published: float, cpu: float, update: Any) -> dict[str, Any]:
    """What one rank has to say of its publish()."""
    return {"publish": published, "publish_cpu": cpu, "nbytes": update.nbytes}


# ---- the trainer


class _Trainer:
    """What every rank of the trainer does: its shard takes steps, is published, and gathered."""

    def __init__(self, control: Control, config: Config, device: Device) -> None:
        self.control = control
        self.config = config
        self.device = device
        self.rank = control.rank
        self.size = config.ranks + len(config.layouts)
        whole = make_weights(config.cut, config.seed, device.torch)
        self.mine: Tensors = {
            name: rows_of(tensor, config.ranks)[self.rank].clone() for name, tensor in whole.items()
        }
        #: Where the first rank gathers; of a trainer of one rank the weights themselves.
        self.full: Tensors = self.mine if config.ranks == 1 else whole if self.rank == 0 else {}
        self.random = torch.Generator(device.torch).manual_seed(config.seed + 1 + self.rank)

    def connect(self, url: str, store: Any) -> None:
        self.world = World(
            store, self.rank, self.config.ranks, len(self.config.layouts), self.device
        )
        self.publisher = Publisher(
            self.model(),
            run="sharded",
            bus=url,
            policy=self.config.policy,
            rank=self.rank,
            ranks=self.config.ranks,
        )

    def model(self) -> dict[str, Any]:
        """The shards as a trainer has them: DTensors, which say by themselves what they are."""
        if self.config.ranks == 1:
            return dict(self.mine)
        mesh = DeviceMesh.from_group(self.world.trainers, self.device.torch.type)
        return {
            name: DTensor.from_local(shard, mesh, [Sharded(0)], run_check=False)
            for name, shard in self.mine.items()
        }

    def step(self) -> None:
        train_step(self.mine, self.config.density, self.random)

    def begin(self) -> float:
        """All ranks begin at once: when that was (perf_counter)."""
        self.world.meet(self.world.trainers)
        return time.perf_counter()

    def gather(self) -> None:
        self.world.gather(self.mine, self.full)


class _Other(_Trainer):
    """A rank of the trainer that does as the first one says."""

    def run(self) -> None:
        control = self.control
        url, port = control.hear(PATIENCE_S)
        self.connect(url, _store(port, self.size, first=False))
        with self.publisher:
            while True:
                match control.hear(PATIENCE_S):
                    case ("step",):
                        self.step()
                    case ("sharded",):
                        began = self.begin()
                        update, cpu = _publish(self.publisher)
                        control.say(("published", _part(_ms(began), cpu, update)))
                    case ("gathered",) | ("dense",):
                        self.begin()
                        self.gather()
                    case ("end",):
                        break
        self.world.close()
        control.say(("end",))


class _First(_Trainer):
    """The rank that speaks for the trainer, whose clock is that of all rounds."""

    def run(self) -> dict[str, Any]:
        config, control = self.config, self.control
        with Broker() as url:
            store = _store(0, self.size, first=True)
            control.say((url, store.port))
            self.connect(url, store)
            with ExitStack() as stack:
                stack.enter_context(self.publisher)
                # As one rank would publish it by itself, however the others' patches are sent.
                alone = replace(config.policy, routing="auto")
                self.gatherer = Publisher(self.full, run="gathered", bus=url, policy=alone)
                stack.enter_context(self.gatherer)
                self.runs = {"sharded": self.publisher, "gathered": self.gatherer}
                self.heard = {name: Heard(url, name) for name in self.runs}
                for heard in self.heard.values():
                    stack.callback(heard.close)
                self._await_worker()
                turns = [self._turn(number) for number in range(config.warmup + config.rounds)]
                equal = self._compare()
                window = self.publisher.window
                control.say(("end",))
            control.answers("end", self.size - 1, PATIENCE_S)  # the broker is ours
            self.world.close()
        return {"turns": turns[config.warmup :], "window": window, "digests_equal": equal}

    def _await_worker(self) -> None:
        self.control.answers("ready", len(self.config.layouts), PATIENCE_S)
        for name, publisher in self.runs.items():
            publisher.wait_members(1, timeout_s=PATIENCE_S)
            heard = self.heard[name]
            heard.wait(lambda p=publisher: p.window, PATIENCE_S, f"the window of {name} is open")
            heard.wait_stored(0, PATIENCE_S)

    def _turn(self, number: int) -> dict[str, dict[str, Any]]:
        """One step, which every method brings to the worker; another one first each time."""
        self.control.send("progress", f"turn {number + 1}")
        self.control.say(("step",))
        self.step()
        first = number % len(METHODS)
        found = {}
        for name in (*METHODS[first:], *METHODS[:first]):
            self.control.say((name,))
            found[name] = getattr(self, f"_{name}")()
        return found

    def _sharded(self) -> dict[str, Any]:
        began = self.begin()
        update, cpu = _publish(self.publisher)
        published = _ms(began)
        self._wait_applied(update)
        whole = _ms(began)
        mine = _part(published, cpu, update)
        others = self.control.answers("published", self.config.ranks - 1, PATIENCE_S)
        parts = [mine, *others]
        return {
            "whole": whole,
            "publish": max(part["publish"] for part in parts),
            "publish_cpu": max(part["publish_cpu"] for part in parts),
            "nbytes": sum(part["nbytes"] for part in parts),
        } | self._settle("sharded", update.version)

    def _gathered(self) -> dict[str, Any]:
        began = self.begin()
        self.gather()
        gathered = _ms(began)
        update, cpu = _publish(self.gatherer)
        published = _ms(began) - gathered
        self._wait_applied(update)
        whole = _ms(began)
        return {
            "whole": whole,
            "gather": gathered,
            **_part(published, cpu, update),
        } | self._settle("gathered", update.version)

    def _dense(self) -> dict[str, Any]:
        self.control.answers("entering", len(self.config.layouts), PATIENCE_S)
        time.sleep(0.002)  # let them get from there into their receive
        began = self.begin()
        self.gather()
        gathered = _ms(began)
        self.world.broadcast(self.full)
        self.world.meet(self.world.fleet)
        return {
            "whole": _ms(began),
            "gather": gathered,
            "nbytes": sum(tensor.nbytes for tensor in self.full.values()),
            "received": sum(tensor.nbytes for tensor in self.full.values()),
        }

    def _wait_applied(self, update: Any) -> None:
        report = update.wait_applied(timeout_s=PATIENCE_S)
        if not report.complete:
            raise RuntimeError(f"version {update.version} is not on the worker: {report}")

    def _settle(self, name: str, version: int) -> dict[str, Any]:
        """Until a version is proven and stored; what the trainer says of its round, in ms, and the
        bytes that the worker's first rank has received."""
        heard = self.heard[name]
        told = heard.wait(lambda: heard.trainer(version), PATIENCE_S, f"metrics of {version}")
        worker = heard.wait(
            lambda: heard.worker(version, NAME), PATIENCE_S, f"the worker's of {version}"
        )
        heard.wait_stored(version, PATIENCE_S)
        astray = told.attempt != 1 or worker.source != "window" or not worker.verified
        return {
            **{stage: getattr(told, f"{stage}_us") / 1e3 for stage in STAGES},
            "received": worker.nbytes,
            "astray": astray,
        }

    def _compare(self) -> dict[str, bool]:
        """Whether every rank of the worker holds, of every method, its part of the weights."""
        self.control.say(("gathered",))
        self.begin()
        self.gather()
        manifest = manifest_of_shapes(self.config.cut.shapes)
        wanted = []
        for layout in self.config.layouts:
            holding = Holding(layout, manifest, self.device.torch)
            holding.take_all(self.full)
            wanted.append(digest(holding.tensors))
        self.control.say(("digest",))
        told = self.control.answers("digest", len(wanted), PATIENCE_S)
        return {name: [one[name] for one in told] == wanted for name in METHODS}


# ---- the worker


class _Worker:
    """A rank of the worker, which holds its part of the weights for each method."""

    def __init__(self, control: Control, config: Config, device: Device) -> None:
        self.control = control
        self.config = config
        self.device = device
        self.tp_rank = control.rank - config.ranks
        self.layout = config.layouts[self.tp_rank]
        manifest = manifest_of_shapes(config.cut.shapes)
        #: What dense transfers arrive in: kept, so that its first touch is not measured.
        self.full = make_weights(config.cut, config.seed, device.torch)
        self.held = {name: Holding(self.layout, manifest, device.torch) for name in METHODS}
        for holding in self.held.values():
            holding.take_all(self.full)

    def run(self) -> None:
        config, control = self.config, self.control
        url, port = control.hear(PATIENCE_S)
        tp = len(config.layouts)
        store = _store(port, config.ranks + tp, first=False)
        world = World(store, control.rank, config.ranks, tp, self.device)
        with ExitStack() as stack:
            for name in ("sharded", "gathered"):
                rank = self._rank(name, url)
                rank.start()
                stack.callback(rank.stop)
            control.say(("ready",))
            while True:
                match control.hear(PATIENCE_S):
                    case ("dense",):
                        control.say(("entering",))
                        world.broadcast(self.full, self.held["dense"].take)
                        world.meet(world.fleet)
                    case ("digest",):
                        self.device.synchronize()
                        found = {name: digest(held.tensors) for name, held in self.held.items()}
                        control.say(("digest", found))
                    case ("end",):
                        break
        world.close()
        control.say(("end",))

    def _rank(self, run: str, url: str) -> Replica | Shard:
        common: dict[str, Any] = {
            "run": run,
            "bus": url,
            "name": NAME,
            "layout": self.layout,
            "policy": self.config.policy,
        }
        tensors = self.held[run].tensors
        if self.tp_rank == 0:
            return Replica(tensors, ranks=len(self.config.layouts), **common)
        return Shard(tensors, rank=self.tp_rank, **common)


if __name__ == "__main__":
    run_rank(main)
