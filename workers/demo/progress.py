"""How far a demo is and what came of it: plain figures, for the views and for the JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, median

import msgspec

from ...messages.metrics import TrainerMetrics
from ..board import percentile
from .evidence import WorkerOutcome

#: Updates that the first and the last reward are means of.
SPAN = 20


@dataclass(frozen=True, slots=True)
class Point:
    """One published update: the loss, the mean reward (RL alone), and what the patch took."""

    version: int
    loss: float
    reward: float | None
    density: float
    nbytes: int
    dense_nbytes: int
    encoding: str


@dataclass(frozen=True, slots=True)
class Answer:
    """What the workers said to the demo's question, at a version."""

    version: int
    prompt: str
    text: str
    right: bool


@dataclass(slots=True)
class Progress:
    """Grows as the demo goes."""

    run: str
    updates: int
    warmup: int
    numel: int = 0
    warm: list[Point] = field(default_factory=list)
    rl: list[Point] = field(default_factory=list)
    early: Answer | None = None
    newest: Answer | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def rewards(self) -> list[float]:
        """The mean reward of each RL update so far."""
        return [point.reward for point in self.rl if point.reward is not None]

    @property
    def position(self) -> tuple[int, int]:
        """Updates done and to do, of the phase that is on."""
        if self.rl or not self.warmup:
            return len(self.rl), self.updates
        return len(self.warm), self.warmup

    @property
    def quarters(self) -> tuple[float, float] | None:
        """Mean reward of the first and of the last quarter of the RL updates; None before four."""
        rewards = self.rewards
        size = len(rewards) // 4
        return (fmean(rewards[:size]), fmean(rewards[-size:])) if size else None


class Density(msgspec.Struct, frozen=True, kw_only=True):
    """The middle share of elements that an update changed, 0 to 1; None: no such update."""

    warmup_p50: float | None
    rl_p50: float | None


class Nbytes(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of all published patches, and of the same updates sent dense."""

    total: int
    dense_total: int


class RoundMs(msgspec.Struct, frozen=True, kw_only=True):
    """publish() until the last worker had applied, over the RL rounds; None: none was measured."""

    p50: float | None
    p99: float | None


class Reward(msgspec.Struct, frozen=True, kw_only=True):
    """Mean rewards of the first and the last 20 RL updates, or of what there is."""

    first: float | None
    last: float | None


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What `sparsecast demo --json` writes."""

    run: str
    updates: int
    rl_updates: int
    window: str
    #: Of the trainer, under that name, and of each worker.
    devices: dict[str, str]
    workers: dict[str, WorkerOutcome]
    density: Density
    nbytes: Nbytes
    round_ms: RoundMs
    reward: Reward


def outcome(
    progress: Progress,
    rounds: Sequence[TrainerMetrics],
    workers: dict[str, WorkerOutcome],
    *,
    window: str,
    devices: dict[str, str],
) -> Outcome:
    """Sum a demo up. `window` is the road of most rounds."""
    points = [*progress.warm, *progress.rl]
    times = round_times(progress, rounds)
    rewards = progress.rewards
    return Outcome(
        run=progress.run,
        updates=len(points),
        rl_updates=len(progress.rl),
        window=window,
        devices=devices,
        workers=workers,
        density=Density(
            warmup_p50=_median([point.density for point in progress.warm]),
            rl_p50=_median([point.density for point in progress.rl]),
        ),
        nbytes=Nbytes(
            total=sum(point.nbytes for point in points),
            dense_total=sum(point.dense_nbytes for point in points),
        ),
        round_ms=RoundMs(p50=percentile(times, 0.50), p99=percentile(times, 0.99)),
        reward=Reward(
            first=fmean(rewards[:SPAN]) if rewards else None,
            last=fmean(rewards[-SPAN:]) if rewards else None,
        ),
    )


def round_times(progress: Progress, rounds: Sequence[TrainerMetrics]) -> list[float]:
    """Milliseconds of the rounds that brought RL updates to at least one member."""
    start = progress.rl[0].version if progress.rl else 0
    return [one.total_us / 1e3 for one in rounds if one.version >= start and one.applied]


def _median(values: list[float]) -> float | None:
    return median(values) if values else None
