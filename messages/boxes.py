"""Boxes of elements: which of them meet, and whether several cover a tensor once and no more."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations, product
from typing import NamedTuple


class Box(NamedTuple):
    """The elements from index `begin` on, `shape` of them along each dimension."""

    begin: tuple[int, ...]
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"the box at {list(self.begin)} of shape {list(self.shape)}"

    @property
    def end(self) -> tuple[int, ...]:
        """One past the last index in each dimension."""
        return tuple(b + n for b, n in zip(self.begin, self.shape, strict=True))

    def shared(self, other: Box) -> Box:
        """What it has in common with another box of the same tensor; perhaps of no elements."""
        begin = tuple(map(max, self.begin, other.begin))
        ends = map(min, self.end, other.end)
        return Box(begin, tuple(max(e - b, 0) for b, e in zip(begin, ends, strict=True)))

    def within(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of this shape has all of it."""
        return len(self.begin) == len(shape) and all(
            b >= 0 and n >= 0 and b + n <= size
            for b, n, size in zip(self.begin, self.shape, shape, strict=True)
        )

    def holds(self, index: tuple[int, ...]) -> bool:
        """Whether the element at this index is one of it."""
        return all(b <= i < e for b, i, e in zip(self.begin, index, self.end, strict=True))


class Miscount(NamedTuple):
    """An element that is not covered once, by its index, and how often it is."""

    element: tuple[int, ...]
    times: int


def first_miscount(shape: tuple[int, ...], boxes: Iterable[Box]) -> Miscount | None:
    """The first element (in C order) of a tensor that the boxes within it do not cover once.

    The number of boxes over x is Σ w(c) over the corners c ≤ x, where a box gives each of its 2^d
    corners a weight: +1, or −1 if an odd number of its coordinates are ends. All elements are
    covered once just if these weights add up, corner by corner, to those of the tensor itself;
    where they do not, x is the lexicographically smallest such corner: no other one is ≤ x. So n
    boxes take O(n · 2^d), however they lie.
    """
    signs = [1 - 2 * (sum(ends) % 2) for ends in product((0, 1), repeat=len(shape))]
    excess: defaultdict[tuple[int, ...], int] = defaultdict(int)
    for begin, extent in boxes:
        edges = [(b, b + n) for b, n in zip(begin, extent, strict=True)]
        for corner, sign in zip(product(*edges), signs, strict=True):
            excess[corner] += sign
    for corner, sign in zip(product(*((0, size) for size in shape)), signs, strict=True):
        excess[corner] -= sign
    first = min((corner for corner, weight in excess.items() if weight), default=None)
    return None if first is None else Miscount(first, 1 + excess[first])


def meetings(boxes: Sequence[Box]) -> Iterator[tuple[int, int]]:
    """The pairs of boxes of one tensor that have elements in common, by place, the lower first.

    They are swept along the dimension in which they begin at the most different indices, and each
    is held against those that reach as far: n boxes in a row, or two rows of them, take O(n log n).
    """
    solid = [at for at, box in enumerate(boxes) if 0 not in box.shape]
    if not solid:
        return
    dims = range(len(boxes[solid[0]].begin))
    along = max(dims, key=lambda d: len({boxes[at].begin[d] for at in solid}), default=None)
    if along is None:  # of a 0-dim tensor each has the one element
        yield from combinations(solid, 2)
        return
    reaching: list[int] = []
    for at in sorted(solid, key=lambda at: boxes[at].begin[along]):
        first = boxes[at].begin[along]
        reaching = [o for o in reaching if boxes[o].begin[along] + boxes[o].shape[along] > first]
        for other in reaching:
            if 0 not in boxes[at].shared(boxes[other]).shape:
                yield min(at, other), max(at, other)
        reaching.append(at)


def first_meeting(boxes: Sequence[Box]) -> tuple[int, ...] | None:
    """An element that several boxes of one tensor hold, if there is one."""
    for one, other in meetings(boxes):
        return boxes[one].shared(boxes[other]).begin
    return None


def gap_at(index: tuple[int, ...], shape: tuple[int, ...], boxes: Iterable[Box]) -> Box:
    """A box of elements that none of the boxes covers, which begins at such an element.

    Where just one box of a tensor that others make up is missing, and this is its first element,
    it is that box.
    """

    def dims_ahead(box: Box) -> list[int]:
        return [d for d, (b, i) in enumerate(zip(box.begin, index, strict=True)) if b > i]

    extent = [size - i for i, size in zip(index, shape, strict=True)]
    # Boxes straight ahead leave no choice where the gap ends; those aslant may lie beyond it then.
    for box in sorted(boxes, key=lambda box: len(dims_ahead(box))):
        if all(
            n and e > i and b < i + size
            for b, n, e, i, size in zip(box.begin, box.shape, box.end, index, extent, strict=True)
        ):
            d = dims_ahead(box)[0]
            extent[d] = box.begin[d] - index[d]
    return Box(index, tuple(extent))
