"""Kernels are compiled where a GPU is, and run in Triton's interpreter on the CPU elsewhere.

Triton decides when a kernel is defined, that is when its module is imported, and again within some
calls. So without a GPU Triton and the kernels are imported here, before any test module of this
folder, and the variable is set only then and within these tests: no other test sees it.
"""

import importlib.util
import pkgutil
from collections.abc import Iterator
from dataclasses import replace
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
            _do_nothing_twice(patched)
        yield


def _do_nothing_twice(patched: pytest.MonkeyPatch) -> None:
    """Spare the interpreter what it does for nothing, which is half of the time of these tests.

    It looks for what to patch in triton.language at every call of a function within a kernel, and
    most find all patched. It computes every sum and product again in 64 bits, for an assertion that
    is made under its option `debug` alone. It fills a table of dtypes to look one up.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patch, dtype_of = interpreter._patch_lang, interpreter._get_np_dtype
    dtypes: dict[str, Any] = {}

    def patch_once(fn: Any) -> Any:
        seen = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
        missing = any(tl.core.is_builtin(lang.load) for lang in seen)
        return patch(fn) if missing else interpreter._LangPatchScope()

    def known_dtype_of(dtype: Any) -> Any:
        name = dtype.scalar.name
        if (found := dtypes.get(name)) is None:
            found = dtypes[name] = dtype_of(dtype)
        return found

    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    patched.setattr(builder, "options", replace(builder.options, sanitize_overflow=False))
    patched.setattr(interpreter, "_patch_lang", patch_once)
    patched.setattr(interpreter, "_get_np_dtype", known_dtype_of)


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
