"""One demo, from the first import to the verdict."""

from __future__ import annotations

import secrets
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...messages.errors import WaitTimeout, WorkerDied
from ..devices import count
from . import task
from .cast import Cast, choose
from .evidence import Evidence
from .progress import Answer, Point, Progress, outcome, round_times
from .view import PlainView

if TYPE_CHECKING:
    from ..publisher import Publisher, Update
    from ..rollouts import Rollouts
    from .crew import Crew
    from .learner import Learner, Learnt
    from .view import Step
    from .watch import Watch

#: What the workers are asked again and again, to be seen learning.
QUESTION = (5, 2, 9, 1, 3)
#: RL updates between two such questions.
ASK_EVERY = 20
JOIN_S = 90.0
GENERATE_S = 60.0
SETTLE_S = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoOptions:
    """What `sparsecast demo` is told."""

    updates: int
    warmup: int
    #: None: as many as suit the devices.
    workers: int | None
    #: auto, cpu or cuda.
    device: str
    window: str
    seed: int
    #: Where the outcome goes, if anywhere.
    json: Path | None
    plain: bool
    run: str | None
    #: None: an embedded broker.
    bus: str | None


class Demo:
    """One demo, from the first import to the verdict."""

    def __init__(
        self,
        options: DemoOptions,
        view: PlainView,
        directory: Path,
        check_interrupted: Callable[[], None],
    ) -> None:
        self.options = options
        self._check_interrupted = check_interrupted
        self.view = view
        self.directory = directory
        self.run = options.run or f"demo-{secrets.token_hex(2)}"
        self.cast: Cast
        self.names: list[str] = []
        self.progress = Progress(self.run, options.updates, options.warmup)
        self.crew: Crew
        self.publisher: Publisher
        self.watch: Watch
        self.rollouts: Rollouts
        self.url = options.bus or ""
        self.over = False

    def play(self) -> int:
        """Set up, train, settle, judge."""
        with ExitStack() as stack:
            learner = self._set_up(stack)
            with self.view.training(self.progress, self._look):
                self._warm_up(learner)
                self._reinforce(learner)
                self._settle()
                self.over = True
            return self._conclude()

    # ---- set-up

    def _set_up(self, stack: ExitStack) -> Learner:
        view, options = self.view, self.options
        view.show(
            f"sparsecast demo: run {self.run}, seed {options.seed}, "
            f"{options.warmup} warm-up updates, then {options.updates} RL updates"
        )
        with view.step("loading torch and transformers") as step:
            import torch
            import transformers

            from ...pipeline.core.policy import Policy
            from ..publisher import Publisher
            from ..rollouts import Rollouts
            from .crew import Crew
            from .learner import Learner
            from .model import build, save
            from .watch import Watch

            # More only wait for each other on so small a model.
            torch.set_num_threads(min(4, torch.get_num_threads()))
            step.done = f"torch {torch.__version__}, transformers {transformers.__version__}"
        self._choose()
        if options.bus is None:
            with view.step("starting an embedded NATS broker") as step:
                from ...pipeline.bus.broker import Broker

                self.url = stack.enter_context(Broker(advertise=True))
                step.done = self.url
        with view.step("writing the model") as step:
            model = build(options.seed)
            self.progress.numel = sum(parameter.numel() for parameter in model.parameters())
            nbytes = save(model, self.directory / "model")
            model.to(self.cast.trainer)  # type: ignore[arg-type]  # a device's name will do
            step.done = (
                f"Qwen2, {self.progress.numel / 1e6:.2f} M random weights, "
                f"{nbytes / 1e6:.1f} MB in bfloat16"
            )
        with view.step("claiming the run") as step:
            self.watch = stack.enter_context(Watch(self.url, self.run))
            self.publisher = stack.enter_context(
                Publisher(
                    model,
                    run=self.run,
                    bus=self.url,
                    dtype=torch.bfloat16,
                    policy=Policy(window=self.cast.window),  # type: ignore[arg-type]  # checked by the CLI
                )
            )
            self.rollouts = stack.enter_context(Rollouts(run=self.run, bus=self.url))
            step.done = "this process is the trainer, its weights are version 0"
        with view.step("starting the workers") as step:
            self.crew = stack.enter_context(
                Crew(
                    run=self.run,
                    bus=self.url,
                    model=self.directory / "model",
                    window=self.cast.window,
                    logs=self.directory,
                )
            )
            pids = [
                f"{name} (pid {self.crew.start(name, device)})"
                for name, device in zip(self.names, self.cast.workers, strict=True)
            ]
            step.done = ", ".join(pids)
        with view.step("waiting for the workers") as step:
            self._await_members(step)
            step.done = f"{', '.join(self.names)} hold version {self.publisher.version}"
        view.show(f"watch it in a second terminal: {self._top_command()}")
        return Learner(model, seed=options.seed)

    def _choose(self) -> None:
        """Decide who plays where, and say it."""
        options, gpus = self.options, count()
        no_nccl = None
        if gpus > 1 and options.device != "cpu":
            from ...pipeline.windows.nccl import probe

            found = probe()
            no_nccl = None if found.available else found.reason
        self.cast = choose(
            gpus,
            device=options.device,
            workers=options.workers,
            window=options.window,
            no_nccl=no_nccl,
        )
        self.names = [f"worker-{index}" for index in range(len(self.cast.workers))]
        self.view.show(f"devices: {self._devices()} ({self.cast.why})")

    def _devices(self) -> str:
        cast = self.cast
        if len({cast.trainer, *cast.workers}) == 1:
            return f"trainer and {_count(len(self.names), 'worker')} on {cast.trainer}"
        workers = ", ".join(map(" on ".join, zip(self.names, cast.workers, strict=True)))
        return f"trainer on {cast.trainer}, {workers}"

    def _await_members(self, step: Step) -> None:
        deadline = time.monotonic() + JOIN_S
        while True:
            self._require_workers(len(self.names))
            try:
                self.publisher.wait_members(len(self.names), timeout_s=0.25)
                return
            except WaitTimeout as timeout:
                if time.monotonic() > deadline:
                    raise
                step.stands("; ".join([timeout.reason, *self.crew.last_words()]))

    # ---- training

    def _warm_up(self, learner: Learner) -> None:
        for step in range(self.options.warmup):
            learnt = learner.warm_up()
            update = self.publisher.publish(step=step, tags={"phase": "warm-up"})
            self.progress.warm.append(_point(update, learnt))
            self._check_workers()
            self._check_interrupted()
            self.view.advance()

    def _reinforce(self, learner: Learner) -> None:
        version = self.publisher.version
        for update_index in range(self.options.updates):
            if update_index % ASK_EVERY == 0:
                self._question(version)
            # On-policy: nothing is sampled from weights older than the newest.
            samples = list(
                self.rollouts.generate(
                    learner.prompts(),
                    samples=learner.recipe.samples,
                    max_tokens=task.MAX_TOKENS,
                    min_version=version,
                    timeout_s=GENERATE_S,
                    seed=self.options.seed * 1_000_003 + update_index,
                )
            )
            learnt = learner.learn(samples)
            update = self.publisher.publish(
                step=self.options.warmup + update_index, tags={"phase": "rl"}
            )
            version = update.version
            self.progress.rl.append(_point(update, learnt))
            self._check_workers()
            self._check_interrupted()
            self.view.advance()
        self._question(version)

    def _question(self, version: int) -> None:
        """Ask the workers the one question; the likeliest answer, from `version` or newer."""
        (sample,) = self.rollouts.generate(
            [task.prompt(QUESTION)],
            max_tokens=task.MAX_TOKENS,
            temperature=0.0,
            min_version=version,
            timeout_s=GENERATE_S,
        )
        answer = Answer(
            version=sample.version,
            prompt=" ".join(map(str, QUESTION)),
            text=task.text(sample.tokens) or "(nothing)",
            right=task.reward(sample.prompt, sample.tokens) == 1.0,
        )
        if self.progress.early is None:
            self.progress.early = answer
        else:
            self.progress.newest = answer

    def _check_workers(self) -> None:
        for name, words in self.crew.newly_dead():
            note = f"{name} {words}"
            self.progress.notes.append(note)
            self.view.tell(note)
        self._require_workers(1)

    def _require_workers(self, count: int) -> None:
        if len(self.crew.alive) < count:
            words = [f"{name} {words}" for name, words in self.crew.newly_dead()]
            words = words or self.progress.notes
            raise WorkerDied("\n".join(["a worker that is needed has ended", *words]))

    # ---- the end

    def _settle(self) -> None:
        """Give the workers time to apply and verify the newest version."""
        deadline = time.monotonic() + SETTLE_S
        while self._missing(self.crew.alive) and time.monotonic() < deadline:
            self._check_workers()
            time.sleep(0.05)

    def _missing(self, names: list[str]) -> list[str]:
        newest = self.publisher.version

        def question(evidence: Evidence) -> list[str]:
            return evidence.missing(names, newest)

        return self.watch.ask(question)

    def _conclude(self) -> int:
        progress, view = self.progress, self.view
        look = self._look()
        devices = dict(
            zip(["trainer", *self.names], [self.cast.trainer, *self.cast.workers], strict=True)
        )
        result = outcome(
            progress, self.watch.rounds(), look.workers, window=look.window, devices=devices
        )
        missing = [*self._missing(self.names), *progress.notes]
        view.finish()
        if progress.early is not None and progress.newest is not None:
            for answer in (progress.early, progress.newest):
                mark = "right" if answer.right else "wrong"
                view.show(f"version {answer.version}: {answer.prompt} → {answer.text} ({mark})")
        if progress.quarters is not None:
            first, last = progress.quarters
            view.show(f"mean reward: {first:.3f} in the first quarter, {last:.3f} in the last")
        view.show(f"updates went by {look.window}; {self._devices()}")
        if self.options.json is not None:
            import msgspec

            self.options.json.write_bytes(msgspec.json.format(msgspec.json.encode(result)) + b"\n")
        for reason in missing:
            view.show(f"NOT PROVEN: {reason.splitlines()[0]}")
        if not missing:
            applied = sum(one.applied for one in result.workers.values())
            view.show(
                f"proven: {_count(len(result.workers), 'worker')} ended at version "
                f"{self.publisher.version}; each of the {applied} versions that were applied "
                "had the trainer's digest"
            )
        return 1 if missing else 0

    def _look(self) -> Any:
        from .picture import Look

        rounds = self.watch.rounds()
        roads = Counter(one.transport for one in rounds if one.applied)
        window = roads.most_common(1)[0][0] if roads else self.publisher.window or "none yet"

        def outcomes(evidence: Evidence) -> dict[str, Any]:
            return {name: evidence.outcome(name) for name in self.names}

        return Look(
            snapshot=self.watch.snapshot(),
            round_ms=round_times(self.progress, rounds),
            workers=self.watch.ask(outcomes),
            window=window,
            top="" if self.over else self._top_command(),
        )

    def _top_command(self) -> str:
        from ...pipeline.bus.client import redact

        program = shutil.which("sparsecast")
        beside = Path(sys.executable).with_name("sparsecast")
        if program is not None:
            program = "sparsecast"
        elif beside.exists():
            program = str(beside)
        else:
            program = f"{sys.executable} -m sparsecast.workers.cli"
        return f"{program} top --run {self.run} --bus {redact(self.url)}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _point(update: Update, learnt: Learnt) -> Point:
    return Point(
        version=update.version,
        loss=learnt.loss,
        reward=learnt.reward,
        density=update.density,
        nbytes=update.nbytes,
        dense_nbytes=update.dense_nbytes,
        encoding=update.encoding,
    )
