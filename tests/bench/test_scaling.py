"""bench/scaling.py: light workers in real processes, and how what they cost grows."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def test_a_small_run_is_whole(tmp_path: Path) -> None:
    """One worker, then three in two processes: every round was with all of them, and the document
    has times, CPU and growth."""
    path = tmp_path / "scaling.json"
    command = [sys.executable, "bench/scaling.py", "--workers", "1,3", "--hosts", "2"]
    done = subprocess.run(
        [*command, "--rounds", "4", "--json", str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every worker holds the trainer's bits" in done.stdout
    document = json.loads(path.read_text())
    assert document["command"].startswith("python bench/scaling.py --workers 1,3")
    assert str(tmp_path) not in path.read_text()
    assert [crew["workers"] for crew in document["crews"]] == [1, 3]
    for crew in document["crews"]:
        ms = crew["ms"]
        assert {ms[key]["n"] for key in ("go", "received", "applied", "total", "cpu")} == {4}
        assert 0 < ms["go"]["p50"] < ms["total"]["max"]
        assert ms["cpu"]["min"] > 0
    (step,) = document["growth"]
    assert (step["from"], step["to"]) == (1, 3)
    assert len(document["targets"]) == 2
    assert all(one["what"] in done.stdout for one in document["targets"])


def test_growth_is_told_by_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight workers cost the trainer eight times what two do: half of that is what they may."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    import scaling

    def crew(workers: int, cpu: float) -> dict[str, Any]:
        ms = {key: {"p50": 2.0} for key in scaling.TIMES} | {"cpu": {"p50": cpu}}
        return {"workers": workers, "ms": ms}

    (step,) = growth = scaling.growth([crew(2, 1.0), crew(8, 8.0)])
    assert step["cpu"] == {"ms_a_worker": pytest.approx(7 / 6, abs=1e-4), "times": 8.0}
    assert step["go"]["times"] == 1.0
    cpu, go = scaling.targets({"growth": growth})
    assert (cpu["bound"], cpu["met"], go["met"]) == ("≤ 4", False, True)


def test_a_wrong_flag_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Many workers before few: nothing is started, and the message says what is wrong."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    import scaling

    with pytest.raises(SystemExit):
        scaling._parse(["--workers", "8,1"])
    assert "from small to large" in capsys.readouterr().err
