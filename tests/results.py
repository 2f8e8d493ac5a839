"""What became of areas: counted from pytest's outcomes and exit statuses, and told as a table."""

import signal
from collections.abc import Sequence
from dataclasses import dataclass, field

from .areas import Area, Outcome, covers, describe

_WORDS = ("failed", "passed", "skipped")


@dataclass(kw_only=True)
class Result:
    """What became of one area."""

    area: Area
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    notes: list[str] = field(default_factory=list)
    """What a reader must know: missing hardware, deadlines, crashes, entries that nothing ran."""
    wall_s: float = 0.0

    def fail(self, note: str) -> None:
        """Count one failure and say why."""
        self.failed += 1
        self.notes.append(note)

    @property
    def verdict(self) -> str:
        """failed, skipped (nothing ran) or passed."""
        if self.failed:
            return "failed"
        return "passed" if self.passed else "skipped"


def count(result: Result, outcomes: Sequence[Outcome], code: int | None) -> None:
    """Add pytest's outcomes to an area's result; `code` is its exit status, None if killed."""
    last = {outcome.test: outcome for outcome in outcomes}  # a failing teardown has the last word
    for outcome in last.values():
        match outcome.result:
            case "passed":
                result.passed += 1
            case "skipped":
                result.skipped += 1
                result.notes.append(f"skipped {outcome.test}: {outcome.reason}")
            case "failed":
                result.fail(f"failed {outcome.test}")
            case _:
                result.fail(f"never finished: {outcome.test}")
    if code not in (0, 1) or (code == 1 and not result.failed):
        result.fail(f"pytest {ended(code, result.area)}")
    for entry in result.area.entries():
        bound = [o for o in last.values() if covers(o.binding, entry)]
        if not bound:
            result.fail(f"matrix: no test runs {describe(entry)}")
        elif all(o.result == "skipped" for o in bound):
            result.notes.append(f"matrix: {describe(entry)} was skipped")


def ended(code: int | None, area: Area) -> str:
    """How a program of an area ended that did not end well; `code` is None if it was killed."""
    if code is None:
        return f"was killed: the area's {area.timeout_s:.0f} s were over"
    if code < 0:
        return f"died of {signal.Signals(-code).name}"
    return f"ended with status {code}"


def header(area: Area) -> str:
    """What stands above the output of an area."""
    return f"\n── {area.name}: {area.about}"


def table(results: Sequence[Result]) -> str:
    """One line an area, its notes below it."""
    width = max([len("area"), *(len(r.area.name) for r in results)])
    lines = ["", f"{'area':<{width}}  result   passed  failed  skipped     time"]
    for r in results:
        lines.append(
            f"{r.area.name:<{width}}  {r.verdict:<7}  {r.passed:>6}  {r.failed:>6}  {r.skipped:>7}"
            f"  {r.wall_s:>6.1f}s"
        )
        lines += [f"{'':<{width}}  · {note}" for note in r.notes]
    return "\n".join([*lines, ""])


def closing_line(results: Sequence[Result], wall_s: float) -> str:
    """The counts as pytest words them: 12 passed, 1 failed in 3.21s."""
    counts = {word: sum(getattr(r, word) for r in results) for word in _WORDS}
    said = [f"{n} {word}" for word, n in counts.items() if n or word == "passed"]
    return f"{', '.join(said)} in {wall_s:.2f}s"
