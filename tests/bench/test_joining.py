"""bench/joining.py: a worker comes late to a real run, again and again."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_small_run_is_whole(tmp_path: Path) -> None:
    """A joiner with nothing, with what the run began with, and one that comes back: each has the
    trainer's bits in the end, and what it has read of the log is what it needed."""
    path = tmp_path / "joining.json"
    command = [sys.executable, "bench/joining.py", "--sizes", "200000", "--behind", "1,3"]
    done = subprocess.run(
        [*command, "--repeats", "1", "--json", str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the joiner held the trainer's bits each time" in done.stdout
    document = json.loads(path.read_text())
    assert document["command"].startswith("python bench/joining.py --sizes 200000")
    assert str(tmp_path) not in path.read_text()
    (size,) = document["sizes"]
    assert all(size["dense"][name]["n"] == 1 for name in ("dense", "dense_safe"))
    joins = {(join["holds"], join["head"]): join for join in size["joins"]}
    assert list(joins) == [(None, 0), (0, 0), (0, 1), (0, 3), (1, 3)]
    for join in joins.values():
        ms = join["ms"]
        assert 0 < ms["connected"]["p50"] <= ms["current"]["p50"] <= ms["proven"]["p50"]
        assert join["to_dense"] > 0
    assert [joins[key]["entries"] for key in ((None, 0), (0, 0), (0, 1), (0, 3))] == [1, 0, 1, 3]
    # An anchor is all of the weights, a patch of one percent is not.
    assert joins[None, 0]["nbytes"] >= size["dense_nbytes"] > joins[0, 3]["nbytes"] > 0
