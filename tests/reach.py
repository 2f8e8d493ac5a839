"""What addresses kernels reach: seen in Triton's interpreter, where every access is a call."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from torch import Tensor


class Reach:
    """The addresses that kernels have reached, and the memory that they were given."""

    def __init__(self) -> None:
        self.read: list[tuple[Any, int]] = []
        self.written: list[tuple[Any, int]] = []
        #: Held, so that no memory is given out twice.
        self.given: list[Tensor] = []

    def require_within(self, *others: Tensor) -> int:
        """All lies in tensors given to launchers, or in these; gives the number of accesses."""
        spans = sorted(
            (tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())
            for tensor in [*self.given, *others]
            if tensor.numel()
        )
        starts = np.array([start for start, _ in spans], np.int64)
        ends = np.maximum.accumulate([start + nbytes for start, nbytes in spans])
        total = 0
        for addresses, nbytes in [*self.read, *self.written]:
            at = np.searchsorted(starts, addresses, "right") - 1
            beyond = (at < 0) | (addresses + nbytes > ends[at])
            assert not beyond.any(), f"{beyond.sum()} accesses of {nbytes} bytes go beyond"
            total += addresses.size
        return total


@contextmanager
def reached() -> Iterator[Reach]:
    """Within, every access of every kernel is noted."""
    from triton.runtime import interpreter

    reach = Reach()
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store
    atomic = builder.create_atomic_rmw
    launch = interpreter.GridExecutor.__call__

    def live(ptrs: Any, mask: Any) -> tuple[Any, int]:
        chosen = ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape).astype(np.bool_)]
        nbytes = ptrs.get_element_ty().primitive_bitwidth // 8
        return chosen.astype(np.int64), nbytes

    def noted_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        reach.read.append(live(ptrs, mask))
        return load(self, ptrs, mask, *rest)

    def noted_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        reach.written.append(live(ptrs, mask))
        return store(self, ptrs, value, mask, *rest)

    def noted_atomic(self: Any, op: Any, ptr: Any, value: Any, mask: Any, *rest: Any) -> Any:
        reach.written.append(live(ptr, mask))
        return atomic(self, op, ptr, value, mask, *rest)

    def noted_launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        reach.given.extend(arg for arg in args if isinstance(arg, Tensor))
        return launch(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(builder, "create_masked_load", noted_load)
        patched.setattr(builder, "create_masked_store", noted_store)
        patched.setattr(builder, "create_atomic_rmw", noted_atomic)
        patched.setattr(interpreter.GridExecutor, "__call__", noted_launch)
        yield reach
