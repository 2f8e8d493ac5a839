"""bench/recovery.py: real workers die and stop in its rounds, and it tells what that cost."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benches import refusal

ROOT = Path(__file__).parents[2]


def bench(*words: str, timeout_s: float = 110.0) -> subprocess.CompletedProcess[str]:
    """Run the bench as a person does."""
    return subprocess.run(
        [sys.executable, "bench/recovery.py", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


def test_a_small_run_is_whole(tmp_path: Path) -> None:
    """One of two workers is killed after its ready, then its successor is stopped at its receive
    and resumed: the other one goes on in bounded time, and the document tells both cases."""
    path = tmp_path / "recovery.json"
    done = bench(
        *("--device", "cpu", "--workers", "2", "--repeats", "1", "--elements", "200000"),
        *("--cases", "killed-ready,stopped-receiving", "--around-s", "0.5"),
        *("--ready-s", "0.5", "--send-s", "1", "--json", str(path)),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every survivor holds the trainer's bits" in done.stdout
    document = json.loads(path.read_text())
    assert document["command"].startswith("python bench/recovery.py --device cpu --workers 2")
    assert str(tmp_path) not in path.read_text()
    assert document["window"] == "gloo"
    killed, stopped = document["cases"]
    assert (killed["case"], stopped["case"]) == ("killed-ready", "stopped-receiving")
    for case in (killed, stopped):
        assert case["digests_equal"]
        assert case["held_s"]["n"] == 1
        # Far from the 30 s after which "never" would be written.
        held, following, again = (case[k]["max"] for k in ("held_s", "next_s", "window_again_s"))
        assert 0 <= held <= following <= again < 15
        assert case["deadline_s"] == pytest.approx(1.01, abs=0.05)
        assert case["publish_ms"]["before"]["n"] >= 3
        assert 0 < case["publish_ms"]["before"]["p50"] <= case["publish_ms"]["before"]["max"]
    assert "back_s" not in killed
    assert 0 <= stopped["back_s"]["max"] < 15
    # A stop is only noticed by a deadline: the loop has gone on publishing meanwhile.
    assert stopped["publish_ms"]["during"]["n"] >= 3
    assert len(document["targets"]) >= 3
    assert all(one["what"] in done.stdout for one in document["targets"])


def test_no_worker_outlives_the_bench(tmp_path: Path) -> None:
    """The bench is terminated while a worker is stopped: no process of it is left."""
    command = [sys.executable, "bench/recovery.py", "--workers", "2", "--elements", "200000"]
    command += ["--cases", "stopped-idle", "--repeats", "1", "--around-s", "0.5"]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as running:
        stopped: list[int] = []
        try:
            for _ in range(600):
                children = _children(running.pid)
                stopped = [pid for pid in children if _state(pid) == "T"]
                if stopped or running.poll() is not None:
                    break
                try:
                    running.wait(0.1)
                except subprocess.TimeoutExpired:
                    continue
            assert stopped, running.communicate(timeout=20)[0].decode()
            running.terminate()
            output = running.communicate(timeout=40)[0].decode()
        finally:
            running.kill()
        assert running.returncode == 130, output
    assert [pid for pid in children if _state(pid) not in ("", "Z")] == []


def _children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        found += [int(word) for word in task.read_text().split()]
    return found


def _state(pid: int) -> str:
    """The state letter of a process; "" if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--workers", "1"], "nobody survives"),
        (["--cases", "bored"], "'bored' is none of killed-idle"),
        (["--json", os.path.join("no", "such", "folder.json")], "there is no folder"),
    ],
    ids=["workers", "case", "json"],
)
def test_a_wrong_flag_is_named(words: list[str], reason: str) -> None:
    """Nothing is started, and the message says what is wrong."""
    assert reason in refusal("recovery.py", *words)
