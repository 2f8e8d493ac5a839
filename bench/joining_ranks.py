"""The processes of bench/joining.py: rank 0 publishes, rank 1 comes late, again and again."""

from __future__ import annotations

import asyncio
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch

import baselines
from control import Control, run_rank
from heard import Heard
from shapes import Cut, Tensors, make_weights, train_step
from sparsecast import Broker, Policy, Publisher, Replica, digest
from sparsecast.messages.control import LogEntry
from sparsecast.pipeline.log.base import Log, Progress
from sparsecast.workers.connect import connect
from sparsecast.workers.driver import Ports

HOST = "127.0.0.1"
NAME = "joiner"
#: No single step takes so long; a process for which one does is broken.
PATIENCE_S = 60.0
#: Transfers before any is measured: staging is touched for the first time there.
WARMUP = 2
#: One weight in so many is wrong on a joiner that has nothing: an anchor replaces them all.
_SPOILED = 1000
#: The dense transfers, by name.
DENSE = {"dense": baselines.Dense, "dense_safe": baselines.DenseSafe}


@dataclass(frozen=True, slots=True)
class Config:
    """What the parent asks of both ranks."""

    sizes: tuple[int, ...]
    behind: tuple[int, ...]
    repeats: int
    density: float
    threads: int
    seed: int


def main(control: Control, config: Config) -> Any:
    """Run a rank to its end; the trainer's result is what the parent writes down."""
    torch.set_num_threads(config.threads)
    if control.rank:
        return _Joiner(control, config).run()
    return _Trainer(control, config).run()


def plan(behind: tuple[int, ...]) -> list[tuple[int | None, int]]:
    """(held, head) of the joiners, by version; None: nothing that any version is.

    A run's first version is what its workers have before they join for the first time; the last
    one of the plan comes back with what it held when it left.
    """
    steps: list[tuple[int | None, int]] = [(None, 0), (0, 0), *((0, head) for head in behind)]
    if len(behind) > 1:
        steps.append((behind[-2], behind[-1]))
    return steps


def _policy() -> Policy:
    # An anchor in mid-measurement would be a shorter way than the one that is asked for.
    return Policy(anchor_every=1_000_000)


class _Trainer:
    def __init__(self, control: Control, config: Config) -> None:
        self._control = control
        self._config = config

    def run(self) -> list[dict[str, Any]]:
        with Broker() as url:
            group = baselines.Group(0, 2, own=HOST, trainer=HOST, port=0, timeout_s=PATIENCE_S)
            self._control.say((url, group.port))
            group.open()
            found = [self._size(url, group, elements) for elements in self._config.sizes]
            self._control.say(("end",))
            self._answer("end")
        return found

    def _size(self, url: str, group: baselines.Group, elements: int) -> dict[str, Any]:
        config = self._config
        cut = Cut.of_elements(elements)
        self._weights = make_weights(cut, config.seed)
        self._random = torch.Generator().manual_seed(config.seed + 1)
        run = f"joining-{elements}"
        self._control.say(("size", run, cut))
        self._answer("ready")
        equal = []
        dense = {}
        for name in DENSE:
            dense[name] = self._dense(group, name, cut.describe())
            equal.append(self._answer("digest") == digest(self._weights))
        joins = []
        with ExitStack() as stack:
            self._publisher = stack.enter_context(
                Publisher(self._weights, run=run, bus=url, policy=_policy())
            )
            self._heard = Heard(url, run, workers=False)
            stack.callback(self._heard.close)
            self._heard.wait_stored(0, PATIENCE_S)
            for holds, head in plan(config.behind):
                self._control.send(
                    "progress", f"{cut.describe()}: joiners with {holds}, to version {head}"
                )
                joins.append({"holds": holds, "head": head, "rounds": self._joins(holds, head)})
                mine = digest(self._weights)
                equal += [one.pop("digest") == mine for one in joins[-1]["rounds"]]
        return {
            "elements": cut.numel,
            "model": cut.describe(),
            "dense_nbytes": 2 * cut.numel,
            "dense": dense,
            "joins": joins,
            "digests_equal": all(equal),
        }

    def _dense(self, group: baselines.Group, name: str, model: str) -> list[float]:
        """ms of transfers of the whole model, from the first broadcast until the answer."""
        method = DENSE[name](group, self._weights, trainer=True)
        n = self._config.repeats
        self._control.say(("dense", name, WARMUP + n))
        took = []
        for number in range(WARMUP + n):
            self._control.send("progress", f"{model}: {name}, {number + 1} of {WARMUP + n}")
            self._answer("entering")
            time.sleep(0.002)  # let it get from there into its receive
            began = time.perf_counter()
            method.send()
            took.append(1e3 * (time.perf_counter() - began))
        return took[WARMUP:]

    def _joins(self, holds: int | None, head: int) -> list[dict[str, Any]]:
        """Publish up to this version, and let the joiner come, again and again; its times in ms."""
        while self._publisher.version < head:
            train_step(self._weights, self._config.density, self._random)
            version = self._publisher.publish().version
            # One entry a version: what waits to be stored would be merged.
            self._heard.wait_stored(version, PATIENCE_S)
        self._heard.wait(lambda: self._merged(head), PATIENCE_S, "what is complete is merged")
        found = []
        for _ in range(self._config.repeats):
            self._control.say(("join", holds, head))
            found.append(self._answer("current"))
        return found

    def _merged(self, head: int) -> bool:
        """Whether the merged patches are there that end at this version."""
        every = size = _policy().merge_every
        wanted = set()
        while size <= head:
            if head % size == 0:
                wanted.add((head - size, head))
            size *= every
        return wanted <= {(entry.base_version, entry.version) for entry in self._heard.entries()}

    def _answer(self, expected: str) -> Any:
        return self._control.answers(expected, 1, PATIENCE_S)[0]


class _Read:
    """A log that notes how many bytes of it each reading took."""

    def __init__(self, log: Log, read: list[int]) -> None:
        self._log = log
        self._noted = read

    def __getattr__(self, name: str) -> Any:
        return getattr(self._log, name)

    async def load(
        self, entry: LogEntry, *, timeout_s: float, progress: Progress | None = None
    ) -> bytes | bytearray:
        data = await self._log.load(entry, timeout_s=timeout_s, progress=progress)
        self._noted.append(len(data))
        return data


class _Joiner:
    def __init__(self, control: Control, config: Config) -> None:
        self._control = control
        self._config = config
        self._weights: Tensors = {}

    def run(self) -> None:
        control = self._control
        self._url, port = control.hear(PATIENCE_S)
        group = baselines.Group(1, 2, own=HOST, trainer=HOST, port=port, timeout_s=PATIENCE_S)
        group.open()
        while True:
            match control.hear(3600.0):
                case ("size", run, cut):
                    self._run = run
                    self._weights = make_weights(cut, self._config.seed)
                    #: What was held at some versions, to be a joiner of those again.
                    states = {0: self._copy()}
                    control.say(("ready",))
                case ("dense", name, n):
                    self._spoil()
                    method = DENSE[name](group, self._weights, trainer=False)
                    for _ in range(n):
                        control.say(("entering",))
                        method.receive()
                    control.say(("digest", digest(self._weights)))
                case ("join", holds, head):
                    for name, tensor in states[holds or 0].items():
                        self._weights[name].copy_(tensor)
                    if holds is None:
                        self._spoil()
                    control.say(("current", self._join(head)))
                    if head in self._config.behind and head not in states:
                        states[head] = self._copy()
                case ("end",):
                    control.say(("end",))
                    return

    def _copy(self) -> Tensors:
        return {name: tensor.clone() for name, tensor in self._weights.items()}

    def _spoil(self) -> None:
        for tensor in self._weights.values():
            tensor.view(-1)[::_SPOILED] = 1.0

    def _join(self, version: int) -> dict[str, Any]:
        """Come, stay until the version is proven, go: ms since before it connected."""
        read: list[int] = []

        async def ports() -> Ports:
            found = await connect(self._url, run=self._run, name=NAME)
            log: Any = _Read(found.log, read)
            return replace(found, log=log)

        replica = Replica(
            self._weights,
            run=self._run,
            bus=self._url,
            name=NAME,
            policy=_policy(),
            ports=ports,
        )
        began = time.perf_counter()
        replica.start()
        try:
            started = time.perf_counter()
            asyncio.run(replica.wait_version(version, timeout_s=PATIENCE_S))
            current = time.perf_counter()
            while replica.verified != version:
                if time.perf_counter() - current > PATIENCE_S:
                    raise TimeoutError(f"version {version} was not proven: {replica.status}")
                time.sleep(0.001)
            proven = time.perf_counter()
        finally:
            replica.stop()
        return {
            "connected": 1e3 * (started - began),
            "current": 1e3 * (current - began),
            "proven": 1e3 * (proven - began),
            "entries": len(read),
            "nbytes": sum(read),
            "digest": digest(self._weights),
        }


if __name__ == "__main__":
    run_rank(main)
