"""The tables by which a kernel's programs find their tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
import triton.language as tl
from torch import Tensor

from ..bits import quiet
from ..digest import tables
from ..layout import blocks_of

#: More kinds of tensors than a plan can have: sizes, casts, alignments. A power of two.
KINDS = 16
_WORDS = {1: tl.uint8, 2: tl.uint16, 4: tl.uint32, 8: tl.uint64}
_CASTS = {torch.bfloat16: "bfloat16", torch.float16: "float16"}


def word(itemsize: int) -> tl.dtype:
    """The unsigned integer in which a kernel moves elements of so many bytes."""
    return _WORDS[itemsize]


def castable(source: torch.dtype, published: torch.dtype) -> bool:
    """Whether the kernels read tensors of `source` and publish them as `published`."""
    return source == published or (source == torch.float32 and published in _CASTS)


@dataclass(frozen=True, slots=True)
class Kind:
    """What tensors must share to be read by one launch.

    `cast`: "" or what float32 is cast to; `aligned`: whether they start at multiples of 16 bytes.
    """

    itemsize: int
    cast: str = ""
    aligned: bool = True

    @classmethod
    def of(cls, source: Tensor, itemsize: int, published: torch.dtype) -> Kind:
        """The kind of one contiguous tensor."""
        cast = "" if source.dtype == published else _CASTS[published]
        return cls(itemsize, cast, source.data_ptr() % 16 == 0)

    @property
    def tile(self) -> int:
        """Elements of a tile: 4 KiB of them, as they are published."""
        return 4096 // self.itemsize

    @property
    def tiles(self) -> int:
        """Tiles of a block."""
        return 65_536 // self.tile


@dataclass(frozen=True, slots=True)
class Group:
    """Consecutive blocks of a plan whose tensors are of one kind."""

    kind: Kind
    first: int
    blocks: int
    #: Where its tiles start among all tiles of the plan.
    first_tile: int

    @property
    def tiles(self) -> int:
        """Tiles of all its blocks, those beyond the end of a tensor too."""
        return self.blocks * self.kind.tiles


class Plan:
    """The blocks of all tensors of a model, ordered by kind, as tables on one device.

    Blocks are numbered through all tensors; `block_tensor` int32 [blocks] gives a block's tensor,
    `first_block` int32 [tensors] a tensor's first block, `numels` and `itemsizes` int64 [tensors],
    `seeds` int64 [tensors] the digest's seeds, `counted` int64 [tensors] 1, or 0 for a tensor that
    a diff leaves out of it. About 4 bytes a block of 65,536 elements.
    """

    def __init__(
        self,
        numels: Sequence[int],
        seeds: Sequence[int],
        kinds: Sequence[Kind],
        device: torch.device,
        counted: Sequence[bool] | None = None,
    ) -> None:
        self.device = device
        self.kinds = tuple(kinds)
        self.tensors = len(numels)
        self.groups: list[Group] = []
        order: list[int] = []
        at = tile = 0
        for kind in dict.fromkeys(kinds):
            members = [i for i, other in enumerate(kinds) if other == kind and numels[i]]
            blocks = sum(blocks_of(numels[i]) for i in members)
            if blocks:
                self.groups.append(Group(kind, at, blocks, tile))
                order += members
                at += blocks
                tile += blocks * kind.tiles
        self.blocks = at
        self.tiles = tile
        each = np.array([blocks_of(numels[i]) for i in order], np.int64)
        #: The tensors in the order of their blocks, and where each one's blocks start.
        self.order = np.array(order, np.int64)
        first = np.zeros(self.tensors, np.int32)
        first[self.order] = each.cumsum() - each
        self._members = [
            self.order[
                (first[self.order] >= group.first)
                & (first[self.order] < group.first + group.blocks)
            ]
            for group in self.groups
        ]
        with quiet():
            self.block_tensor = torch.from_numpy(np.repeat(self.order.astype(np.int32), each)).to(
                device
            )
            self.first_block = torch.from_numpy(first).to(device)
            self.numels = torch.tensor(list(numels), dtype=torch.int64).to(device)
            itemsizes = [kind.itemsize for kind in kinds]
            self.itemsizes = torch.tensor(itemsizes, dtype=torch.int64).to(device)
            self.seeds = torch.tensor(list(seeds), dtype=torch.int64).to(device)
            ones = [1] * self.tensors if counted is None else list(map(int, counted))
            self.counted = torch.tensor(ones, dtype=torch.int64).to(device)

    def members(self, group: Group) -> npt.NDArray[np.int64]:
        """The tensors of one of its groups, those without elements left out."""
        return self._members[self.groups.index(group)]


@cache
def factors(device: torch.device) -> tuple[Tensor, Tensor]:
    """The digest's A and B: int64 [256] each, on `device`."""
    a, b, _ = tables(device)
    return a, b
