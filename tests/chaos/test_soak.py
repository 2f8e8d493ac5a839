"""The soak as a command: what it says, and that nothing of it is left behind."""

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ..areas import ROOT
from .__main__ import soak
from .site import Site

pytestmark = pytest.mark.timeout(60)


def lives(pid: int) -> bool:
    """Whether a process is there; one that nobody has buried yet is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pids: list[int]) -> None:
    """Wait until none of them lives."""
    end = time.monotonic() + 10
    while living := [pid for pid in pids if lives(pid)]:
        assert time.monotonic() < end, f"still there: {living} of {pids}"
        time.sleep(0.02)


async def test_a_short_one_tells_how_it_ended(capsys: pytest.CaptureFixture[str]) -> None:
    """A few faults by lot: what was done, how all were at the end, exit status 0."""
    status = await soak(0.05, seed=3, pace_s=None, window=None)
    said = capsys.readouterr().out
    assert status == 0, said
    assert re.search(r"settled at version \d+", said)
    assert re.search(r"\d+ faults in \d+ episodes, seed 3", said)
    assert said.endswith("nobody was ever wrong, and all was well after each\n")


def test_nothing_outlives_it() -> None:
    """SIGKILL to the soak while one of its workers is stopped: all of them go with it."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.chaos", "--minutes", "1"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            assert process.stdout is not None
            pids: dict[str, int] = {}
            while len(pids) < 4:
                line = process.stdout.readline()
                if found := re.search(r"(\w+): pid (\d+)", line):
                    pids[found[1]] = int(found[2])
            assert all(map(lives, pids.values()))
            os.kill(pids["w1"], signal.SIGSTOP)
            process.kill()
            gone(list(pids.values()))
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


async def fail(pids: list[int]) -> None:
    async with Site() as site:
        await site.start()
        pids += [site.broker.pid, *(actor.said["hello"]["pid"] for actor in site.started())]
        site.workers[1].stop()
        site.broker.signal(signal.SIGSTOP)
        raise RuntimeError("a test fails")


async def test_nothing_outlives_a_test_that_fails() -> None:
    """A test raises while one worker is stopped and the broker too: all are gone, and what was
    done is told with the failure."""
    pids: list[int] = []
    with pytest.raises(RuntimeError) as raised:
        await fail(pids)
    await asyncio.to_thread(gone, pids)
    assert len(pids) == 4
    assert "w1: SIGSTOP" in raised.value.__notes__[0]
