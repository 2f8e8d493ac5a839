"""bench/storing.py: the same rounds with the log and without, in real processes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def test_a_small_run_is_whole(tmp_path: Path) -> None:
    """Two blocks of each kind at two paces: every round is by the window, both runs of the worker
    end with their trainer's bits, and each pace has a target."""
    path = tmp_path / "storing.json"
    command = [sys.executable, "bench/storing.py", "--workers", "1", "--blocks", "2"]
    command += ["--rounds", "3", "--intervals-s", "0.03,0", "--elements", "200000"]
    done = subprocess.run(
        [*command, "--json", str(path)], cwd=ROOT, capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every worker holds the trainer's bits of both" in done.stdout
    document = json.loads(path.read_text())
    assert document["command"].startswith("python bench/storing.py --workers 1")
    assert str(tmp_path) not in path.read_text()
    assert [pace["interval_s"] for pace in document["paces"]] == [0.03, 0.0]
    for pace in document["paces"]:
        for kind in ("log", "nothing"):
            found = pace[kind]
            assert found["round_ms"]["n"] == 6
            assert found["round_ms"]["min"] > 0
            assert found["cpu_ms"]["min"] > 0
            assert found["astray"] == 0
        assert pace["pairs"]["n"] == 2
    assert len(document["targets"]) == 2
    assert all(one["what"] in done.stdout for one in document["targets"])


def test_what_the_log_costs_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A round takes 22 ms with the log and 20 without: a tenth, which is more than it may be."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    import storing

    def block(ms: float) -> dict[str, Any]:
        return {"round_ms": [ms] * 3, "cpu_ms": 5.0, "broker_cpu_ms": 1.0, "astray": 0}

    blocks = [{"log": block(22), "nothing": block(20)}, {"log": block(22), "nothing": block(20)}]
    pace = storing.summarise(0.1, blocks)
    assert pace["ratio"] == pace["pairs"]["max"] == 1.1
    (target,) = storing.targets({"paces": [pace]})
    assert (target["value"], target["bound"], target["met"]) == (1.1, "≤ 1.05", False)
