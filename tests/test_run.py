"""tests/run.py: what it chooses, what it counts, and that nothing it starts outlives its time."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from . import run as runner
from .areas import Area, AreasError, Outcome, files, load, matches, read_outcomes


def area(**fields: object) -> Area:
    """An area for these tests."""
    return Area(**({"name": "a", "about": "an area", "tests": ("t",)} | fields))


def outcome(test: str, result: str, **binding: str) -> Outcome:
    """One line of pytest's outcomes."""
    return Outcome(test=test, binding=binding, result=result, reason="no GPU")


@pytest.mark.parametrize(
    ("globs", "path", "expected"),
    [
        ("a/*.py", "a/b.py", True),
        ("a/*.py", "a/b/c.py", False),
        ("a/**/t_*.py", "a/t_x.py", True),
        ("a/**/t_*.py", "a/b/c/t_x.py", True),
        ("a/**/t_*.py", "a/b/c/x.py", False),
        ("a/**", "a/b/c", True),
        ("a/**", "ab/c", False),
        ("a.py", "axpy", False),
        ("**/*.py", "x.py", True),
        ("a/*.py !a/b*.py", "a/c.py", True),
        ("a/*.py !a/b*.py", "a/b1.py", False),
        ("!a/b*.py a/*.py", "a/b1.py", False),
        ("!a/b*.py", "a/c.py", False),
    ],
)
def test_globs_name_what_they_say(globs: str, path: str, expected: bool) -> None:
    """A star stays within a folder, two stars cross folders, a dot is a dot, a ! leaves out."""
    assert matches(path, globs.split()) is expected


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('[area.a]\nabout = "x"', "neither tests nor commands"),
        ('[area.a]\nabout = "x"\ntests = ["t"]\nneeds = "tpu"', "'tpu'"),
        ('[area.a]\nabout = "x"\ntests = "t"', "list of strings"),
        ('[area.a]\nabout = "x"\ntests = ["t"]\nuses = ["b"]', "uses 'b', which is no area"),
        ('[area.a]\ntests = ["t"]', "about"),
        ('[area.a]\nabout = "x"\ntests = ["t"]\nsource = ["s"]', r"unknown keys \['source'\]"),
        ("everywhere = []\nelsewhere = []", "elsewhere"),
    ],
)
def test_a_wrong_manifest_is_refused_by_name(tmp_path: Path, text: str, told: str) -> None:
    """Someone mistypes a key of areas.toml; the error names it instead of running less."""
    manifest = tmp_path / "areas.toml"
    manifest.write_text(text)
    with pytest.raises(AreasError, match=told):
        load(manifest)


def test_an_area_depends_on_what_the_areas_it_uses_depend_on(tmp_path: Path) -> None:
    """c uses b, b uses a: a change of a's sources, or of what counts everywhere, calls for c; what
    a leaves out is left out there only."""
    manifest = tmp_path / "areas.toml"
    manifest.write_text(
        'everywhere = ["pins"]\n'
        '[area.a]\nabout = "x"\ntests = ["ta"]\nsources = ["a/**", "!a/b"]\n'
        '[area.b]\nabout = "x"\ntests = ["tb"]\nsources = ["b/**"]\nuses = ["a"]\n'
        '[area.c]\nabout = "x"\ntests = ["tc"]\nsources = ["a/b"]\nuses = ["b"]\n'
    )
    paths = ["pins", "a/a", "a/b", "b/b", "ta", "tb", "tc"]
    chosen = {n: [p for p in paths if a.depends_on(p)] for n, a in load(manifest).items()}
    assert chosen == {
        "a": ["pins", "a/a", "ta"],
        "b": ["pins", "a/a", "b/b", "tb"],
        "c": ["pins", "a/a", "a/b", "b/b", "tc"],
    }


def test_counts_are_those_of_the_last_word() -> None:
    """A test passes and its teardown fails: it failed. A skip is counted with its reason."""
    result = runner.Result(area=area())
    runner.count(
        result,
        [
            outcome("x", "collected"),
            outcome("y", "collected"),
            outcome("z", "collected"),
            outcome("x", "passed"),
            outcome("y", "passed"),
            outcome("y", "failed"),
            outcome("z", "skipped"),
        ],
        code=1,
    )
    assert (result.passed, result.failed, result.skipped) == (1, 1, 1)
    assert result.notes == ["failed y", "skipped z: no GPU"]
    assert result.verdict == "failed"


def test_a_crash_fails_what_had_not_finished() -> None:
    """pytest dies of a signal in its second test: the first passed, the second did not, and the
    crash is told."""
    result = runner.Result(area=area())
    outcomes = [outcome("x", "collected"), outcome("y", "collected"), outcome("x", "passed")]
    runner.count(result, outcomes, code=-11)
    assert (result.passed, result.failed) == (1, 2)
    assert result.notes == ["never finished: y", "pytest died of SIGSEGV"]


@pytest.mark.parametrize(
    ("code", "told"),
    [(None, "were over"), (1, "status 1"), (2, "status 2"), (4, "status 4"), (5, "status 5")],
)
def test_no_end_but_success_passes(code: int | None, told: str) -> None:
    """pytest was killed, broke, or found nothing to run: the area fails although no test did."""
    result = runner.Result(area=area())
    runner.count(result, [outcome("x", "collected"), outcome("x", "passed")], code)
    assert result.failed == 1
    assert told in result.notes[0]


def test_an_entry_of_the_matrix_that_nothing_runs_fails_the_area() -> None:
    """The matrix promises two windows in two dtypes; one of the four is bound to no test, and one
    only to a test that was skipped, which is said."""
    axes = {"window": ("gloo", "bus"), "dtype": ("bfloat16", "float32")}
    result = runner.Result(area=area(axes=axes))
    runner.count(
        result,
        [
            outcome("x", "passed", window="gloo", dtype="bfloat16", other="1"),
            outcome("y", "passed", window="gloo", dtype="float32"),
            outcome("z", "skipped", window="bus", dtype="bfloat16"),
            outcome("w", "passed", window="bus"),
        ],
        code=0,
    )
    assert result.notes == [
        "skipped z: no GPU",
        "matrix: window=bus dtype=bfloat16 was skipped",
        "matrix: no test runs window=bus dtype=float32",
    ]
    assert result.failed == 1


@pytest.mark.parametrize("require", [False, True])
def test_a_missing_gpu_skips_by_name_or_fails(require: bool) -> None:
    """The area needs four GPUs, two are here: skipped with that reason, or failed if required."""
    result = runner.run(area(gpus=4), 2, require)
    assert result.notes == ["needs 4 NVIDIA GPU(s), 2 here"]
    assert result.verdict == ("failed" if require else "skipped")


def test_a_failing_command_fails_its_area() -> None:
    """One command of two ends with a status: one passed, one failed, and which is said."""
    commands = (("python", "-c", "pass"), ("python", "-c", "raise(SystemExit(3))"))
    result = runner.run(area(tests=(), commands=commands), 0, False)
    assert (result.passed, result.failed) == (1, 1)
    assert result.notes == ["`python -c raise(SystemExit(3))` ended with status 3"]


def test_an_area_without_a_test_file_fails() -> None:
    """The files an area names were moved away: it fails and does not pass empty."""
    result = runner.run(area(tests=("tests/nowhere/test_*.py",)), 0, False)
    assert result.verdict == "failed"
    assert result.notes == ["no test file matches tests/nowhere/test_*.py"]


@pytest.mark.parametrize(("end", "code"), [("wait", None), ("exit 7", 7)])
def test_no_child_outlives_its_area(tmp_path: Path, end: str, code: int | None) -> None:
    """A test hangs until the deadline, or ends and leaves a child behind: the child is gone."""
    pid_file = tmp_path / "pid"
    script = f"sleep 600 & echo $! > {pid_file}; {end}"
    started = time.monotonic()
    assert runner.spawn(["sh", "-c", script], dict(os.environ), started + 1.0) == code
    assert time.monotonic() - started < 10
    child = int(pid_file.read_text())
    for _ in range(100):
        if not running(child):
            break
        time.sleep(0.05)
    assert not running(child)


def running(pid: int) -> bool:
    """Whether a process is there and is no zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not (stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z")


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


def test_what_tools_leave_behind_is_no_file_of_the_project(tmp_path: Path) -> None:
    """A virtual environment, caches and build products lie about; only the rest counts."""
    for name in (
        "a.py",
        ".ci/run",
        ".gitignore",
        ".venv/lib/x.py",
        ".git/config",
        "b/__pycache__/a.pyc",
        "build/lib/x.py",
        "s.egg-info/PKG-INFO",
        "tests/test_a.py",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert files(tmp_path) == [".ci/run", ".gitignore", "a.py", "tests/test_a.py"]


STORIES = """
import pytest, torch

@pytest.fixture
def broken():
    yield
    raise OSError("teardown")

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "window", ["gloo", pytest.param("b", marks=pytest.mark.matrix(window="bus"))]
)
def test_bound(window, dtype): pass

@pytest.mark.gpu(99)
def test_gpu(): raise AssertionError("ran without its GPUs")

def test_torn_down(broken): pass
"""


@pytest.mark.parametrize("require", [False, True])
def test_outcomes_say_what_ran_and_with_what(tmp_path: Path, require: bool) -> None:
    """A file of tests with parameters, a marker, a missing GPU and a failing teardown is run, and
    the outcomes have each test's binding and its last word."""
    stories = tmp_path / "test_stories.py"
    stories.write_text(STORIES)
    report = tmp_path / "outcomes"
    command = [sys.executable, "-m", "pytest", "-qq", "-p", "harness", f"--outcomes={report}"]
    command += ["--rootdir", str(tmp_path), "-c", os.devnull, str(stories)]
    env = os.environ | {"PYTHONPATH": str(runner.ROOT / "tests")}
    done = subprocess.run(
        command + ["--require-gpu"] * require,
        cwd=tmp_path,
        env=env,
        capture_output=True,
        timeout=90,
    )
    assert done.returncode == 1, done.stderr
    last = {o.test.partition("::")[2]: o for o in read_outcomes(report)}
    bindings = [o.binding for o in last.values() if "test_bound" in o.test]
    assert bindings == [
        {"window": "gloo", "dtype": "bfloat16"},
        {"window": "gloo", "dtype": "float32"},
        {"window": "bus", "dtype": "bfloat16"},
        {"window": "bus", "dtype": "float32"},
    ]
    assert last["test_gpu"].result == ("failed" if require else "skipped")
    if not require:
        assert "needs 99 NVIDIA GPU(s)" in last["test_gpu"].reason
    assert last["test_torn_down"].result == "failed"
