"""The processes of bench/scaling.py: a trainer, and hosts that have many light workers each."""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from control import Control, run_rank
from heard import Heard
from shapes import TINY, Cut, make_weights, train_step
from sparsecast import Broker, Policy, Publisher, Replica, digest
from sparsecast.messages.control import WindowKind
from stats import cpu_s

#: No single step takes so long; a process for which one does is broken.
PATIENCE_S = 60.0
#: Rounds before anything is measured.
WARMUP = 5
#: Where a trainer is left alone with its members' heartbeats.
IDLE_S = 1.0


@dataclass(frozen=True, slots=True)
class Config:
    """What the parent asks of all ranks. Workers are spread over the hosts, ranks 1 and up."""

    workers: tuple[int, ...]
    hosts: int
    rounds: int
    elements: int
    density: float
    window: WindowKind
    threads: int
    seed: int

    @property
    def cut(self) -> Cut:
        """The model of every worker."""
        return Cut.of_elements(self.elements, TINY)

    @property
    def policy(self) -> Policy:
        """Deadlines as they come, but for openings: many processes' worth of ranks in one."""
        return Policy(window=self.window, open_s=20.0, anchor_every=1_000_000)


def main(control: Control, config: Config) -> Any:
    """Run a rank to its end; the trainer's result is what the parent writes down."""
    torch.set_num_threads(config.threads)
    if control.rank:
        return _Host(control, config).run()
    return _Trainer(control, config).run()


class _Trainer:
    def __init__(self, control: Control, config: Config) -> None:
        self._control = control
        self._config = config
        self._broker = Broker()

    def run(self) -> list[dict[str, Any]]:
        with self._broker as url:
            self._control.say(url)
            self._hosts = self._answers("pid")
            found = [self._workers(url, n) for n in self._config.workers]
            self._control.say(("end",))
            self._answers("end")
        return found

    def _workers(self, url: str, n: int) -> dict[str, Any]:
        """A run of its own with `n` workers."""
        config = self._config
        self._control.send("progress", f"{n} worker(s): joining")
        weights = make_weights(config.cut, config.seed)
        random = torch.Generator().manual_seed(config.seed + 1)
        run = f"scaling-{n}"
        with ExitStack() as stack:
            publisher = stack.enter_context(
                Publisher(weights, run=run, bus=url, policy=config.policy)
            )
            heard = Heard(url, run, workers=False)
            stack.callback(heard.close)
            began = time.perf_counter()
            self._control.say(("join", run, n))
            self._answers("joined")
            publisher.wait_members(n, timeout_s=PATIENCE_S)
            joined = time.perf_counter() - began
            rounds = []
            short = 0
            while len(rounds) < WARMUP + config.rounds:
                train_step(weights, config.density, random)
                done = self._round(publisher, heard)
                if done["members"] == n and done["transport"] == config.window:
                    rounds.append(done)
                elif not rounds and time.perf_counter() - began < PATIENCE_S:
                    time.sleep(0.1)  # the window of all of them is not open yet
                else:
                    short += 1
                    if short > config.rounds:
                        raise RuntimeError(f"{n} workers do not stay in one window: {done}")
                self._control.send("progress", f"{n} worker(s): round {len(rounds)}")
            idle, idle_broker = time.process_time(), cpu_s(self._broker.pid)
            time.sleep(IDLE_S)
            idle = time.process_time() - idle
            idle_broker = cpu_s(self._broker.pid) - idle_broker
            mine = digest(weights)
            self._control.say(("digest",))
            theirs = [one for host in self._answers("digest") for one in host]
            self._control.say(("leave",))
            self._answers("left")
        return {
            "workers": n,
            "joined_s": joined,
            "rounds": rounds[WARMUP:],
            "short": short,
            "idle_cpu_ms_a_s": 1e3 * idle / IDLE_S,
            "idle_broker_cpu_ms_a_s": 1e3 * idle_broker / IDLE_S,
            "digests_equal": theirs == [mine] * n,
        }

    def _round(self, publisher: Publisher, heard: Heard) -> dict[str, Any]:
        """One round until every member has proven it; times in ms, CPU of all that is in it."""
        cpu = time.process_time()
        broker, hosts = cpu_s(self._broker.pid), [cpu_s(pid) for pid in self._hosts]
        version = publisher.publish().version
        told = heard.wait(lambda: heard.trainer(version), PATIENCE_S, f"metrics of {version}")
        return {
            "members": told.applied,
            "transport": told.transport,
            "go": (told.seal_us + told.ready_us) / 1e3,
            "ready": told.ready_us / 1e3,
            "received": told.broadcast_us / 1e3,
            "applied": told.apply_us / 1e3,
            "total": told.total_us / 1e3,
            "cpu": 1e3 * (time.process_time() - cpu),
            "broker_cpu": 1e3 * (cpu_s(self._broker.pid) - broker),
            "hosts_cpu": 1e3 * sum(cpu_s(p) - c for p, c in zip(self._hosts, hosts, strict=True)),
        }

    def _answers(self, expected: str) -> list[Any]:
        return self._control.answers(expected, self._config.hosts, PATIENCE_S)


class _Host:
    """A process with its share of the workers, on one event loop."""

    def __init__(self, control: Control, config: Config) -> None:
        self._control = control
        self._config = config

    def run(self) -> None:
        self._url = self._control.hear(PATIENCE_S)
        self._control.say(("pid", os.getpid()))
        try:
            import uvloop
        except ImportError:  # no build for this platform
            loop_factory = None
        else:
            loop_factory = uvloop.new_event_loop
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            while True:
                match self._control.hear(3600.0):
                    case ("join", run, n):
                        runner.run(self._work(run, n))
                    case ("end",):
                        self._control.say(("end",))
                        return

    async def _work(self, run: str, n: int) -> None:
        """Be one in `hosts` of `n` workers until told to leave."""
        config = self._config
        mine = range(self._control.rank - 1, n, config.hosts)
        held = {k: make_weights(config.cut, config.seed) for k in mine}
        async with AsyncExitStack() as stack:
            for k, weights in held.items():
                name = f"worker-{k:03d}"
                replica = Replica(weights, run=run, bus=self._url, name=name, policy=config.policy)
                await stack.enter_async_context(replica)
            self._control.say(("joined",))
            assert await asyncio.to_thread(self._control.hear, 3600.0) == ("digest",)
            self._control.say(("digest", [digest(weights) for weights in held.values()]))
            assert await asyncio.to_thread(self._control.hear, 3600.0) == ("leave",)
        self._control.say(("left",))


if __name__ == "__main__":
    run_rank(main)
