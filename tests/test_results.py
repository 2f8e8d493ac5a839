"""tests/results.py and tests/harness.py: what is written down of tests, and what it counts for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .areas import ROOT, Area, Outcome, read_outcomes
from .results import Result, count


def area(**fields: object) -> Area:
    """An area for these tests."""
    return Area(**({"name": "a", "about": "an area", "tests": ("t",)} | fields))


def outcome(test: str, result: str, **binding: str) -> Outcome:
    """One line of pytest's outcomes."""
    return Outcome(test=test, binding=binding, result=result, reason="no GPU")


def test_counts_are_those_of_the_last_word() -> None:
    """A test passes and its teardown fails: it failed. A skip is counted with its reason."""
    result = Result(area=area())
    count(
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
    result = Result(area=area())
    outcomes = [outcome("x", "collected"), outcome("y", "collected"), outcome("x", "passed")]
    count(result, outcomes, code=-11)
    assert (result.passed, result.failed) == (1, 2)
    assert result.notes == ["never finished: y", "pytest died of SIGSEGV"]


@pytest.mark.parametrize(
    ("code", "told"),
    [(None, "were over"), (1, "status 1"), (2, "status 2"), (4, "status 4"), (5, "status 5")],
)
def test_no_end_but_success_passes(code: int | None, told: str) -> None:
    """pytest was killed, broke, or found nothing to run: the area fails although no test did."""
    result = Result(area=area())
    count(result, [outcome("x", "collected"), outcome("x", "passed")], code)
    assert result.failed == 1
    assert told in result.notes[0]


def test_an_entry_of_the_matrix_that_nothing_runs_fails_the_area() -> None:
    """The matrix promises two windows in two dtypes; one of the four is bound to no test, and one
    only to a test that was skipped, which is said."""
    axes = {"window": ("gloo", "bus"), "dtype": ("bfloat16", "float32")}
    result = Result(area=area(axes=axes))
    count(
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
    env = os.environ | {"PYTHONPATH": str(ROOT / "tests")}
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
