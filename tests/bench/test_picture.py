"""bench/picture.py: the bars add up, and the same documents give the same picture."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benches import refusal

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"


@pytest.fixture
def picture(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, which is in no package."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    import picture

    return picture


def document(**methods: dict[str, float]) -> dict[str, Any]:
    """As much of a document of bench/round.py as is read."""
    return {
        "model": "Qwen2.5-7B, bf16: 339 tensors",
        "settings": {"workers": 1},
        "densities": [
            {
                "density": 0.01,
                "dense_nbytes": 15_000_000_000,
                "methods": {
                    name: {"ms": {part: {"p50": value} for part, value in parts.items()}}
                    for name, parts in methods.items()
                },
            }
        ],
    }


OURS = {"whole": 13.0, "stage_diff": 9.0, "stage_ready": 0.5, "stage_broadcast": 1.0}
OURS |= {"stage_apply": 2.5, "wire_apply": 3.5}


def test_bars_are_as_long_as_the_whole(picture: Any) -> None:
    """Parts that add up, that leave a rest, and that go beyond the whole (medians do): each bar
    ends at its method's median, and wire + apply is not counted beside its halves."""
    pairs = {"whole": 65.0, "diff": 46.0, "wire_apply": 17.0}
    dense = {"whole": 50.0, "wire_apply": 50.2}
    one = picture.panel(document(sparsecast=OURS, pairs=pairs, dense=dense), 0.01)
    assert one.title == "Qwen2.5-7B, 15 GB of weights, 1 % of the elements changed, 1 worker"
    for bar in one.bars:
        assert sum(bar.segments.values()) == pytest.approx(bar.whole)
    ours, full, theirs = one.bars
    assert list(ours.segments.values()) == pytest.approx([9.0, 0.5, 1.0, 2.5])
    assert list(full.segments) == ["broadcast and apply, as one"]
    assert theirs.segments["not told apart"] == pytest.approx(2.0)


def test_the_better_buckets_are_drawn(picture: Any) -> None:
    """Two bucket sizes were measured: the peers get the better one, and one bar."""
    buckets = {"buckets_256m": {"whole": 51.0}, "buckets_1g": {"whole": 48.0}}
    one = picture.panel(document(sparsecast=OURS, **buckets), 0.01)
    assert [bar.whole for bar in one.bars] == [13.0, 48.0]
    assert "1 GiB" in one.bars[1].title


def test_the_same_documents_give_the_same_bytes(tmp_path: Path) -> None:
    """Drawn twice from committed results: equal files, every method's name and time in words, a
    style for dark pages, and no date."""
    results = [RESULTS / "round-cpu-loopback-2w.json", RESULTS / "round-cpu-1gbit-3w.json"]
    for name in ("a.svg", "b.svg"):
        words = [sys.executable, "bench/picture.py", *map(str, results), "-o", str(tmp_path / name)]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
    first, second = ((tmp_path / name).read_text() for name in ("a.svg", "b.svg"))
    assert first == second
    words = " ".join(
        text for e in ElementTree.fromstring(first).iter() if e.tag.endswith("text")
        for text in e.itertext()
    )  # fmt: skip
    for result in results:
        section = json.loads(result.read_text())["densities"][0]
        for method in section["methods"].values():
            whole = method["ms"]["whole"]["p50"]
            assert (f"{whole:.1f} ms" if whole < 100 else f"{whole:.0f} ms") in words
    assert "dense, one broadcast a tensor" in words
    assert "prefers-color-scheme: dark" in first
    assert "dc:date" not in first


def test_a_density_that_was_not_measured_is_named(tmp_path: Path) -> None:
    """The document has no such section: the message says which there are, nothing is written."""
    out = tmp_path / "x.svg"
    result = str(RESULTS / "round-cpu-loopback-2w.json")
    told = refusal("picture.py", result, "-o", str(out), "--density", "0.5")
    assert "nothing was measured at a density of 0.5, only at 0.01" in told
    assert not out.exists()
