"""How a demo looks at one moment: pure functions from figures to text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..board import Snapshot, percentile
from ..top import ms, share, size
from .evidence import WorkerOutcome
from .progress import SPAN, Answer, Point, Progress

_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 78


@dataclass(frozen=True, slots=True)
class Look:
    """What others know at one moment: the run as heard on the bus, the times of the RL rounds in
    ms, the proof of each worker, the road, and the command that shows the run elsewhere (none once
    it is over)."""

    snapshot: Snapshot
    round_ms: Sequence[float]
    workers: dict[str, WorkerOutcome]
    window: str
    top: str


def sparkline(values: Sequence[float], width: int, *, top: float = 1.0) -> str:
    """Values from 0 to `top` as bars, the mean of each bucket, at most `width` of them."""
    if not values:
        return ""
    width = min(width, len(values))
    bars = []
    for index in range(width):
        bucket = values[index * len(values) // width : (index + 1) * len(values) // width]
        level = min(max(fmean(bucket) / top, 0.0), 1.0)
        bars.append(_BARS[min(int(level * len(_BARS)), len(_BARS) - 1)])
    return "".join(bars)


def figures(points: Sequence[Point]) -> str:
    """Share changed and bytes of some updates: medians, and the ratio of the sums."""
    nbytes = sum(point.nbytes for point in points)
    dense = sum(point.dense_nbytes for point in points)
    ratio = f"{dense / nbytes:.1f}" if nbytes else "∞"
    density = median(point.density for point in points)
    encoding = Counter(point.encoding for point in points).most_common(1)[0][0]
    return (
        f"{share(density)} changed, "
        f"{size(median(point.nbytes for point in points))} an update ({encoding}), "
        f"{ratio}× fewer bytes than dense"
    )


def line(progress: Progress, look: Look) -> str:
    """The newest updates in one line."""
    done, goal = progress.position
    workers = ", ".join(
        f"{name} {outcome.version}" for name, outcome in sorted(look.workers.items())
    )
    if not progress.rl:
        newest = progress.warm[-SPAN:]
        return (
            f"warm-up {done}/{goal}  loss {newest[-1].loss:.3f}  {figures(newest)}  "
            f"(large steps)  verified: {workers}"
        )
    return (
        f"RL {done}/{goal}  reward {fmean(progress.rewards[-SPAN:]):.3f}  "
        f"{figures(progress.rl[-SPAN:])}  "
        f"round p50 {ms(percentile(look.round_ms, 0.5)) or '–'} ms  verified: {workers}"
    )


def picture(progress: Progress, look: Look, elapsed_s: float) -> RenderableType:
    """The whole at one moment, within 80 columns."""
    done, goal = progress.position
    phase = "RL" if progress.rl else "warm-up"
    head = Text.assemble(
        ("sparsecast demo", "bold"),
        f"  run {progress.run}  window {look.window}  {phase} update {done} of {goal}  ",
        (f"{int(elapsed_s) // 60}:{int(elapsed_s) % 60:02d}", "dim"),
    )
    parts: list[RenderableType] = [
        Text(""),
        head,
        _bar(done, goal),
        _facts(progress, look),
        Text(""),
        _workers(look),
    ]
    if progress.early is not None:
        parts += [Text(""), _answers(progress.early, progress.newest)]
    parts += [Text(note.splitlines()[0], style="bold red") for note in progress.notes]
    if look.top:
        parts.append(Text(f"\nin a second terminal: {look.top}", style="dim", overflow="fold"))
    return Group(*parts)


def _bar(done: int, goal: int) -> Text:
    filled = _WIDTH * done // max(goal, 1)
    return Text.assemble(("━" * filled, "green"), ("━" * (_WIDTH - filled), "dim"))


def _facts(progress: Progress, look: Look) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    rewards = progress.rewards
    if rewards:
        first, last = fmean(rewards[:SPAN]), fmean(rewards[-SPAN:])
        bars = (sparkline(rewards, 40), "green")
        table.add_row(
            "reward", Text.assemble(bars, (f"  {last:.2f}", "bold"), f"  from {first:.2f}")
        )
        table.add_row("RL", Text(figures(progress.rl[-SPAN * 5 :]), style="bold"))
        times = look.round_ms
        table.add_row(
            "round",
            f"p50 {ms(percentile(times, 0.5)) or '–'} ms, p99 {ms(percentile(times, 0.99)) or '–'}"
            " ms: publish() until every worker had applied",
        )
    if progress.warm:
        if not rewards:
            table.add_row("loss", f"{progress.warm[-1].loss:.3f}")
        table.add_row("warm-up", figures(progress.warm))
        table.add_row("", Text("large supervised steps: most weights change in each", style="dim"))
    return table


def _workers(look: Look) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("worker", no_wrap=True)
    for title in ("version", "verified", "applied", "proven", "mismatches"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    rows = {row.name: row for row in look.snapshot.members}
    for name, outcome in sorted(look.workers.items()):
        row = rows.get(name)
        table.add_row(
            name,
            _or_dash(row.version if row else None),
            _or_dash(row.verified if row else None),
            str(outcome.applied),
            str(outcome.verified),
            Text(str(outcome.mismatches), style="bold red" if outcome.mismatches else ""),
            row.state if row else "not heard yet",
        )
    return table


def _answers(early: Answer, newest: Answer | None) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    for answer in (early, newest):
        if answer is not None:
            mark = ("✓", "green") if answer.right else ("✗", "red")
            table.add_row(
                Text(f"version {answer.version}", style="dim"),
                Text.assemble(f"sort {answer.prompt} = {answer.text} ", mark),
            )
    return table


def _or_dash(value: int | None) -> str:
    return "–" if value is None else str(value)
