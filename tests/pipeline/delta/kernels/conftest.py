"""Kernels are compiled where a GPU is, and run in Triton's interpreter on the CPU elsewhere.

Triton decides when a kernel is defined, that is when its module is imported, and again within some
calls. So without a GPU Triton and the kernels are imported here, before any test module of this
folder, and the variable is set only then and within these tests: no other test sees it.
"""

import importlib.util
import pkgutil
from collections.abc import Iterator
from itertools import chain
from typing import Any

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
            _reduce_by_halves(patched)
        yield


def _reduce_by_halves(patched: pytest.MonkeyPatch) -> None:
    """Let the interpreter reduce vectors half by half, as a GPU does.

    Where it does not know what combines two elements it takes one after the other, which would
    double the time of all these tests.
    """
    from triton.runtime.interpreter import ReduceOps

    one_by_one = ReduceOps.generic_reduce

    def by_halves(self: Any, given: Any) -> Any:
        if self.keep_dims or any(part.handle.data.ndim != 1 for part in given):
            return one_by_one(self, given)
        dtypes = [part.dtype for part in given]
        arrays = [part.handle.data for part in given]
        while len(arrays[0]) > 1:
            half = len(arrays[0]) // 2
            halves = [array[:half] for array in arrays], [array[half:] for array in arrays]
            pairs = [zip(arrays, dtypes, strict=True) for arrays in halves]
            combined = self.combine_fn.fn(*(self.to_tensor(*one) for one in chain(*pairs)))
            combined = combined if isinstance(combined, tuple) else (combined,)
            arrays = [part.handle.data for part in combined]
        return [
            self.to_tensor(array[0], dtype) for array, dtype in zip(arrays, dtypes, strict=True)
        ]

    patched.setattr(ReduceOps, "generic_reduce", by_halves)


if INTERPRETED and INSTALLED:
    with pytest.MonkeyPatch.context() as _patched:
        _patched.setenv("TRITON_INTERPRET", "1")
        for _found in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}."):
            importlib.import_module(_found.name)
