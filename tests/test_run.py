"""tests/run.py: what it chooses, what runs beside what, and that nothing outlives its time."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from . import run as runner
from .areas import Area, AreasError


def area(**fields: object) -> Area:
    """An area for these tests."""
    return Area(**({"name": "a", "about": "an area", "tests": ("t",)} | fields))


@pytest.mark.parametrize("require", [False, True])
async def test_a_missing_gpu_skips_by_name_or_fails(require: bool) -> None:
    """The area needs four GPUs, two are here: skipped with that reason, or failed if required."""
    result = await runner.run(area(gpus=4), 2, require)
    assert result.notes == ["needs 4 NVIDIA GPU(s), 2 here"]
    assert result.verdict == ("failed" if require else "skipped")


async def test_a_failing_command_fails_its_area() -> None:
    """One command of two ends with a status: one passed, one failed, and which is said."""
    commands = (("python", "-c", "pass"), ("python", "-c", "raise(SystemExit(3))"))
    result = await runner.run(area(tests=(), commands=commands), 0, False)
    assert (result.passed, result.failed) == (1, 1)
    assert result.notes == ["`python -c raise(SystemExit(3))` ended with status 3"]


async def test_an_area_without_a_test_file_fails() -> None:
    """The files an area names were moved away: it fails and does not pass empty."""
    result = await runner.run(area(tests=("tests/nowhere/test_*.py",)), 0, False)
    assert result.verdict == "failed"
    assert result.notes == ["no test file matches tests/nowhere/test_*.py"]


@pytest.mark.parametrize(("end", "code"), [("wait", None), ("exit 7", 7)])
async def test_no_child_outlives_its_area(tmp_path: Path, end: str, code: int | None) -> None:
    """A test hangs until the deadline, or ends and leaves a child behind: the child is gone."""
    pid_file = tmp_path / "pid"
    script = f"sleep 600 & echo $! > {pid_file}; {end}"
    started = time.monotonic()
    assert await runner.spawn(["sh", "-c", script], dict(os.environ), started + 1.0) == code
    assert time.monotonic() - started < 10
    assert ends(int(pid_file.read_text()))


def ends(pid: int, timeout_s: float = 10.0) -> bool:
    """Whether a process is gone before long."""
    deadline = time.monotonic() + timeout_s
    while running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not running(pid)


def running(pid: int) -> bool:
    """Whether a process is there and is no zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not (stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z")


def acting(name: str, script: str, **fields: object) -> Area:
    """An area whose one command is a shell script."""
    program = f"import subprocess, sys; sys.exit(subprocess.call(['bash', '-c', {script!r}]))"
    return area(name=name, tests=(), commands=(("python", "-c", program),), **fields)


#: say WORD, and wait until a WORD of somebody else is there: neither goes on without the other.
TALK = 'say() { echo "$1"; touch "$1"; }; await() { until [ -e "$1" ]; do sleep 0.05; done; }; '


async def test_two_areas_run_at_a_time_and_quiet_ones_beside_them(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two areas and a quiet one speak by turns, so that none could end alone; a third one begins
    when one of the first two is over. The quiet one has the lowest priority; each one's output is
    whole, and results are in the file's order."""
    talk = f"cd {tmp_path}; {TALK}"
    first = acting("first", f"{talk} say f1; await s1; await q1; sleep 0.3; [ ! -e t1 ] && say f2")
    second = acting("second", f"{talk} await f1; say s1; await f2; await t1; say s2")
    third = acting("third", f"{talk} ls f2; say t1")
    quiet = acting("quiet", f"{talk} nice; await s1; say q1 >&2; await s2; say q2", quiet=True)
    results = await runner.run_all([first, quiet, second, third], 0, False, lanes=2)
    assert [(r.area.name, r.verdict) for r in results] == [
        ("first", "passed"),
        ("quiet", "passed"),
        ("second", "passed"),
        ("third", "passed"),
    ]
    out = capfd.readouterr().out
    assert "── first: an area\nf1\nf2\n" in out
    assert "── second: an area\ns1\ns2\n" in out
    assert "── third: an area\nf2\nt1\n" in out
    assert f"── quiet: an area\n{runner.LOWEST}\nq1\nq2\n" in out


async def test_quiet_areas_alone_run_beside_each_other(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two quiet areas speak by turns, so that neither could end alone, and give way to nobody."""
    talk = f"cd {tmp_path}; {TALK}"
    a = acting("a", f"{talk} nice; say a1; await b1; say a2; await b2; sleep 0.5", quiet=True)
    b = acting("b", f"{talk} await a1; say b1 >&2; await a2; say b2", quiet=True)
    await runner.run_all([a, b], 0, False, lanes=2)
    out = capfd.readouterr().out
    assert f"── a: an area\n{os.getpriority(os.PRIO_PROCESS, 0)}\na1\na2\n" in out
    assert "── b: an area\nb1\nb2\n" in out


async def test_as_many_quiet_areas_as_cores_run_beside_the_others(tmp_path: Path) -> None:
    """Two quiet areas and one that keeps time speak by turns: none could end without the others."""
    talk = f"cd {tmp_path}; {TALK}"
    loud = acting("loud", f"{talk} await a1; await b1; say over", timeout_s=60)
    a = acting("a", f"{talk} say a1; await b1; await over", quiet=True, timeout_s=60)
    b = acting("b", f"{talk} say b1; await a1; await over", quiet=True, timeout_s=60)
    results = await runner.run_all([loud, a, b], 0, False, lanes=2)
    assert [result.verdict for result in results] == ["passed"] * 3


async def test_quiet_areas_take_turns_where_there_are_fewer_lanes(tmp_path: Path) -> None:
    """Three quiet areas and two lanes: never more than two at once, the longest two begin. With one
    lane, or with nobody to run beside, they run one by one, in the order of the file."""
    enter = (
        f'cd {tmp_path}; touch "$0".in; ls *.in | wc -l >> counts; echo $0 >> order; sleep 0.3; '
    )
    script = enter + 'rm "$0".in'
    areas = [
        acting(name, script.replace("$0", name), quiet=True, timeout_s=timeout_s)
        for name, timeout_s in (("short", 60), ("long", 90), ("longer", 120))
    ]

    def read(name: str) -> list[str]:
        words = (tmp_path / name).read_text().split()
        (tmp_path / name).unlink()
        return words

    await runner.run_all(areas, 0, False, lanes=2)
    assert max(map(int, read("counts"))) <= 2
    assert read("order")[2] == "short"
    for chosen, lanes in ((areas, 1), (areas[:1], 2)):
        await runner.run_all(chosen, 0, False, lanes=lanes)
        assert set(read("counts")) == {"1"}
        assert read("order") == [a.name for a in chosen]


async def test_a_quiet_area_that_hangs_costs_only_itself(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """One of two areas that run beside each other hangs with a child of its own: its deadline ends
    both, what it wrote is shown, and the other one passes."""
    pid_file = tmp_path / "pid"
    script = f"echo so far; sleep 600 & echo $! > {pid_file}; wait"
    hung = acting("hung", script, quiet=True, timeout_s=3.0)
    other = acting("other", "sleep 3.5; echo done", quiet=True)
    results = await runner.run_all([hung, other], 0, False, lanes=2)
    assert [result.verdict for result in results] == ["failed", "passed"]
    assert results[0].notes[0].endswith("was killed: the area's 3 s were over")
    assert ends(int(pid_file.read_text()))
    out = capfd.readouterr().out
    assert "── hung: an area\nso far\n" in out
    assert out.endswith("── other: an area\ndone\n")


INTERRUPTED = """
import asyncio, signal, sys
from tests import run, test_run

# Whoever runs the tests in the background has them, and so this one, ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)
script = "echo $$ > {}.new; mv {}.new {}; exec sleep 600"
areas = [test_run.acting(name, script.replace("{}", name), quiet=True) for name in sys.argv[1:]]
asyncio.run(run.run_all(areas, 0, False, lanes=2))
"""


def test_an_interrupt_ends_what_runs(tmp_path: Path) -> None:
    """Somebody presses ^C while two quiet areas run: neither goes on, and a third never begins."""
    first, second, third = marks = [tmp_path / name for name in ("first", "second", "third")]
    command = [sys.executable, "-c", INTERRUPTED, *map(str, marks)]
    with subprocess.Popen(command, cwd=runner.ROOT, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not (first.exists() and second.exists()) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        try:
            _, told = process.communicate(timeout=60)
        finally:
            process.kill()  # or leaving would wait for one that does not end
    assert told.rstrip().endswith("KeyboardInterrupt")
    assert process.returncode == -signal.SIGINT
    assert all(ends(int(mark.read_text())) for mark in (first, second))
    assert not third.exists()


def test_changed_chooses_by_tests_and_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """A source of one area and a test of another changed: these two run, the third does not."""
    areas = {
        "a": area(name="a", tests=("ta",), sources=("a/**",)),
        "b": area(name="b", tests=("tb",), sources=("b/**",)),
        "c": area(name="c", tests=("tc",), sources=("c/**",)),
    }
    monkeypatch.setattr(runner, "changed_files", lambda revision: ["a/x.py", "tb"])
    assert [a.name for a in runner.choose(areas, [], "HEAD")] == ["a", "b"]
    assert [a.name for a in runner.choose(areas, ["b", "c"], "HEAD")] == ["b"]
    assert [a.name for a in runner.choose(areas, ["c"], None)] == ["c"]
    with pytest.raises(AreasError, match="no area 'd'; there are a, b, c"):
        runner.choose(areas, ["d"], None)


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_changed_files_are_all_that_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Since a revision one file was committed, one staged, one edited, one deleted, one renamed,
    one is new and one is ignored: all but the ignored and the untouched one count."""

    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=t", "-c", "user.email=t@localhost"]
        identity += ["-c", "commit.gpgsign=false", "-c", "tag.gpgsign=false"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, timeout=30)

    def write(name: str, text: str) -> None:
        (tmp_path / name).write_text(text)

    git("init", "--quiet")
    write(".gitignore", "ignored\n")
    for name in ("committed", "staged", "edited", "deleted", "renamed", "untouched"):
        write(name, name)
    git("add", ".")
    git("commit", "--quiet", "-m", "first")
    git("tag", "first")
    write("committed", "2")
    git("commit", "--quiet", "-am", "second")
    write("staged", "2")
    git("add", "staged")
    write("edited", "2")
    (tmp_path / "deleted").unlink()
    git("mv", "renamed", "moved")
    write("new", "2")
    write("ignored", "2")
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    assert runner.changed_files("first") == [
        "committed",
        "deleted",
        "edited",
        "moved",
        "new",
        "renamed",
        "staged",
    ]


@pytest.mark.skipif(not (runner.ROOT / ".git").exists(), reason="needs a clone, not an archive")
def test_a_revision_that_is_none_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    """Someone mistypes the revision: git's words, status 2, and nothing runs."""
    assert runner.main(["--changed", "no-such-revision"]) == 2
    assert "no-such-revision" in capfd.readouterr().err


def test_the_exit_status_and_the_last_line_tell(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """One area passes and one fails: status 1, and the last line counts both as pytest would."""
    good = area(name="good", tests=(), commands=(("python", "-c", "pass"),))
    bad = area(name="bad", tests=(), commands=(("python", "-c", "1/0"),))
    monkeypatch.setattr(runner, "load", lambda: {"good": good, "bad": bad})
    assert runner.main([]) == 1
    assert capfd.readouterr().out.splitlines()[-1].startswith("1 failed, 1 passed in ")
    assert runner.main(["--area", "good"]) == 0
    assert capfd.readouterr().out.splitlines()[-1].startswith("1 passed in ")
