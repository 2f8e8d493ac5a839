"""The processes of bench/joining.py: rank 0 publishes, rank 1 comes late, again and again."""

from __future__ import annotations

import asyncio
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

import baselines
from control import Control, run_rank
from heard import Heard
from shapes import Cut, Tensors, make_weights, train_step
from sparsecast import Broker, Policy, Publisher, Replica, digest
from sparsecast.pipeline.log.base import way

HOST = "127.0.0.1"
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
            for behind in (None, 0, *config.behind):
                rounds = []
                for number in range(config.repeats):
                    what = "nothing" if behind is None else f"{behind} behind"
                    self._control.send(
                        "progress",
                        f"{cut.describe()}: joiner with {what}, {number + 1} of {config.repeats}",
                    )
                    rounds.append(self._join(behind))
                    equal.append(rounds[-1].pop("digest") == digest(self._weights))
                joins.append({"behind": behind, **self._way(behind), "rounds": rounds})
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

    def _join(self, behind: int | None) -> dict[str, Any]:
        """Publish so much that the joiner is that far behind, and let it come; its times in ms."""
        for _ in range(behind or 0):
            train_step(self._weights, self._config.density, self._random)
            version = self._publisher.publish().version
            # One entry a version: what waits to be stored would be merged.
            self._heard.wait_stored(version, PATIENCE_S)
        self._control.say(("join", self._publisher.version, behind is None))
        found: dict[str, Any] = self._answer("current")
        return found

    def _way(self, behind: int | None) -> dict[str, int]:
        """What a joiner reads of the log: entries and bytes."""
        head = self._publisher.version
        entries = self._heard.entries()
        epoch = max(entry.epoch for entry in entries)
        held = None if behind is None else head - behind
        found = way(entries, epoch=epoch, held=held, target=head)
        return {"entries": len(found), "nbytes": sum(entry.nbytes for entry in found)}

    def _answer(self, expected: str) -> Any:
        return self._control.answers(expected, 1, PATIENCE_S)[0]


class _Joiner:
    def __init__(self, control: Control, config: Config) -> None:
        self._control = control
        self._config = config

    def run(self) -> None:
        control = self._control
        self._url, port = control.hear(PATIENCE_S)
        group = baselines.Group(1, 2, own=HOST, trainer=HOST, port=port, timeout_s=PATIENCE_S)
        group.open()
        while True:
            match control.hear(3600.0):
                case ("size", run, cut):
                    self._weights: Tensors = make_weights(cut, self._config.seed)
                    self._replica = Replica(
                        self._weights, run=run, bus=self._url, name="joiner", policy=_policy()
                    )
                    control.say(("ready",))
                case ("dense", name, n):
                    self._spoil()
                    method = DENSE[name](group, self._weights, trainer=False)
                    for _ in range(n):
                        control.say(("entering",))
                        method.receive()
                    control.say(("digest", digest(self._weights)))
                case ("join", version, nothing):
                    if nothing:
                        self._spoil()
                    control.say(("current", self._join(version)))
                case ("end",):
                    control.say(("end",))
                    return

    def _spoil(self) -> None:
        for tensor in self._weights.values():
            tensor.view(-1)[::_SPOILED] = 1.0

    def _join(self, version: int) -> dict[str, Any]:
        """Come, stay until the version is proven, go: ms since before it connected."""
        replica = self._replica
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
            "digest": digest(self._weights),
        }


if __name__ == "__main__":
    run_rank(main)
