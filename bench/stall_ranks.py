"""The processes of bench/stall.py: rank 0 publishes, rank 1 computes inside the guard."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from control import Control, run_rank
from heard import Heard
from models import CONFIGS, change, describe, make_model
from sparsecast import Broker, Policy, Publisher, Replica, digest
from sparsecast.pipeline.delta.tensors import named_tensors
from sparsecast.workers.engine import ModuleEngine

RUN = "stall"
WORKER = "worker-0"
#: No single step takes so long; a process for which one does is broken.
PATIENCE_S = 120.0
#: The anchor of the start is a full copy: of 7B, 15 GB through the broker onto a disk.
STORE_S = 300.0
#: Updates before anything is measured.
WARMUP = 3


@dataclass(frozen=True, slots=True)
class Config:
    """What the parent asks of both ranks."""

    model: str
    device: str
    batch: int
    tokens: int
    graph: bool
    pairs: int
    seconds: float
    interval_s: float
    density: float
    threads: int
    seed: int
    window: str


def main(control: Control, config: Config) -> Any:
    """Run a rank to its end; the trainer's result is what the parent writes down."""
    torch.set_num_threads(config.threads)
    device = torch.device(config.device)
    if config.device == "cuda":
        device = torch.device("cuda", control.rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    policy = Policy(
        window=config.window,  # type: ignore[arg-type]  # argparse has checked it
        # An anchor in mid-measurement would be no part of what an update costs.
        anchor_every=1_000_000,
        store_s=STORE_S,
    )
    side = _Worker if control.rank else _Trainer
    return side(control, config, device, policy).run()


class _Trainer:
    def __init__(
        self, control: Control, config: Config, device: torch.device, policy: Policy
    ) -> None:
        self._control = control
        self._config = config
        self._policy = policy
        self._random = torch.Generator(device).manual_seed(config.seed + 1)
        self._model = make_model(config.model, device, config.seed)
        self._tensors = named_tensors(self._model)

    def run(self) -> dict[str, Any]:
        config = self._config
        with ExitStack() as stack:
            url = stack.enter_context(Broker())
            self._control.say(url)
            self._publisher = stack.enter_context(
                Publisher(self._model, run=RUN, bus=url, policy=self._policy)
            )
            self._heard = Heard(url, RUN)
            stack.callback(self._heard.close)
            self._answer("ready")
            self._publisher.wait_members(1, timeout_s=PATIENCE_S)
            self._heard.wait(lambda: self._publisher.window, PATIENCE_S, "a window is open")
            self._heard.wait_stored(0, STORE_S)
            self._tell("warming up")
            self._updates(WARMUP * config.interval_s, least=WARMUP)
            phases = [self._phase(kind) for _ in range(config.pairs) for kind in ("quiet", "busy")]
            window = self._publisher.window
            self._control.say(("digest",))
            equal = self._answer("digest") == digest(self._tensors)
            self._answer("end")  # the broker is ours: a worker leaves before it
        return {
            "phases": phases,
            "window": window,
            "model": describe(self._model),
            "digests_equal": equal,
        }

    def _phase(self, kind: str) -> dict[str, Any]:
        """Some seconds of forwards, with or without updates meanwhile."""
        self._tell(f"{self._config.seconds:g} s {'with' if kind == 'busy' else 'without'} updates")
        self._control.say(("forward", self._config.seconds))
        versions = self._updates(self._config.seconds) if kind == "busy" else range(0)
        measured = self._answer("forward")
        told = [self._heard.worker(v, WORKER) for v in versions]
        rounds = [self._heard.trainer(v) for v in versions]
        return {
            "kind": kind,
            "published": len(versions),
            "forwards": measured["forwards"],
            "applies": measured["applies"],
            "workers": [
                {
                    "source": w.source,
                    "receive": w.receive_us / 1e3,
                    "check": w.check_us / 1e3,
                    "staged": w.staged_us / 1e3,
                    "apply": w.apply_us / 1e3,
                    "verify": w.verify_us / 1e3,
                }
                for w in told
                if w is not None  # merged with a later one
            ],
            "rounds": [
                {"total": r.total_us / 1e3, "nbytes": r.nbytes} for r in rounds if r is not None
            ],
        }

    def _updates(self, seconds: float, least: int = 1) -> range:
        """An update every interval for so long; all is applied, proven and stored on return."""
        config, publisher = self._config, self._publisher
        first = publisher.version + 1
        began = time.monotonic()
        number = 0
        while number < least or number * config.interval_s < seconds:
            time.sleep(max(began + number * config.interval_s - time.monotonic(), 0))
            change(self._tensors, config.density, self._random)
            update = publisher.publish()
            number += 1
        report = update.wait_applied(timeout_s=PATIENCE_S)
        if not report.complete:
            raise RuntimeError(f"version {update.version} is not on the worker: {report.missing}")
        last = update.version
        self._heard.wait(
            lambda: self._heard.worker(last, WORKER) and self._heard.trainer(last),
            PATIENCE_S,
            f"metrics of version {last}",
        )
        self._heard.wait_stored(last, STORE_S)
        return range(first, last + 1)

    def _answer(self, expected: str) -> Any:
        return self._control.answers(expected, 1, PATIENCE_S + self._config.seconds)[0]

    def _tell(self, what: str) -> None:
        self._control.send("progress", what)


class _Noting(ModuleEngine):
    """A module's engine that notes when each version was written."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__(model)
        self.applies: list[float] = []

    def after_apply(self, version: int, changed: Sequence[str]) -> None:
        super().after_apply(version, changed)
        self.applies.append(time.monotonic())


class _Forward:
    """One forward of a fixed short batch, eager or as a CUDA graph; returns when it is computed."""

    def __init__(self, model: torch.nn.Module, config: Config, device: torch.device) -> None:
        self._model = model
        self._cuda = device.type == "cuda"
        shape = (config.batch, config.tokens)
        vocabulary = CONFIGS[config.model]["vocab_size"]
        random = torch.Generator().manual_seed(config.seed)
        self._ids = torch.randint(vocabulary, shape, generator=random).to(device)
        self._places = torch.arange(config.tokens, device=device).unsqueeze(0)
        # Blocking: a spinning wait would take the core that the apply's thread needs.
        self._done = torch.cuda.Event(blocking=True) if self._cuda else None
        self._graph: torch.cuda.CUDAGraph | None = None
        if config.graph:
            self._capture()

    @torch.inference_mode()
    def __call__(self) -> None:
        if self._graph is not None:
            self._graph.replay()
        else:
            self._compute()
        if self._done is not None:
            self._done.record()
            self._done.synchronize()

    def _compute(self) -> None:
        # A mask given as a dict is taken as it is: making one synchronises with the device.
        self._model(
            input_ids=self._ids,
            position_ids=self._places,
            attention_mask={"full_attention": None},
            use_cache=False,
            logits_to_keep=1,
        )

    @torch.inference_mode()
    def _capture(self) -> None:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):
                self._compute()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._compute()
        self._graph = graph


class _Worker:
    def __init__(
        self, control: Control, config: Config, device: torch.device, policy: Policy
    ) -> None:
        self._control = control
        model = make_model(config.model, device, config.seed)
        self._forward = _Forward(model, config, device)
        for _ in range(5):
            self._forward()
        self._engine = _Noting(model)
        self._device = device
        self._policy = policy

    def run(self) -> None:
        url = self._control.hear(PATIENCE_S)
        self._replica = Replica(
            self._engine,
            run=RUN,
            bus=url,
            name=WORKER,
            device=str(self._device),
            policy=self._policy,
        )
        self._replica.start()
        try:
            self._control.say(("ready",))
            while True:
                match self._control.hear(10 * STORE_S):
                    case ("forward", seconds):
                        self._control.say(("forward", self._measure(seconds)))
                    case ("digest",):
                        with self._replica.reading():
                            found = digest(self._engine.tensors())
                        self._control.say(("digest", found))
                        break
        finally:
            self._replica.stop()
        self._control.say(("end",))

    def _measure(self, seconds: float) -> dict[str, Any]:
        """Forwards one after the other: began and ended (s), and how long the guard took (ms)."""
        del self._engine.applies[:]
        forwards: list[tuple[float, float, float]] = []
        began = time.monotonic()
        end = began + seconds
        while began < end:
            with self._replica.reading():
                entered = time.monotonic()
                self._forward()
            ended = time.monotonic()
            forwards.append((began, ended, 1e3 * (entered - began)))
            began = time.monotonic()
        return {"forwards": forwards, "applies": list(self._engine.applies)}


if __name__ == "__main__":
    run_rank(main)
