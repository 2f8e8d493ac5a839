"""The bits of tensors: integer views, searching masks, reading any tensor in flat pieces."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

#: Elements of a block: positions within it fit u16.
BLOCK = 65_536

_SEARCH_FROM = 1 << 14
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_UNSIGNED = {torch.int16: torch.uint16, torch.int32: torch.uint32}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No autograd, and no inference mode: what is made inside can be written to anywhere."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def bits_dtype(itemsize: int) -> torch.dtype:
    """The integer dtype in which elements of 1, 2, 4 or 8 bytes are compared and moved."""
    return _BITS[itemsize]


def bits(tensor: Tensor) -> Tensor:
    """The same memory as integers of the same size: NaN payloads and -0.0 are just bits."""
    return tensor.view(_BITS[tensor.element_size()])


def bare(tensor: Tensor) -> Tensor:
    """The same memory as a Tensor, detached: what a subclass does with operators is not asked."""
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        return tensor.detach().as_subclass(Tensor)
    return tensor.detach()


def plain(tensor: Tensor) -> Tensor:
    """The same memory, of which a copy has the same bits: one of bools makes their bytes 0 or 1."""
    return bits(tensor) if tensor.dtype == torch.bool else tensor


def unsigned(bits_N: Tensor) -> Tensor:
    """The same bits as unsigned integers (8 bytes stay int64: sums wrap mod 2⁶⁴ either way)."""
    view = _UNSIGNED.get(bits_N.dtype)
    return bits_N if view is None else bits_N.view(view)


def indices(mask_N: Tensor) -> Tensor:
    """Where a contiguous 1-D bool tensor is set, ascending: int64."""
    numel = mask_N.numel()
    if mask_N.device.type != "cpu" or numel < _SEARCH_FROM:
        return mask_N.nonzero().view(-1)
    # torch's search takes a branch an element, numpy's none from a tenth set on: with half of 64 M
    # elements set, 150 ms against 24 on two cores. Fewer are first sought in words of eight; of the
    # words found at least an eighth is set, and seeking in words again would never end.
    array = mask_N.numpy()
    count = np.count_nonzero(array)
    if count * 8 >= numel:
        return torch.from_numpy(np.flatnonzero(array))
    if numel % 8 or mask_N.data_ptr() % 8 or mask_N.storage_offset() % 8:
        return mask_N.nonzero().view(-1)
    words = mask_N.view(torch.int64)
    at_W = indices(words != 0) if count else mask_N.new_empty(0, dtype=torch.int64)
    lane_N = indices(words.index_select(0, at_W).view(torch.bool))
    idx_N = at_W.index_select(0, lane_N >> 3).bitwise_left_shift_(3)
    return idx_N.bitwise_or_(lane_N & 7)


class Source:
    """One tensor to be read in flat pieces, cast on the way if `dtype` is given.

    Temporaries: none for contiguous tensors, a piece where it casts, a copy of this one tensor
    where it is not contiguous.
    """

    __slots__ = ("_dtype", "_flat", "_tensor", "name", "numel")

    def __init__(self, name: str, tensor: Tensor, dtype: torch.dtype | None = None) -> None:
        self.name = name
        self.numel = tensor.numel()
        self._tensor = tensor.detach()
        self._dtype = None if dtype == tensor.dtype else dtype
        self._flat: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self._tensor.device

    @property
    def casts(self) -> bool:
        """Whether every piece is a fresh tensor."""
        return self._dtype is not None

    def piece(self, start: int, stop: int) -> Tensor:
        """The bits of elements start … stop - 1 in C order: 1-D, contiguous, to be read only."""
        if self._flat is None:
            flat = plain(self._tensor).reshape(-1)
            self._flat = flat if self._dtype is not None else bits(flat)
        part = self._flat if stop - start == self.numel else self._flat[start:stop]
        return part if self._dtype is None else bits(part.to(self._dtype))

    def whole(self) -> Tensor:
        """All of it, as piece() gives it."""
        return self.piece(0, self.numel)
