"""bench/layouts.py: a trainer of several ranks and a worker of several, in real processes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benches import refusal

ROOT = Path(__file__).parents[2]
METHODS = ("sharded", "gathered", "dense")


def test_a_small_run_is_whole(tmp_path: Path) -> None:
    """Two ranks of a trainer, two of a worker: by each method these hold their part of its bits,
    every round of ours is by a window, and brings a rank little more than what it owns."""
    path = tmp_path / "layouts.json"
    command = [sys.executable, "bench/layouts.py", "--ranks", "2", "--tp", "2", "--model", "tiny"]
    command += ["--elements", "200000", "--rounds", "2", "--warmup", "1", "--json", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "holds its part of the trainer's bits, by every method" in done.stdout
    document = json.loads(path.read_text())
    assert document["command"].startswith("python bench/layouts.py --ranks 2")
    assert str(tmp_path) not in path.read_text()
    (case,) = document["cases"]
    assert (case["ranks"], case["tp"], case["window"]) == (2, 2, "gloo")
    assert case["digests_equal"] == dict.fromkeys(METHODS, True)
    methods = case["methods"]
    for name in METHODS:
        whole = methods[name]["ms"]["whole"]
        assert (whole["n"], methods[name]["astray"]) == (2, 0)
        assert whole["min"] > 0
    for part in ("publish", "publish_cpu", "broadcast", "apply"):
        assert "gather" not in methods["sharded"]["ms"]
        assert 0 < methods["sharded"]["ms"][part]["p50"] < methods["sharded"]["ms"]["whole"]["max"]
    assert methods["dense"]["nbytes"] > 10 * methods["sharded"]["nbytes"]
    counted = case["bytes"]
    # Headers and numbers of blocks are much of so small a patch.
    assert 1 < case["received_to_own"] < 1.3 < counted["broadcast_to_own"]
    for own, got in zip(counted["own"], counted["all_to_all"], strict=True):
        assert own < got < counted["broadcast"]
    assert len(document["targets"]) == 3
    assert all(one["what"] in done.stdout for one in document["targets"])


def test_what_each_way_brings_a_rank_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every element changes: a rank of four is sent all of the model, of which it owns a quarter
    and the norms that all have. Parted, it is sent that, with a bit for each element: of a dense
    patch that was cut nobody knows what is around it."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    import sharding
    from shapes import TINY

    cut = sharding.even_cut(200_000, TINY)
    manifest = sharding.manifest_of_shapes(cut.shapes)
    worker = sharding.by_engine(manifest, TINY, 4)
    counted = sharding.count_bytes(cut, sharding.by_rows(manifest, 2), worker, 1.0, seed=0)
    assert counted["broadcast"] >= 2 * cut.numel
    assert 3.5 < counted["broadcast_to_own"] < 4.1
    assert 1 + 1 / 16 <= counted["all_to_all_to_own"] < 1.2
    held = [2 * layout.local.numel for layout in worker]
    assert all(own >= nbytes for own, nbytes in zip(counted["own"], held, strict=True))


def test_targets_are_of_several_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trainer of one rank gathers nothing: it has no target. A round of 30 ms beside 90 is what
    was aimed at, publish() on two ranks in 10 ms beside 15 is not; on four there is none for it."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    import layouts

    def turn(whole: float, publish: float) -> dict[str, Any]:
        stages = dict.fromkeys(layouts.STAGES, 1.0)
        found = {
            "whole": whole,
            "publish": publish,
            "publish_cpu": publish,
            "nbytes": 10,
            "received": 5,
        }
        return found | stages | {"astray": False}

    one = {
        "sharded": turn(30, 10),
        "gathered": turn(90, 15) | {"gather": 40.0},
        "dense": {"whole": 60.0, "gather": 40.0, "nbytes": 1000, "received": 1000},
    }
    result = {"turns": [one, one], "window": "gloo", "digests_equal": {}}
    case = layouts.summarise(result) | {"tp": 2, "received_to_own": 1.2}
    assert (case["gathered_to_sharded"], case["dense_to_sharded"]) == (3.0, 2.0)
    cases = [case | {"ranks": ranks} for ranks in (1, 2, 4)]
    met = [(t["what"][:5], t["met"]) for t in layouts.targets({"cases": cases})]
    two, four = [("2 → 2", True), ("2 → 2", False), ("2 → 2", False)], ("4 → 2", True)
    assert met == [*two, four, ("4 → 2", False)]


def test_what_cannot_be_shared_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three ranks do not divide what the model has; seven GPUs are not one for each of eight."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 7)
    assert "share the model evenly" in refusal("layouts.py", "--ranks", "1,3")
    assert "a GPU for each of 8 ranks, 7 here" in refusal("layouts.py", "--device", "cuda")
