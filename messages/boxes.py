"""Boxes of elements, and whether several of them cover a tensor once and no more."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from itertools import product
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
