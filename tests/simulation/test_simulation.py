"""The driver, both faces and both cores, journal, lease and log, on simulated everything else.

Two hundred seeds of faults in every run of the tests; thousands by `python -m tests.simulate`. That
the rules would be broken if the product were, planted bugs show.
"""

import asyncio
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from .course import Course
from .plan import DISK_KINDS, KINDS, Plan
from .planted import PLANTED
from .world import Result, simulate

SEEDS = range(200)
#: A planted bug may need a rare course of things: one in fifty seeds, say.
HUNTED = SEEDS
#: Seeds that have found one lately: tried first, for the time that it saves, and no more than that.
LATELY = {
    "base unchecked": 5,
    "journal not awaited": 7,
    "old epoch kept": 1,
    "log given up": 18,
    "lower window kept": 25,
    "unsafe forgotten": 8,
    "fence down": 6,
    "evaluators awaited": 2,
    "resumed as is": 5,
}


@cache
def played(seed: int) -> Result:
    """The run of a seed, played once for all tests that look at it."""
    return simulate(seed)


def show(result: Result) -> str:
    """What a reader of a failed test needs."""
    return "\n".join(
        [
            f"replay it: python -m tests.simulate --seed {result.seed} --trace",
            *result.violations,
        ]
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_the_rules_hold_under_faults(seed: int) -> None:
    """Trainers and workers are killed, stopped and cut off, messages and payloads are lost, doubled
    and flipped, the broker forgets: no reader sees half an update, no update is applied on a wrong
    base, publish() takes no time, and once the faults are over all hold the newest version.
    """
    result = played(seed)
    assert not result.violations, show(result)
    assert result.applied
    assert result.reads


def test_a_run_without_an_end_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The world waits for what nobody brings while all processes idle: a violation, at a place."""

    async def never(self: Course) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(Course, "_converge", never)
    result = simulate(3)
    assert "no end after" in result.violations[0]
    assert "play > never > wait" in result.violations[0]


def test_every_kind_of_fault_is_brought() -> None:
    """The seeds of this suite, and a few more, meet every kind of fault that there is."""
    brought = {fault.kind for seed in SEEDS for fault in Plan.of(seed).faults}
    assert brought == {*KINDS, *DISK_KINDS}


def test_most_rounds_go_before_the_journal_is_asked() -> None:
    """What the rules are held against is the short way of a round, with the long one among it."""
    results = [played(seed) for seed in SEEDS[:10]]
    early = sum(result.early for result in results)
    windows = sum(result.rounds.get(kind, 0) for result in results for kind in ("gloo", "bus"))
    assert 0.5 * windows < early < windows


def test_a_seed_is_played_the_same_again() -> None:
    """One seed gives one trace, to the letter: in this process, and in another one that hashes
    strings differently.
    """
    once, again = simulate(5, trace=True), simulate(5, trace=True)
    assert len(once.trace) > 500
    assert once.trace == again.trace
    other = subprocess.run(
        [sys.executable, "-m", "tests.simulate", "--seed", "5", "--trace"],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"PYTHONHASHSEED": "12345"},
        capture_output=True,
        text=True,
        timeout=400,
        check=True,
    )
    lines = [line.rstrip() for line in "\n".join(once.trace).splitlines()]
    told = [line.rstrip() for line in other.stdout.splitlines()]
    assert told[: len(lines)] == lines


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_found(bug: str) -> None:
    """The product is broken in one place; one of the seeds finds it, and says what is wrong. What
    else comes of it, in other seeds, is not held against it."""
    plant, words = PLANTED[bug]
    told = "nothing was found"
    with plant():
        for seed in [LATELY.get(bug, 0), *HUNTED]:
            result = simulate(seed)
            if result.violations:
                told = show(result)
                if any(word in told for word in words):
                    return
    pytest.fail(f"{len(HUNTED)} seeds, and {told}")
