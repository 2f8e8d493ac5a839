"""The layout of one rank: where the tensors that it holds lie in those that are published.

A rank of an engine holds parts: rows or columns of a published tensor under tensor parallelism,
several tensors fused into one, experts stacked into one. Patches and digests stay in the
coordinates of the published tensors; each rank takes what its layout names.
"""

from __future__ import annotations

import msgspec

from .manifest import TensorSpec


class Part(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A box of a published tensor, and the box of a local one that holds it, element for element.

    Element begin + d of the published tensor is element at + d' of the local one, for every d with
    0 ≤ d < shape, where d'[axes[k]] = d[k] and every other d' is 0.
    """

    #: The published tensor, with the first index and the extent of the box in each dimension of it.
    tensor: str
    begin: tuple[int, ...]
    shape: tuple[int, ...]
    #: The local tensor, with the first index of the box in each dimension of it.
    local: str
    at: tuple[int, ...]
    #: For each dimension of the published tensor, the one of the local tensor along which it runs.
    axes: tuple[int, ...]
    #: Whether its share of the digest is this rank's: of what several hold, one counts it.
    counted: bool = True


class Padding(msgspec.Struct, frozen=True, kw_only=True):
    """A box of a local tensor that holds nothing published: rows of a padded vocabulary, say."""

    local: str
    at: tuple[int, ...]
    shape: tuple[int, ...]


class Layout(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The local tensors of one rank, and where each element of them comes from."""

    tensors: tuple[TensorSpec, ...]
    parts: tuple[Part, ...]
    padding: tuple[Padding, ...] = ()
