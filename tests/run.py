"""Run the areas of tests/areas.toml: `python -m tests.run` runs all that this machine can.

--changed REV   only the areas whose tests or sources differ from that git revision
--area NAME     only this area; may be repeated
--require-gpu   what is skipped for want of a GPU fails instead
--list          say what would run, and run nothing

Each area runs in processes of its own under a deadline, so that one that hangs or crashes costs
only itself. The exit status is 0 only if nothing failed. The last line counts tests; a command of
an area (a linter, say) counts as one.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from .areas import (
    ROOT,
    Area,
    AreasError,
    Outcome,
    covers,
    describe,
    files,
    is_test,
    load,
    matches,
    read_outcomes,
)


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


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the arguments choose; returns the exit status."""
    options = _arguments(argv)
    try:
        areas = choose(load(), options.area, options.changed)
    except (AreasError, subprocess.CalledProcessError) as exc:
        print(f"tests.run: {getattr(exc, 'stderr', None) or exc}", file=sys.stderr)
        return 2
    if options.list:
        for area in areas:
            needs = f"{area.gpus} GPUs" if area.gpus else "cpu"
            print(f"{area.name:<12} {needs:<7} {area.about}")
            for entry in area.entries():
                print(f"{'':<20} {describe(entry)}")
        return 0
    started = time.monotonic()
    results = []
    gpus = count_gpus() if any(area.gpus for area in areas) else 0
    link_package_by_name()
    for area in areas:
        print(f"\n── {area.name}: {area.about}", flush=True)
        results.append(run(area, gpus, options.require_gpu))
    print(table(results))
    print(closing_line(results, time.monotonic() - started), flush=True)
    return 1 if any(result.failed for result in results) else 0


def choose(areas: dict[str, Area], names: Sequence[str], revision: str | None) -> list[Area]:
    """The areas that the arguments ask for, in the order of the file."""
    if unknown := [name for name in names if name not in areas]:
        raise AreasError(f"no area {unknown[0]!r}; there are {', '.join(areas)}")
    chosen = [area for area in areas.values() if not names or area.name in names]
    if revision is None:
        return chosen
    changed = changed_files(revision)
    return [area for area in chosen if any(area.depends_on(path) for path in changed)]


def changed_files(revision: str) -> list[str]:
    """Files that differ from a revision: committed, staged, edited, new or deleted since."""
    since = _git("diff", "--name-only", "--no-renames", revision, "--")
    new = _git("ls-files", "--others", "--exclude-standard")
    return sorted({*since, *new})


def run(area: Area, gpus: int, require_gpu: bool) -> Result:
    """Run one area's commands and tests."""
    result = Result(area=area)
    started = time.monotonic()
    if area.gpus > gpus:
        note = f"needs {area.gpus} NVIDIA GPU(s), {gpus} here"
        if require_gpu:
            result.fail(note)
        else:
            result.skipped += 1
            result.notes.append(note)
    else:
        deadline = started + area.timeout_s
        env = os.environ | area.env
        for command in area.commands:
            run_command(result, command, env, deadline)
        if area.tests:
            run_tests(result, require_gpu, env, deadline)
    result.wall_s = time.monotonic() - started
    return result


def run_command(
    result: Result, command: Sequence[str], env: dict[str, str], deadline: float
) -> None:
    """Run one command of an area, found beside this interpreter."""
    program = Path(sys.executable).parent / command[0]
    code = spawn([str(program), *command[1:]], env, deadline)
    if code == 0:
        result.passed += 1
    else:
        result.fail(f"`{' '.join(command)}` {_ended(code, result.area)}")


def run_tests(result: Result, require_gpu: bool, env: dict[str, str], deadline: float) -> None:
    """Run one area's test files under pytest and count what came of them."""
    paths = [p for p in files() if is_test(p) and matches(p, result.area.tests)]
    if not paths:
        result.fail(f"no test file matches {', '.join(result.area.tests)}")
        return
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "outcomes"
        command = [sys.executable, "-m", "pytest", "-qq", f"--outcomes={report}", *paths]
        code = spawn(command + ["--require-gpu"] * require_gpu, env, deadline)
        count(result, read_outcomes(report), code)


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
        result.fail(f"pytest {_ended(code, result.area)}")
    for entry in result.area.entries():
        bound = [o for o in last.values() if covers(o.binding, entry)]
        if not bound:
            result.fail(f"matrix: no test runs {describe(entry)}")
        elif all(o.result == "skipped" for o in bound):
            result.notes.append(f"matrix: {describe(entry)} was skipped")


def spawn(command: Sequence[str], env: dict[str, str], deadline: float) -> int | None:
    """Run a program at the root; its exit status, or None if the deadline killed it.

    It leads a process group of its own, which is killed whole at the end, whatever that was: what
    its tests started and left behind dies with it.
    """
    process = subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True)
    try:
        return process.wait(timeout=max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return None
    finally:
        with suppress(ProcessLookupError, PermissionError):  # nobody is left: the usual end
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def count_gpus() -> int:
    """NVIDIA GPUs that torch can use here, asked in a process of its own."""
    program = "import torch; print(torch.cuda.device_count())"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True
    )
    return int(done.stdout)


def link_package_by_name() -> None:
    """Give the root its package's name in build/by-name, where pyproject.toml sends mypy.

    The root is the package, whatever the checkout's folder is called; mypy finds a package by the
    name of its folder only and does not follow editable installs.
    """
    link = ROOT / "build" / "by-name" / "sparsecast"
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.exists():
        link.symlink_to(ROOT, target_is_directory=True)


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


_WORDS = ("failed", "passed", "skipped")


def _ended(code: int | None, area: Area) -> str:
    if code is None:
        return f"was killed: the area's {area.timeout_s:.0f} s were over"
    if code < 0:
        return f"died of {signal.Signals(-code).name}"
    return f"ended with status {code}"


def _git(*arguments: str) -> list[str]:
    done = subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout.splitlines()


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.run", description="Run the areas of tests/areas.toml."
    )
    parser.add_argument("--area", action="append", default=[], metavar="NAME", help="only this one")
    parser.add_argument("--changed", metavar="REV", help="only areas whose files differ from REV")
    parser.add_argument("--require-gpu", action="store_true", help="a missing GPU is a failure")
    parser.add_argument("--list", action="store_true", help="say what would run, run nothing")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
