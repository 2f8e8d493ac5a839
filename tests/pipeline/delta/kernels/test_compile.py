"""What the interpreter accepts, the compiler must accept too."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparsecast.pipeline.delta import kernels

ROOT = Path(kernels.__file__).parent
COMPILER = Path(__file__).parents[3] / "kernelcompiler.py"


def launched() -> set[str]:
    """The kernels that some launcher launches: names before a subscript that is called."""
    return {
        node.func.value.id
        for path in ROOT.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Subscript)
        and isinstance(node.func.value, ast.Name)
    }


@pytest.mark.timeout(900)
def test_every_kernel_compiles_for_an_h200(tmp_path: Path) -> None:
    """A kernel has a return within a branch, say: interpreted all is well, on a GPU nothing is.
    Every kernel that is launched anywhere becomes a binary for sm_90, without a GPU."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, str(COMPILER)], env=env, capture_output=True, text=True, timeout=880
    )
    assert done.returncode == 0, done.stderr[-3_000:]
    binaries = [line.split() for line in done.stdout.splitlines()]
    assert len(launched()) >= 10
    assert {name for name, _ in binaries} == launched()
    assert all(int(nbytes) > 1_000 for _, nbytes in binaries)


def test_without_a_gpu_triton_is_not_imported() -> None:
    """`import sparsecast`, a diff, an apply and a digest on a CPU: nobody pays for Triton."""
    program = (
        "import sys, torch, sparsecast\n"
        "from sparsecast.pipeline.delta import Shadow, apply, digest\n"
        "old, new = {'w': torch.zeros(9)}, {'w': torch.ones(9)}\n"
        "found = Shadow(old).diff(new, base_version=0, version=1)\n"
        "apply(found.patch, old)\n"
        "assert digest(old) == found.digest and found.checksum\n"
        "print([name for name in sys.modules if name.partition('.')[0] == 'triton'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"


@pytest.mark.gpu(1)
def test_on_a_gpu_the_kernels_of_these_tests_are_compiled() -> None:
    """The tests of this folder say something about a GPU only if they ran there."""
    from triton.runtime.jit import JITFunction

    from sparsecast.pipeline.delta.kernels import find
    from twins import DEVICE

    assert DEVICE.type == "cuda"
    assert kernels.usable(DEVICE)
    assert isinstance(find._find.jit, JITFunction)
