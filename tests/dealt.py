"""Layouts for the tests of the data path: published tensors cut anywhere, dealt to a few ranks."""

import math
from dataclasses import dataclass, field
from itertools import pairwise, product
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from sparsecast.messages.layout import Layout, Padding, Part
from sparsecast.messages.manifest import TensorSpec
from states import DTYPES, State, bits, laid_out, random_tensor

#: Around the ends of blocks, and with rows that cross them.
SHAPES = [
    (), (0, 3), (1,), (40,), (65_537,), (7, 9), (1, 30), (30, 1), (300, 257), (2, 70_000),
    (4, 5, 6), (3, 150, 160), (1, 66, 1000),
]  # fmt: skip


@st.composite
def published(draw: Any, most: int = 4) -> State:
    """A few tensors of any dtype, of up to three dimensions."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    state = {}
    for at in range(draw(st.integers(1, most))):
        dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
        state[f"t{at}"] = random_tensor(dtype, draw(st.sampled_from(SHAPES)), generator)
    return state


@dataclass
class Rank:
    """The layout of one rank in the making."""

    tensors: list[TensorSpec] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    padding: list[Padding] = field(default_factory=list)

    def fuse(self, parts: list[Part], dtype: str, dims: int, along: int, end: int) -> None:
        """Lay boxes one behind the other along a dimension of a new local tensor, `end` rows of
        padding behind them; those that are smaller than others have padding beside them."""
        name = f"local{len(self.tensors)}"
        reaches = []
        for part in parts:
            reach = [1] * dims
            for axis, n in zip(part.axes, part.shape, strict=True):
                reach[axis] = n
            reaches.append(reach)
        shape = [max(reach[dim] for reach in reaches) for dim in range(dims)]
        begin = 0
        for part, reach in zip(parts, reaches, strict=True):
            at = [0] * dims
            at[along] = begin
            self.parts.append(_moved(part, name, at))
            room = [*shape]
            room[along] = reach[along]
            for dim in range(dims):
                if reach[dim] < room[dim]:
                    beside = [*at]
                    beside[dim] += reach[dim]
                    size = [*reach[:dim], room[dim] - reach[dim], *room[dim + 1 :]]
                    self.pad(name, beside, size)
            begin += reach[along]
        shape[along] = begin + end
        if end:
            self.pad(name, [begin if dim == along else 0 for dim in range(dims)],
                     [end if dim == along else n for dim, n in enumerate(shape)])  # fmt: skip
        self.tensors.append(TensorSpec(name, dtype, tuple(shape)))

    def pad(self, name: str, at: list[int], shape: list[int]) -> None:
        """A box of a local tensor that holds nothing."""
        if math.prod(shape):
            self.padding.append(Padding(local=name, at=tuple(at), shape=tuple(shape)))

    def layout(self) -> Layout:
        """What it has come to."""
        return Layout(
            tensors=tuple(self.tensors), parts=tuple(self.parts), padding=tuple(self.padding)
        )


def _moved(part: Part, local: str, at: list[int]) -> Part:
    return Part(
        tensor=part.tensor, begin=part.begin, shape=part.shape, local=local, at=tuple(at),
        axes=part.axes, counted=part.counted,
    )  # fmt: skip


@st.composite
def layouts(draw: Any, state: State) -> list[Layout]:
    """A layout for each of one to four ranks.

    Every tensor is cut at random points of each dimension; the boxes are dealt, some to two ranks,
    and laid into local tensors alone, behind one another, transposed, stacked, with padding.
    """
    ranks = [Rank() for _ in range(draw(st.integers(1, 4)))]
    hands: list[dict[tuple[str, int], list[Part]]] = [{} for _ in ranks]
    for name, tensor in state.items():
        edges = []
        for size in tensor.shape:
            cuts = draw(st.lists(st.integers(0, size), max_size=2))
            edges.append(sorted({0, size, *cuts}) if size else [0, 0])
        dtype = str(tensor.dtype).removeprefix("torch.")
        for cell in product(*map(pairwise, edges)):
            owner = draw(st.integers(0, len(ranks) - 1))
            others = [rank for rank in range(len(ranks)) if rank != owner and draw(st.booleans())]
            for rank in (owner, *others[:1]):
                dims = len(cell) + draw(st.integers(0 if cell else 1, 1))
                axes = draw(st.permutations(range(dims)))[: len(cell)]
                part = Part(
                    tensor=name,
                    begin=tuple(start for start, _ in cell),
                    shape=tuple(stop - start for start, stop in cell),
                    local="",
                    at=(0,) * dims,
                    axes=tuple(axes),
                    counted=rank == owner,
                )
                hands[rank].setdefault((dtype, dims), []).append(part)
    for rank, hand in zip(ranks, hands, strict=True):
        for (dtype, dims), parts in hand.items():
            mixed = draw(st.permutations(parts))
            while mixed:
                some = draw(st.integers(1, len(mixed)))
                along, end = draw(st.integers(0, dims - 1)), draw(st.integers(0, 2))
                # Boxes of very different shapes side by side would be mostly padding.
                fits = _numel(mixed[:some]) < 400_000
                rank.fuse(mixed[: some if fits else 1], dtype, dims, along, end)
                mixed = mixed[some if fits else 1 :]
    return [rank.layout() for rank in ranks]


def _numel(parts: list[Part]) -> int:
    largest = max(max(part.shape, default=1) for part in parts)
    return largest ** max(len(part.shape) for part in parts) * len(parts)


def held(layout: Layout, generator: torch.Generator, strides: str = "plain") -> State:
    """The local tensors of a layout with random bits."""
    return {
        spec.name: laid_out(random_tensor(DTYPES[spec.dtype], spec.shape, generator), strides)
        for spec in layout.tensors
    }


def cut(part: Part, local: Tensor) -> Tensor:
    """The box of a part in its local tensor, bits in published order, by indexing alone."""
    reach = dict(zip(part.axes, part.shape, strict=True))
    box = bits(local)[
        tuple(slice(at, at + reach[d]) if d in reach else at for d, at in enumerate(part.at))
    ]
    order = sorted(part.axes)
    return box.permute([order.index(axis) for axis in part.axes])


def fill(layout: Layout, local: State, whole: State) -> None:
    """Lay what the parts name of the published tensors into the local ones."""
    for part in layout.parts:
        box = tuple(
            slice(begin, begin + n) for begin, n in zip(part.begin, part.shape, strict=True)
        )
        cut(part, local[part.local]).copy_(bits(whole[part.tensor])[box])
