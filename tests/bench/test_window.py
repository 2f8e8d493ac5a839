"""bench/window.py in real processes."""

import json
import subprocess
import sys
from pathlib import Path

from benches import refusal

ROOT = Path(__file__).parents[2]


def bench(*words: str, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
    """Run the bench as a person does."""
    return subprocess.run(
        [sys.executable, "bench/window.py", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


def test_a_small_run_is_whole(tmp_path: Path) -> None:
    """Two ranks, then three, over gloo: every rank has the time of opening and of each size, and
    the receivers have the sender's bytes."""
    path = tmp_path / "window.json"
    done = bench(
        "--window", "gloo", "--ranks", "2,3", "--sizes", "1024,300000", "--json", str(path)
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 ranks" in done.stdout
    document = json.loads(path.read_text())
    assert document["command"].startswith("python bench/window.py --window gloo --ranks 2,3")
    assert {"sparsecast", "python", "torch", "nats-server"} <= document["versions"].keys()
    assert [run["ranks"] for run in document["runs"]] == [2, 3]
    for run in document["runs"]:
        assert len(run["by_rank"]) == run["ranks"]
        for found in run["by_rank"]:
            assert found["bytes_right"] is True
            assert [size["nbytes"] for size in found["sizes"]] == [1024, 300000]
            counts = {size["window_us"]["n"] for size in found["sizes"]}
            assert min(counts) >= 9
            assert found["open_first_ms"] > 0
    # What each size is held up to is a plain broadcast of NCCL's.
    assert document["targets"] == []


def test_a_rank_without_a_gpu_is_refused() -> None:
    """More ranks than GPUs: said at once, and nothing is started."""
    assert "one GPU a rank" in refusal("window.py", "--window", "nccl", "--ranks", "1000")
