"""Kernels are compiled where a GPU is, and run in Triton's interpreter on the CPU elsewhere.

Triton decides when a kernel is defined, that is when its module is imported, and again within some
calls. So without a GPU Triton and the kernels are imported here, before any test module of this
folder, and the variable is set only then and within these tests: no other test sees it.
"""

import importlib.util
import pkgutil
from collections.abc import Iterator

import pytest
import torch

from sparsecast.pipeline.delta import kernels

INTERPRETED = not torch.cuda.is_available()
INSTALLED = importlib.util.find_spec("triton") is not None


@pytest.fixture(autouse=True, scope="module")
def interpreter() -> Iterator[None]:
    """Triton's interpreter, where there is no GPU."""
    if not INSTALLED:
        pytest.skip("needs Triton, whose wheels are for Linux")
    with pytest.MonkeyPatch.context() as patched:
        if INTERPRETED:
            patched.setenv("TRITON_INTERPRET", "1")
        yield


if INTERPRETED and INSTALLED:
    with pytest.MonkeyPatch.context() as _patched:
        _patched.setenv("TRITON_INTERPRET", "1")
        for _found in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}."):
            importlib.import_module(_found.name)
