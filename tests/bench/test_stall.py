"""bench/stall.py in real processes, and how it tells a forward that an apply fell into."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benches import refusal

ROOT = Path(__file__).parents[2]


def bench(*words: str, timeout_s: float = 90.0) -> subprocess.CompletedProcess[str]:
    """Run the bench as a person does."""
    return subprocess.run(
        [sys.executable, "bench/stall.py", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


def test_a_small_run_is_whole(tmp_path: Path) -> None:
    """A tiny model computes with updates and without: forwards of both kinds are there, every
    update was proven on the worker, and the document has each figure with its spread."""
    path = tmp_path / "stall.json"
    size = ["--model", "tiny", "--pairs", "1", "--seconds", "1", "--interval-s", "0.25"]
    done = bench("--device", "cpu", *size, "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the worker holds the trainer's bits" in done.stdout
    document = json.loads(path.read_text())
    assert document["command"].startswith("python bench/stall.py --device cpu --model tiny")
    assert str(tmp_path) not in path.read_text()
    assert {"sparsecast", "python", "torch", "nats-server"} <= document["versions"].keys()
    for kind in ("quiet", "busy"):
        found = document[kind]["forward_ms"]
        assert found["n"] >= 10
        assert 0 < found["p50"] <= found["p99"] <= found["max"]
        assert document[kind]["p99_phases"] == [found["p99"]]
    updates = document["updates"]
    assert updates["published"] == 4
    assert 1 <= updates["applied"] <= 4
    assert updates["measured"] == updates["by_window"] >= 1
    assert 0 < updates["apply_ms"]["p50"] <= updates["staged_ms"]["max"]
    assert updates["verify_ms"]["n"] == updates["measured"]
    # The loop computes all the time: nearly every apply falls into some forward's wait.
    assert 1 <= document["hit_ms"]["n"] <= updates["applied"]
    (target, hit) = document["targets"]
    bound = document["quiet"]["forward_ms"]["p99"] + updates["apply_ms"]["p50"] + 1
    assert target["met"] == (document["busy"]["forward_ms"]["p99"] <= bound)
    assert target["what"] in done.stdout
    assert hit["what"] in done.stdout


def test_hit_forwards_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two applies, one of them within the second of three forwards and one in none of them: the
    second forward is the one that was hit, in ms from its call to its end."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    import stall

    quiet: dict[str, Any] = {
        "kind": "quiet",
        "published": 0,
        "forwards": [(0.0, 0.010, 0.0), (0.010, 0.020, 0.0)],
        "applies": [],
        "workers": [],
        "rounds": [],
    }
    part = dict.fromkeys(("receive", "check", "staged", "apply", "verify"), 3.0)
    busy = quiet | {
        "kind": "busy",
        "published": 2,
        "forwards": [(1.0, 1.010, 0.0), (1.010, 1.025, 4.0), (1.025, 1.035, 0.0)],
        "applies": [1.013, 1.500],
        "workers": [part | {"source": "window"}, part | {"source": "log"}],
        "rounds": [{"total": 20.0, "nbytes": 100}],
    }
    found = stall.summarise([quiet, busy])
    assert found["hit_ms"]["n"] == 1
    assert found["hit_ms"]["p50"] == pytest.approx(15.0)
    assert found["busy"]["guard_ms"]["max"] == pytest.approx(4.0)
    assert found["updates"]["by_window"] == 1
    p99, hit = stall.targets(found)
    assert p99["bound"] == "≤ 14"
    assert not p99["met"]
    assert not hit["met"]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--graph"], "needs --device cuda"),
        (["--density", "2"], "shares are above 0"),
        (["--seconds", "1", "--interval-s", "2"], "no phase is so long"),
        (["--model", "70b"], "invalid choice"),
    ],
    ids=["graph", "density", "interval", "model"],
)
def test_a_wrong_flag_is_named(words: list[str], reason: str) -> None:
    """Nothing is started, and the message says what is wrong."""
    assert reason in refusal("stall.py", *words)
