"""One process of the bench: rank 0 trains and times, the others are workers."""

from __future__ import annotations

import itertools
import socket
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch

import baselines
import collectives
import ours
from control import Control, go_first, run_rank
from devices import Device
from link import serve_sample, take_sample
from ours import Ear, Round
from shapes import Cut, Tensors, make_weights, train_step
from sparsecast import Broker, Policy, Publisher, Replica, digest
from sparsecast.pipeline.delta import Shadow

RUN = "bench"
OURS = "sparsecast"
#: Nothing in a round takes so long; a process that does is broken.
PATIENCE_S = 120.0
#: Storing a full copy of 15 GB takes its time, before the first round or after a large one.
STORE_S = 600.0
_ANSWERS = 20
_PLAIN = 10


@dataclass(frozen=True, slots=True)
class Config:
    """What the parent asks of all ranks. `addresses`: where each rank listens.

    `ways` are the methods beside ours: "host" over gloo, "device" as between GPUs. A density ends
    after `rounds` measured rounds, or after the first one that is behind its `seconds`.
    """

    cut: Cut
    device: Literal["cpu", "cuda"]
    ways: Literal["host", "device"]
    workers: int
    rounds: int
    warmup: int
    seconds: float
    densities: tuple[float, ...]
    diff_rounds: int
    threads: int
    seed: int
    window: str
    staging_nbytes: int | None
    first: bool
    addresses: tuple[str, ...]

    @property
    def backend(self) -> str:
        """What carries the methods beside ours."""
        return "nccl" if self.device == "cuda" else "gloo"


def main(control: Control, config: Config) -> Any:
    """Run a rank to its end; the trainer's result is the measurement."""
    if config.first:
        go_first()
    torch.set_num_threads(config.threads)
    device = Device(config.device, control.rank)
    if control.rank:
        return _Worker(control, config, device).run()
    return _Trainer(control, config, device).run()


def _beside(
    config: Config,
    stack: ExitStack,
    group: baselines.Group,
    device: Device,
    held: Tensors | dict[str, Tensors],
    *,
    trainer: bool,
) -> tuple[dict[str, baselines.Method], dict[str, int], collectives.World | None]:
    """The methods beside ours, connected, and how many bytes each holds beside the weights."""
    world: Any = group
    makers = baselines.METHODS
    if config.ways == "device":
        world = collectives.World(group, device, backend=config.backend)
        makers = collectives.METHODS
        stack.callback(world.close)
    world.open()
    methods, nbytes = {}, {}
    for name, make in makers.items():
        before = device.allocated
        tensors: Any = held if trainer else held[name]
        methods[name] = make(world, tensors, trainer=trainer)
        nbytes[name] = device.allocated - before
    return methods, nbytes, world if config.ways == "device" else None


# ---- the trainer


class _Trainer:
    def __init__(self, control: Control, config: Config, device: Device) -> None:
        self._control = control
        self._config = config
        self._device = device
        self._random = torch.Generator(device.torch).manual_seed(config.seed + 1)
        self._turn = itertools.count()

    def run(self) -> dict[str, Any]:
        config, device = self._config, self._device
        own = config.addresses[0]
        with ExitStack() as stack:
            url = stack.enter_context(Broker(host=own))
            group = baselines.Group(
                0, config.workers + 1, own=own, trainer=own, port=0, timeout_s=PATIENCE_S
            )
            listener = stack.enter_context(socket.create_server((own, 0)))
            self._control.say((url, group.port, listener.getsockname()[1]))
            sample = serve_sample(listener) if config.ways == "host" else None
            self._tell("making the weights")
            self._weights = make_weights(config.cut, config.seed, device.torch)
            self._methods, held, self._world = _beside(
                config, stack, group, device, self._weights, trainer=True
            )
            before = device.allocated
            self._publisher = stack.enter_context(
                Publisher(self._weights, run=RUN, bus=url, policy=_policy(config))
            )
            self._ear = Ear(url, RUN, patience_s=PATIENCE_S, store_s=STORE_S)
            stack.callback(self._ear.close)
            self._tell("waiting for the workers")
            theirs = self._answers("ready")
            self._publisher.wait_members(config.workers, timeout_s=PATIENCE_S)
            self._tell("waiting for the first full copy in the log")
            self._ear.wait_stored(0)
            self._wait_window()
            # Not before: until the log has it, the full copy is in the device's memory.
            held[OURS] = device.allocated - before
            result: dict[str, Any] = {
                "link": sample,
                "densities": [self._measure(density) for density in config.densities],
                "window": self._publisher.window,
            }
            if config.ways == "host":
                result["diff"] = [self._measure_diff(density) for density in config.densities]
            else:
                result["answer_ms"] = [self._answer() for _ in range(_ANSWERS)]
            if config.device == "cuda":
                worst = {name: max(one.get(name, 0) for one in theirs) for name in held}
                result["held"] = {"trainer": held, "worker": worst}
            self._control.say(("end",))
            self._answers("end")
        return result

    def _wait_window(self) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while self._publisher.window is None:
            if time.monotonic() > deadline:
                raise TimeoutError("no window was opened")
            time.sleep(0.01)

    # ---- rounds

    def _measure(self, density: float) -> dict[str, Any]:
        config = self._config
        rounds: dict[str, list[Round]] = {name: [] for name in (OURS, *self._methods)}
        end = time.monotonic() + config.seconds
        for number in range(-config.warmup, config.rounds):
            late = time.monotonic() > end
            if number > 0 and late:
                break
            if -config.warmup < number < 0 and late:
                continue
            train_step(self._weights, density, self._random)
            names = list(rounds)
            turn = next(self._turn) % len(names)
            for name in names[turn:] + names[:turn]:
                self._tell(f"{density:.3%} changed: round {number + 1} of {config.rounds}, {name}")
                self._device.synchronize()
                done = self._ours() if name == OURS else self._baseline(name)
                if number >= 0:
                    rounds[name].append(done)
        measured = {"density": density, "rounds": rounds, "digests": self._digests()}
        measured["window"] = self._publisher.window
        if config.ways == "device":
            measured["plain_ms"] = self._plain(round(rounds[OURS][-1]["nbytes"]))
        self._control.send("progress", measured)
        return measured

    def _ours(self) -> Round:
        workers = self._config.workers
        if self._config.device != "cuda":
            return ours.measure(self._publisher, self._ear, workers, patience_s=PATIENCE_S)
        self._control.say(("watch",))
        self._device.wake()
        self._answers("watching")
        self._device.watch()
        done = ours.measure(self._publisher, self._ear, workers, patience_s=PATIENCE_S)
        self._control.say(("peak",))
        return done | {
            "peak_trainer": self._device.peak(),
            "peak_worker": max(self._answers("peak")),
        }

    def _baseline(self, name: str) -> Round:
        self._control.say(("round", name))
        self._device.wake()
        self._answers("entering")
        # The workers said so just before their first receive: let them get there.
        time.sleep(0.002)
        method = self._methods[name]
        self._device.watch()
        began = time.perf_counter()
        parts = method.send()
        whole = 1e3 * (time.perf_counter() - began)
        answers = self._answers(name)
        theirs = [parts for parts, _ in answers]
        worker = {f"worker_{part}": max(t[part] for t in theirs) for part in theirs[0]}
        done = {"whole": whole, "nbytes": method.nbytes} | parts | worker
        if self._config.device == "cuda":
            self._device.synchronize()
            done["peak_trainer"] = self._device.peak()
            done["peak_worker"] = max(peak for _, peak in answers)
        return done

    def _digests(self) -> dict[str, bool]:
        """For each method, whether every worker's weights are the trainer's."""
        mine = digest(self._weights)
        self._control.say(("digest",))
        theirs = self._answers("digest")
        return {name: all(t[name] == mine for t in theirs) for name in theirs[0]}

    def _plain(self, nbytes: int) -> list[float]:
        """ms of plain broadcasts of so many bytes, by the slowest worker's device."""
        assert self._world is not None
        self._control.say(("plain", nbytes))
        collectives.Plain(self._world).times(nbytes, _PLAIN)
        return max(self._answers("plain"), key=lambda times: sorted(times)[len(times) // 2])

    def _answer(self) -> float:
        """ms of a round with nothing in it: what the answers cost every method beside ours."""
        assert self._world is not None
        self._control.say(("answer",))
        self._answers("entering")
        time.sleep(0.002)
        began = time.perf_counter()
        self._world.gather_acks()
        return 1e3 * (time.perf_counter() - began)

    # ---- the diff alone

    def _measure_diff(self, density: float) -> dict[str, Any]:
        """Shadow.diff and torch's `!=` over the same bytes, taking turns to be first."""
        peers = self._methods["peers"]
        assert isinstance(peers, baselines.Peers)
        shadow = Shadow(self._weights)
        old, now = peers.old, [t.view(torch.int16).view(-1) for t in self._weights.values()]
        times: dict[str, list[float]] = {"diff": [], "not_equal": []}
        for number in range(-self._config.warmup, self._config.diff_rounds):
            for before, after in zip(old, now, strict=True):
                before.copy_(after)
            train_step(self._weights, density, self._random)
            for name in ("diff", "not_equal") if number % 2 else ("not_equal", "diff"):
                began = time.perf_counter()
                if name == "diff":
                    version = number + self._config.warmup
                    shadow.diff(self._weights, base_version=version, version=version + 1)
                else:
                    for before, after in zip(old, now, strict=True):
                        torch.ne(before, after)
                took = 1e3 * (time.perf_counter() - began)
                if number >= 0:
                    times[name].append(took)
            self._tell(f"{density:.3%} changed: diff {number + 1} of {self._config.diff_rounds}")
        return {"density": density, "times": times}

    def _answers(self, expected: str) -> list[Any]:
        """One answer of every worker."""
        return self._control.answers(expected, self._config.workers, PATIENCE_S)

    def _tell(self, what: str) -> None:
        self._control.send("progress", what)


# ---- a worker


class _Worker:
    def __init__(self, control: Control, config: Config, device: Device) -> None:
        self._control = control
        self._config = config
        self._device = device

    def run(self) -> None:
        config, rank, device = self._config, self._control.rank, self._device
        own, trainer = config.addresses[rank], config.addresses[0]
        url, port, sample_port = self._control.hear(PATIENCE_S)
        if rank == 1 and config.ways == "host":
            take_sample(trainer, sample_port)
        held = self._copies(make_weights(config.cut, config.seed, device.torch))
        group = baselines.Group(
            rank, config.workers + 1, own=own, trainer=trainer, port=port, timeout_s=PATIENCE_S
        )
        with ExitStack() as stack:
            methods, beside, world = _beside(config, stack, group, device, held, trainer=False)
            replica = Replica(
                held[OURS], run=RUN, bus=url, name=f"worker-{rank - 1}", policy=_policy(config)
            )
            replica.start()
            stack.callback(replica.stop)
            self._control.say(("ready", beside))
            self._serve(methods, held, world)
        self._control.say(("end",))

    def _serve(
        self,
        methods: dict[str, baselines.Method],
        held: dict[str, Tensors],
        world: collectives.World | None,
    ) -> None:
        device, say = self._device, self._control.say
        while True:
            match self._control.hear(STORE_S + PATIENCE_S):
                case ("round", name):
                    device.wake()
                    device.watch()
                    say(("entering",))
                    say((name, (methods[name].receive(), device.peak())))
                case ("watch",):
                    device.wake()
                    device.watch()
                    say(("watching",))
                case ("peak",):
                    say(("peak", device.peak()))
                case ("answer",):
                    assert world is not None
                    say(("entering",))
                    world.acknowledge()
                case ("plain", nbytes):
                    assert world is not None
                    say(("plain", collectives.Plain(world).times(nbytes, _PLAIN)))
                case ("digest",):
                    device.synchronize()
                    say(("digest", _digests(held)))
                case ("end",):
                    return

    def _copies(self, start: Tensors) -> dict[str, Tensors]:
        """Weights of its own for every method, or the same ones for those that share."""
        device_ways = self._config.ways == "device"
        names = collectives.METHODS if device_ways else baselines.METHODS
        shared = collectives.SHARED if device_ways else {}
        held = {OURS: start}
        for name in names:
            if name not in shared:
                held[name] = {key: tensor.clone() for key, tensor in start.items()}
        return held | {name: held[other] for name, other in shared.items()}


def _digests(held: dict[str, Tensors]) -> dict[str, int]:
    """By method; weights that several share are read once."""
    found: dict[int, int] = {}
    for tensors in held.values():
        if id(tensors) not in found:
            found[id(tensors)] = digest(tensors)
    return {name: found[id(tensors)] for name, tensors in held.items()}


def _policy(config: Config) -> Policy:
    chosen: dict[str, Any] = {"window": config.window}
    if config.device == "cuda":
        # Of a large model each full copy fills gigabytes of the log: one, and time for it.
        chosen |= {"store_s": STORE_S, "anchor_every": 1_000_000}
    if config.staging_nbytes is not None:
        chosen["staging_nbytes"] = chosen["staging_device_nbytes"] = config.staging_nbytes
    return Policy(**chosen)


if __name__ == "__main__":
    run_rank(main)
