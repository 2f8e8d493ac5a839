"""bench/stopped.py: rounds beside a stopped worker, without the one that met the stop."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_a_small_run_is_whole(tmp_path: Path) -> None:
    """One of two workers is stopped, resumed, leaves and comes back: each kind of phase has its
    rounds, all by one attempt of the window, and the round that met the stop is told apart."""
    path = tmp_path / "stopped.json"
    command = [sys.executable, "bench/stopped.py", "--turns", "1", "--rounds", "4"]
    command += ["--elements", "200000", "--interval-s", "0.02", "--json", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every worker holds the trainer's bits" in done.stdout
    document = json.loads(path.read_text())
    assert document["command"].startswith("python bench/stopped.py --turns 1")
    assert str(tmp_path) not in path.read_text()
    assert document["window"] == "gloo"
    for kind in ("none", "stopped", "left"):
        found = document["kinds"][kind]
        assert (found["publish_ms"]["n"], found["applied_ms"]["n"]) == (4, 4)
        assert found["publish_ms"]["p50"] <= found["applied_ms"]["max"]
        assert (found["left_out"], found["astray"]) == (1, 0)
    # What met the stop has waited for Policy.ready_s.
    assert document["kinds"]["stopped"]["left_out_ms"]["min"] >= 1900
    assert len(document["targets"]) == 3
    assert all(one["what"] in done.stdout for one in document["targets"])


def test_what_one_stopped_worker_costs_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others take half as long again beside a stopped worker, and publish() as long as before:
    one target is met, two are missed, and a fewer worker is the measure of another ratio."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    import stopped

    def phase(publish: float, applied: float) -> stopped.Phase:
        return stopped.Phase([publish] * 9, [applied] * 9, met_ms=2000.0, astray=0, equal=True)

    phases = {
        "none": [phase(10, 20), phase(10, 20)],
        "stopped": [phase(10, 30), phase(10, 30)],
        "left": [phase(10, 15), phase(10, 15)],
    }
    document = stopped.summarise(phases)
    assert document["kinds"]["stopped"]["left_out"] == 2
    assert document["stopped_to"]["none"]["applied_p50"] == {"ratio": 1.5, "turns": [1.5, 1.5]}
    assert document["stopped_to"]["left"]["applied_p99"]["ratio"] == 2.0
    assert [one["met"] for one in stopped.targets(document)] == [True, False, False]
