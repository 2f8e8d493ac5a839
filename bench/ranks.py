"""One process of the bench: rank 0 trains and times, the others are workers."""

from __future__ import annotations

import itertools
import socket
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

import baselines
from control import Control, go_first, run_rank
from link import serve_sample, take_sample
from shapes import Cut, Tensors, make_weights, train_step
from sparsecast import Broker, Policy, Publisher, Replica, digest
from sparsecast.messages import codec
from sparsecast.messages.metrics import Metric, TrainerMetrics, WorkerMetrics
from sparsecast.messages.subjects import Subjects
from sparsecast.pipeline.bus.nats import NatsBus, connect
from sparsecast.pipeline.delta import Shadow
from sparsecast.pipeline.log.jetstream import JetStreamLog
from sparsecast.workers.connect import LoopThread

RUN = "bench"
OURS = "sparsecast"
#: Nothing in a round takes so long; a process that does is broken.
PATIENCE_S = 120.0

Round = dict[str, float]


@dataclass(frozen=True, slots=True)
class Config:
    """What the parent asks of all ranks. `addresses`: where each rank listens."""

    cut: Cut
    workers: int
    rounds: int
    warmup: int
    densities: tuple[float, ...]
    diff_rounds: int
    threads: int
    seed: int
    window: str
    first: bool
    addresses: tuple[str, ...]


def main(control: Control, config: Config) -> Any:
    """Run a rank to its end; the trainer's result is the measurement."""
    if config.first:
        go_first()
    torch.set_num_threads(config.threads)
    if control.rank:
        return _Worker(control, config).run()
    return _Trainer(control, config).run()


# ---- the trainer


class _Ear:
    """Hears the run's metrics and looks into its log, on a loop and connection of its own."""

    def __init__(self, url: str) -> None:
        self._thread = LoopThread("bench-ear")
        self._heard: list[Metric] = []
        self._news = threading.Condition()
        self._bus: NatsBus = self._thread.call(connect(url, name="bench", timeout_s=5))
        self._log = JetStreamLog(self._bus, RUN)
        self._thread.call(self._bus.subscribe(Subjects(RUN).metrics_all, self._hear))

    def _hear(self, message: Any) -> None:
        metric = codec.decode_metric(message.data, subject=message.subject)
        with self._news:
            self._heard.append(metric)
            self._news.notify_all()

    def round(self, version: int, workers: int) -> tuple[TrainerMetrics, list[WorkerMetrics]]:
        """What the trainer and every worker said of a version; then it forgets all."""

        def here() -> list[Metric]:
            return [
                m
                for m in self._heard
                if isinstance(m, TrainerMetrics | WorkerMetrics) and m.version == version
            ]

        with self._news:
            if not self._news.wait_for(lambda: len(here()) > workers, PATIENCE_S):
                raise TimeoutError(f"version {version} was not told whole: {here()}")
            found = here()
            self._heard.clear()
        (trainer,) = (m for m in found if isinstance(m, TrainerMetrics))
        return trainer, [m for m in found if isinstance(m, WorkerMetrics)]

    def wait_stored(self, version: int) -> None:
        """Until the log holds a version, so that storing it disturbs no other method."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            entries = self._thread.call(self._log.entries(timeout_s=5))
            if any(entry.version >= version for entry in entries):
                return
            time.sleep(0.01)
        raise TimeoutError(f"version {version} is not in the log")

    def close(self) -> None:
        """Leave the bus."""
        self._thread.call(self._bus.close())
        self._thread.stop()


class _Trainer:
    def __init__(self, control: Control, config: Config) -> None:
        self._control = control
        self._config = config
        self._random = torch.Generator().manual_seed(config.seed + 1)
        self._turn = itertools.count()

    def run(self) -> dict[str, Any]:
        config = self._config
        own = config.addresses[0]
        with ExitStack() as stack:
            url = stack.enter_context(Broker(host=own))
            group = baselines.Group(
                0, config.workers + 1, own=own, trainer=own, port=0, timeout_s=PATIENCE_S
            )
            listener = stack.enter_context(socket.create_server((own, 0)))
            self._control.say((url, group.port, listener.getsockname()[1]))
            sample = serve_sample(listener)
            self._tell("making the weights")
            self._weights = make_weights(config.cut, config.seed)
            group.open()
            self._methods: dict[str, baselines.Method] = {
                "dense": baselines.Dense(group, self._weights),
                "dense_safe": baselines.DenseSafe(group, self._weights),
                "peers": baselines.Peers(group, self._weights, trainer=True),
            }
            self._publisher = stack.enter_context(
                Publisher(self._weights, run=RUN, bus=url, policy=_policy(config))
            )
            self._ear = _Ear(url)
            stack.callback(self._ear.close)
            self._answers("ready")
            self._publisher.wait_members(config.workers, timeout_s=PATIENCE_S)
            self._ear.wait_stored(0)
            self._wait_window()
            densities = [self._measure(density) for density in config.densities]
            result = {
                "link": sample,
                "densities": densities,
                "window": self._publisher.window,
                "diff": [self._measure_diff(density) for density in config.densities],
            }
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
        for number in range(-config.warmup, config.rounds):
            train_step(self._weights, density, self._random)
            names = list(rounds)
            turn = next(self._turn) % len(names)
            for name in names[turn:] + names[:turn]:
                done = self._ours() if name == OURS else self._baseline(name)
                if number >= 0:
                    rounds[name].append(done)
            self._tell(f"{density:.3%} changed: round {number + 1} of {config.rounds}")
        return {"density": density, "rounds": rounds, "digests": self._digests()}

    def _ours(self) -> Round:
        began = time.perf_counter()
        update = self._publisher.publish()
        returned = time.perf_counter()
        report = update.wait_applied(timeout_s=PATIENCE_S)
        whole = 1e3 * (time.perf_counter() - began)
        if not report.complete or len(report.applied) != self._config.workers:
            raise RuntimeError(f"version {update.version} is not everywhere: {report}")
        told, workers = self._ear.round(update.version, self._config.workers)
        self._ear.wait_stored(update.version)
        if told.verified != self._config.workers:
            raise RuntimeError(f"version {update.version} was not proven everywhere: {told}")
        announce_us = told.announce_us - told.seal_us
        return {
            "whole": whole,
            "publish": 1e3 * (returned - began),
            "wire_apply": (told.broadcast_us + told.apply_us) / 1e3,
            "bus": (announce_us + told.ready_us) / 1e3,
            "stage_diff": told.diff_us / 1e3,
            "stage_encode": told.encode_us / 1e3,
            "stage_seal": (told.seal_us - told.diff_us - told.encode_us) / 1e3,
            "stage_announce": announce_us / 1e3,
            "stage_ready": told.ready_us / 1e3,
            "stage_broadcast": told.broadcast_us / 1e3,
            "stage_apply": told.apply_us / 1e3,
            "after_verify": told.verify_us / 1e3,
            "worker_receive": max(w.receive_us for w in workers) / 1e3,
            "worker_check": max(w.check_us for w in workers) / 1e3,
            "worker_staged_to_applied": max(w.staged_us for w in workers) / 1e3,
            "worker_apply": max(w.apply_us for w in workers) / 1e3,
            "worker_verify": max(w.verify_us for w in workers) / 1e3,
            "changed": update.changed,
            "nbytes": update.nbytes,
            "by_window": float(all(w.source == "window" for w in workers)),
            "attempt": told.attempt,
        }

    def _baseline(self, name: str) -> Round:
        self._control.say(("round", name))
        self._answers("entering")
        # The workers said so just before their first receive: let them get there.
        time.sleep(0.002)
        method = self._methods[name]
        began = time.perf_counter()
        parts = method.send()
        whole = 1e3 * (time.perf_counter() - began)
        theirs = self._answers(name)
        worker = {f"worker_{part}": max(t[part] for t in theirs) for part in theirs[0]}
        return {"whole": whole, "nbytes": method.nbytes} | parts | worker

    def _digests(self) -> dict[str, bool]:
        """For each method, whether every worker's weights are the trainer's."""
        mine = digest(self._weights)
        self._control.say(("digest",))
        theirs = self._answers("digest")
        return {name: all(t[name] == mine for t in theirs) for name in theirs[0]}

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
        found = []
        for _ in range(self._config.workers):
            rank, (kind, *rest) = self._control.hear(PATIENCE_S)
            if kind != expected:
                raise RuntimeError(f"rank {rank} says {kind}, expected was {expected}")
            found.append(rest[0] if rest else None)
        return found

    def _tell(self, what: str) -> None:
        self._control.send("progress", what)


# ---- a worker


class _Worker:
    def __init__(self, control: Control, config: Config) -> None:
        self._control = control
        self._config = config

    def run(self) -> None:
        config, rank = self._config, self._control.rank
        own, trainer = config.addresses[rank], config.addresses[0]
        url, port, sample_port = self._control.hear(PATIENCE_S)
        if rank == 1:
            take_sample(trainer, sample_port)
        start = make_weights(config.cut, config.seed)
        held: dict[str, Tensors] = {OURS: start}
        for name in ("dense", "dense_safe", "peers"):
            held[name] = {key: tensor.clone() for key, tensor in start.items()}
        group = baselines.Group(
            rank, config.workers + 1, own=own, trainer=trainer, port=port, timeout_s=PATIENCE_S
        )
        group.open()
        methods: dict[str, baselines.Method] = {
            "dense": baselines.Dense(group, held["dense"]),
            "dense_safe": baselines.DenseSafe(group, held["dense_safe"]),
            "peers": baselines.Peers(group, held["peers"], trainer=False),
        }
        replica = Replica(
            held[OURS], run=RUN, bus=url, name=f"worker-{rank - 1}", policy=_policy(config)
        )
        replica.start()
        try:
            self._control.say(("ready",))
            while True:
                match self._control.hear(10 * PATIENCE_S):
                    case ("round", name):
                        self._control.say(("entering",))
                        self._control.say((name, methods[name].receive()))
                    case ("digest",):
                        found = {name: digest(tensors) for name, tensors in held.items()}
                        self._control.say(("digest", found))
                    case ("end",):
                        break
        finally:
            replica.stop()
        self._control.say(("end",))


def _policy(config: Config) -> Policy:
    return Policy(window=config.window)  # type: ignore[arg-type]  # argparse has checked it


if __name__ == "__main__":
    run_rank(main)
