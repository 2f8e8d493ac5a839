"""The snippets of README and docs run as written, and their links lead somewhere."""

import math
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsecast import Broker, Replica

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
LAYOUTS = (ROOT / "docs/layouts.md").read_text()
VIEWS = (ROOT / "docs/views.md").read_text()


def _snippet(name: str, page: str = README) -> str:
    """The Python block whose first line names this file."""
    found = re.search(rf"```python\n(# {re.escape(name)}\n.*?)```", page, re.S)
    assert found, name
    return found[1]


def test_trainer_and_worker_run_as_written(tmp_path: Path) -> None:
    """Both snippets in processes of their own, with the broker where they look for it."""
    with Broker(port=4222, store_dir=tmp_path / "store"):
        processes = []
        for name in ("trainer.py", "worker.py"):
            (tmp_path / name).write_text(_snippet(name))
            processes.append(
                subprocess.Popen(
                    [sys.executable, name],
                    cwd=tmp_path,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
        try:
            trainer, worker = (process.communicate(timeout=90)[0] for process in processes)
        finally:
            for process in processes:
                process.kill()
                process.wait(10)
    assert [process.returncode for process in processes] == [0, 0], trainer + worker
    # The worker's weights are its own: the digest tells, and the anchor replaces them.
    assert "version 3:" in trainer
    assert "applied by ['worker-0'], missing {}" in trainer
    assert "version 3 answers with (1, 512)" in worker


def test_a_trainer_of_several_ranks_runs_as_written(tmp_path: Path) -> None:
    """FSDP2 over two processes, by torchrun; a worker of one rank, with weights of its own, holds
    the third version of whole tensors in the end, and has proven it."""
    (tmp_path / "fsdp.py").write_text(_snippet("fsdp.py", LAYOUTS))
    held = {
        "0.weight": torch.zeros(1001, 512, dtype=torch.bfloat16),
        "0.bias": torch.zeros(1001, dtype=torch.bfloat16),
        "1.weight": torch.zeros(1001, dtype=torch.bfloat16),
    }
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    with Broker(port=4222, store_dir=tmp_path / "store") as url:
        replica = Replica(held, run="fsdp", bus=url, name="worker-0")
        replica.start()
        try:
            done = subprocess.run(
                [*launch, "fsdp.py"], cwd=tmp_path, capture_output=True, text=True, timeout=100
            )
            assert done.returncode == 0, done.stdout + done.stderr
            assert "version 3: applied by ['worker-0']" in done.stdout
            assert (replica.version, replica.verified, replica.mismatches) == (3, 3, 0)
        finally:
            replica.stop()
    assert all(tensor.count_nonzero() > tensor.numel() / 2 for tensor in held.values())


@pytest.mark.parametrize(
    ("name", "page"), [("layouts.py", LAYOUTS), ("views.py", VIEWS)], ids=["layouts", "views"]
)
def test_an_example_prints_what_its_page_says(tmp_path: Path, name: str, page: str) -> None:
    """A page shows an example and its output: run it, and compare."""
    (tmp_path / name).write_text(_snippet(name, page))
    done = subprocess.run(
        [sys.executable, name], cwd=tmp_path, capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 0, done.stderr
    (expected,) = re.findall(r"```text\n(.*?)```", page, re.S)
    assert done.stdout == expected


@pytest.fixture(scope="module")
def views() -> ModuleType:
    """The example of the page on views, imported."""
    module = ModuleType("views")
    exec(_snippet("views.py", VIEWS), module.__dict__)
    return module


@given(
    rows=st.integers(1, 300),
    columns=st.integers(1, 300),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    magnitude=st.sampled_from([0.0, 1e-44, 1e-30, 0.02, 1.0, 1e38]),
    seed=st.integers(0, 99),
)
def test_fp8_blocks_are_as_near_as_their_format_allows(
    views: ModuleType, rows: int, columns: int, dtype: torch.dtype, magnitude: float, seed: int
) -> None:
    """Matrices of any size, whole blocks or not, tiny, huge or zero: a code times its block's scale
    is within half a step of the weight, of three bits of mantissa or of the smallest number, and a
    block's scale is from its own largest weight."""
    random = torch.Generator().manual_seed(seed)
    weight = (torch.rand(rows, columns, generator=random) * 2 - 1).mul(magnitude).to(dtype)
    codes, scales = views.quantised(weight)
    assert (codes.dtype, codes.shape) == (torch.float8_e4m3fn, weight.shape)
    assert (scales.dtype, scales.shape) == (
        torch.float32,
        (math.ceil(rows / 128), math.ceil(columns / 128)),
    )
    each = scales.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns].double()
    exact = weight.double()
    step = torch.maximum(exact.abs() / 16, each / 1024)
    assert ((codes.double() * each - exact).abs() <= step * (1 + 1e-5)).all()
    for row in range(0, rows, 128):
        for column in range(0, columns, 128):
            largest = weight[row : row + 128, column : column + 128].float().abs().max() / 448
            expected = max(largest.item(), torch.finfo(torch.float32).tiny)
            assert scales[row // 128, column // 128].item() == expected


@pytest.mark.parametrize(
    "page", ["README.md", "docs/protocol.md", "docs/metrics.md", "docs/views.md"]
)
def test_links_lead_somewhere(page: str) -> None:
    """Every relative link of a page is a file of the project."""
    path = ROOT / page
    for link in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
        assert (path.parent / link).exists(), f"{page} links to {link}"
