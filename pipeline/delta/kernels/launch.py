"""Launching kernels at a third of what Triton's own way costs.

Triton looks at every argument of every launch to find the binary that fits: 20 to 45 µs on the
host, and a round has a dozen launches. Here that look is taken once for each kind of arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import driver

_WIDE = 1 << 31


class Kernel:
    """A kernel that is launched as Triton's are: kernel[(programs,)](arguments, CONSTANT=…).

    Arguments come in order, constants and options by name. `jit` is Triton's own function, which
    the interpreter runs, or which compiles what is launched first.
    """

    def __init__(self, jit: Any) -> None:
        self.jit = jit
        self._known: dict[tuple[Any, ...], tuple[CompiledKernel, tuple[Any, ...]]] = {}

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*given: Tensor | int, **constants: Any) -> None:
            self._launch(grid[0], given, constants)

        return launch

    def _launch(
        self, programs: int, given: Sequence[Tensor | int], constants: dict[str, Any]
    ) -> None:
        numbers = [each if isinstance(each, int) else each.data_ptr() for each in given]
        # What Triton specialises on: what tensors hold and how addresses are aligned, and how wide
        # other numbers are.
        kinds = [16 if -_WIDE <= number < _WIDE else number & 15 for number in numbers]
        dtypes = [None if isinstance(each, int) else each.dtype for each in given]
        found = *kinds, *dtypes, *constants.values()
        known = self._known.get((*found, torch.cuda.current_device())) if self._known else None
        if known is not None:
            compiled, rest = known
            stream = driver.active.get_current_stream(torch.cuda.current_device())
            # As CompiledKernel.run, without the hooks of profilers and what is told to them.
            compiled.run(
                programs, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None,
                None, *numbers, *rest,
            )  # fmt: skip
            return
        compiled = self.jit[programs,](*given, **constants)
        if isinstance(compiled, CompiledKernel):
            rest = tuple(constants[name] for name in self.jit.arg_names[len(given) :])
            self._known[(*found, torch.cuda.current_device())] = compiled, rest


def kernel(*, numbers: Sequence[str] = ()) -> Callable[[Callable[..., None]], Kernel]:
    """Make a kernel of a function in Triton's language. `numbers` names the arguments that are no
    tensors, addresses or constants: what is compiled serves all of their values."""
    return lambda function: Kernel(triton.jit(function, do_not_specialize=numbers))
