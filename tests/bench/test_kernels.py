"""bench/kernels.py on a CPU: every work is measured, and the document is whole."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benches import refusal

ROOT = Path(__file__).parents[2]
SPREAD = {"p50", "p10", "p90", "min", "max", "n"}


def kernels(*words: str, timeout_s: float = 90.0) -> subprocess.CompletedProcess[str]:
    """Run the bench as a person does."""
    return subprocess.run(
        [sys.executable, "bench/kernels.py", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


def test_a_small_run_is_whole(tmp_path: Path) -> None:
    """Every encoding is diffed, checked and applied, exact to the bit, beside plain torch; where
    ready indices would be too many, only they are left out. A quarter of the model, by rows and by
    columns, takes its share by a layout, exact as well."""
    path = tmp_path / "kernels.json"
    size = ["--device", "cpu", "--models", "tiny", "--repeats", "4", "--seconds", "0.2"]
    shares = ["--changed", "27", "--densities", "0.01,0.5,1"]
    done = kernels(*size, *shares, "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "holds the trainer's bits at every density" in done.stdout
    document = json.loads(path.read_text())
    assert document["command"].startswith("python bench/kernels.py --device cpu --models tiny")
    assert {"torch", "python", "sparsecast"} <= document["versions"].keys()
    (model,) = document["models"]
    assert {"copy", "sum", "digest", "named_tensors"} == model["works"].keys()
    found = model["densities"]
    assert [section["encoding"] for section in found] == ["sparse", "sparse", "bitmap", "dense"]
    assert 25 <= found[0]["changed"] <= 27
    assert found[3]["changed"] == model["nbytes"] // 2
    ours = {"diff", "diff_behind", "diff_ready", "checksum", "check", "apply", "check_apply"}
    for section in found:
        assert section["exact"]
        indexed = {"index_put", "index_put_fused"} if section["density"] <= 0.01 else set()
        assert section["works"].keys() == ours | {"torch_diff"} | indexed
        for work in section["works"].values():
            assert work["device_ms"].keys() == work["host_ms"].keys() == SPREAD
            assert 3 <= work["device_ms"]["n"] <= 4
            assert work["device_ms"]["min"] > 0
    ranks = model["ranks"]
    assert ranks["exact"]
    assert list(ranks["shares"]) == ["whole", "by_layout", "half", "rows", "columns"]
    nbytes = [share["nbytes"] for share in ranks["shares"].values()]
    assert nbytes == [
        model["nbytes"],
        model["nbytes"],
        model["nbytes"] // 2,
        *[model["nbytes"] // 4] * 2,
    ]
    for share in ranks["shares"].values():
        assert share["exact"]
        for work in ("apply", "digest"):
            assert share[work]["device_ms"]["min"] > 0
    for name in ("half", "rows", "columns"):
        for work in ("diff", "restrict"):
            assert ranks["shares"][name][work]["device_ms"]["min"] > 0
    assert "a quarter of the columns" in done.stdout


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--models", "abacus"], "no model abacus, only 0.5b, 7b, tiny"),
        (["--device", "cpu", "--densities", "2"], "shares are above 0"),
        (["--device", "cpu", "--changed", "0"], "at least 1"),
    ],
    ids=["model", "density", "changed"],
)
def test_a_wrong_flag_is_named(words: list[str], reason: str) -> None:
    """Nothing is measured, and the message says what is wrong."""
    assert reason in refusal("kernels.py", *words)
