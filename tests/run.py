"""Run the areas of tests/areas.toml: `python -m tests.run` runs all that this machine can.

--changed REV   only the areas whose tests or sources differ from that git revision
--area NAME     only this area; may be repeated
--require-gpu   what is skipped for want of a GPU fails instead
--list          say what would run, and run nothing

Each area runs in processes of its own under a deadline, so that one that hangs or crashes costs
only itself. Areas that keep real time run two at a time, for load would eat up their deadlines; the
quiet ones run beside them and give way to them. Each one's output is printed whole when it has
ended; where there is one core, areas run one by one, and speak as they go. The exit status is 0
only if nothing failed. The last line counts tests; a command of an area (a linter, say) counts as
one."""

import argparse
import asyncio
import functools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from .areas import (
    ROOT,
    Area,
    AreasError,
    describe,
    files,
    is_test,
    load,
    matches,
    read_outcomes,
)
from .results import Result, closing_line, count, ended, header, table

#: The priority of what gives way to everything else, and how many times as long it may take.
LOWEST = 19
PATIENCE = 3


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
    gpus = count_gpus() if any(area.gpus for area in areas) else 0
    link_package_by_name()
    results = asyncio.run(run_all(areas, gpus, options.require_gpu, lanes=cores()))
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


async def run_all(areas: Sequence[Area], gpus: int, require_gpu: bool, lanes: int) -> list[Result]:
    """Run the areas on so many cores, two of those that are not quiet at a time. Results in the
    areas' order."""
    results: dict[str, Result] = {}
    # The longest first, as their deadlines tell: what ends last should not be left to run alone.
    quiet = sorted((area for area in areas if area.quiet), key=lambda area: -area.timeout_s)
    loud = [area for area in areas if not area.quiet]
    if min(lanes, len(areas)) < 2 or not quiet:
        for area in areas:
            print(header(area), flush=True)
            results[area.name] = await run(area, gpus, require_gpu)
        return [results[area.name] for area in areas]

    # Of the others each takes about half a core, now none and now all of it; what is left over is
    # for the quiet ones.
    loud_at_once = asyncio.Semaphore(2)
    quiet_at_once = asyncio.Semaphore(lanes)

    async def run_beside(area: Area) -> None:
        async with quiet_at_once if area.quiet else loud_at_once:
            with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
                give_way = area.quiet and bool(loud)
                results[area.name] = await run(area, gpus, require_gpu, output, give_way=give_way)
                output.seek(0)
                print(f"{header(area)}\n{output.read()}", end="", flush=True)

    print("\n── several at a time, each shown when it has ended", flush=True)
    async with asyncio.TaskGroup() as beside:
        for area in [*loud, *quiet]:
            beside.create_task(run_beside(area))
    return [results[area.name] for area in areas]


async def run(
    area: Area,
    gpus: int,
    require_gpu: bool,
    output: IO[str] | None = None,
    *,
    give_way: bool = False,
) -> Result:
    """Run one area's commands and tests; they write to `output`, or where this process does.

    If they are to `give_way`, they take of the cores what others leave, and have time for that.
    """
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
        timeout_s = area.timeout_s * (PATIENCE if give_way else 1)
        begin = functools.partial(
            spawn, deadline=started + timeout_s, output=output, give_way=give_way
        )
        for command in area.commands:
            await run_command(result, command, begin)
        if area.tests:
            limits = (f"timeout={timeout_s:g}", f"faulthandler_timeout={timeout_s + 60:g}")
            options = [f"--override-ini={limit}" for limit in limits] if give_way else []
            await run_tests(result, [*options, *["--require-gpu"] * require_gpu], begin)
    result.wall_s = time.monotonic() - started
    return result


#: Runs a program with an environment; its exit status, or None if the deadline killed it.
Begin = Callable[[list[str], dict[str, str]], Awaitable[int | None]]


async def run_command(result: Result, command: Sequence[str], begin: Begin) -> None:
    """Run one command of an area, found beside this interpreter."""
    program = Path(sys.executable).parent / command[0]
    code = await begin([str(program), *command[1:]], environment(result.area))
    if code == 0:
        result.passed += 1
    else:
        result.fail(f"`{' '.join(command)}` {ended(code, result.area)}")


async def run_tests(result: Result, options: Sequence[str], begin: Begin) -> None:
    """Run one area's test files under pytest, with these options, and count what came of them."""
    paths = [p for p in files() if is_test(p) and matches(p, result.area.tests)]
    if not paths:
        result.fail(f"no test file matches {', '.join(result.area.tests)}")
        return
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "outcomes"
        command = [sys.executable, "-m", "pytest", "-qq", f"--outcomes={report}", *options, *paths]
        code = await begin(command, environment(result.area))
        count(result, read_outcomes(report), code)


def environment(area: Area) -> dict[str, str]:
    """This process's, and what the area adds to it.

    Bytecode is kept, whatever this one's says: without it each of the hundreds of processes that
    tests start would compile the package again, which takes it half a second.
    """
    given = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    return given | area.env


async def spawn(
    command: Sequence[str],
    env: dict[str, str],
    deadline: float,
    output: IO[str] | None = None,
    *,
    give_way: bool = False,
) -> int | None:
    """Run a program at the root; its exit status, or None if the deadline killed it.

    It leads a process group of its own, which is killed whole at the end, whatever that was: what
    its tests started and left behind dies with it.
    """
    process = await asyncio.create_subprocess_exec(
        *command, cwd=ROOT, env=env, start_new_session=True, stdout=output, stderr=output
    )
    try:
        if give_way:
            with suppress(ProcessLookupError, PermissionError):  # it has ended
                os.setpriority(os.PRIO_PROCESS, process.pid, LOWEST)
        async with asyncio.timeout(deadline - time.monotonic()):
            return await process.wait()
    except TimeoutError:
        return None
    finally:
        with suppress(ProcessLookupError, PermissionError):  # nobody is left: the usual end
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


def cores() -> int:
    """Cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return len(affinity(0)) if affinity else os.cpu_count() or 1


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
