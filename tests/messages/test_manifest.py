"""The manifest names a model, and names the first difference of two."""

from __future__ import annotations

import copy
import pickle

import msgspec
import pytest
import torch

from sparsecast.messages.errors import ManifestMismatch
from sparsecast.messages.manifest import ITEMSIZE, Manifest, TensorSpec


def _manifest(*specs: tuple[str, str, tuple[int, ...]]) -> Manifest:
    return Manifest(tensors=tuple(TensorSpec(*spec) for spec in specs))


BASE = _manifest(("embed", "bfloat16", (16, 4)), ("norm", "float32", ()))


def test_sizes() -> None:
    """Elements and bytes are those of the dense tensors, a 0-dim one counting one element."""
    assert [spec.numel for spec in BASE.tensors] == [64, 1]
    assert BASE.numel == 65
    assert BASE.nbytes == 64 * 2 + 4


@pytest.mark.parametrize("name", sorted(ITEMSIZE))
def test_item_sizes_are_torchs(name: str) -> None:
    """Every dtype that a manifest may name has torch's size."""
    assert getattr(torch, name).itemsize == ITEMSIZE[name]


def test_the_hash_names_order_names_dtypes_and_shapes() -> None:
    """Equal manifests have equal hashes; any change makes another."""
    same = _manifest(("embed", "bfloat16", (16, 4)), ("norm", "float32", ()))
    others = [
        _manifest(("norm", "float32", ()), ("embed", "bfloat16", (16, 4))),
        _manifest(("embed2", "bfloat16", (16, 4)), ("norm", "float32", ())),
        _manifest(("embed", "float16", (16, 4)), ("norm", "float32", ())),
        _manifest(("embed", "bfloat16", (4, 16)), ("norm", "float32", ())),
    ]
    assert same.hash == BASE.hash
    assert len({BASE.hash, *(other.hash for other in others)}) == 5
    # The hash is on the wire: another implementation has to find the same one.
    assert BASE.hash == "ed6ccabcf1808edaadc00ac6b4c70f62"


@pytest.mark.parametrize(
    ("other", "names"),
    [
        (_manifest(("embed", "bfloat16", (16, 4))), "'norm' is missing"),
        (_manifest(("embed", "bfloat16", (16, 8)), ("norm", "float32", ())), r"\[16, 8\]"),
        (_manifest(("embed", "float16", (16, 4)), ("norm", "float32", ())), "float16"),
        (Manifest(tensors=(*BASE.tensors, TensorSpec("head", "float32", (2,)))), "'head' is only"),
    ],
    ids=["missing", "shape", "dtype", "extra"],
)
def test_the_first_difference_is_named(other: Manifest, names: str) -> None:
    """A worker with another model learns which tensor it is."""
    with pytest.raises(ManifestMismatch, match=names):
        BASE.require_same(other)


def test_figures_are_computed_once_and_do_not_travel() -> None:
    """Hash and sizes are kept on the object; equality, copies and the wire know nothing of it."""
    specs = (TensorSpec("w", "bfloat16", (3, 4)), TensorSpec("b", "float32", (5,)))
    asked, fresh = Manifest(tensors=specs), Manifest(tensors=specs)
    assert asked.hash is asked.hash
    assert (asked.numel, asked.nbytes) == (17, 44)
    assert asked == fresh
    assert hash(asked) == hash(fresh)
    assert msgspec.msgpack.encode(asked) == msgspec.msgpack.encode(fresh)
    for other in (copy.deepcopy(asked), pickle.loads(pickle.dumps(asked))):
        assert (other, other.hash) == (asked, asked.hash)
    wider = msgspec.structs.replace(asked, tensors=specs[:1])
    assert (wider.numel, wider.hash) == (12, Manifest(tensors=specs[:1]).hash)


def test_order_alone_is_no_difference() -> None:
    """A worker may list its tensors in another order: the trainer's counts."""
    BASE.require_same(Manifest(tensors=BASE.tensors[::-1]))


@pytest.mark.parametrize(
    ("specs", "names"),
    [
        ((("a", "float31", (1,)),), "float31"),
        ((("a", "float32", (-1,)),), "negative"),
        ((("a", "float32", (1,)), ("a", "float32", (2,))), "twice"),
    ],
    ids=["dtype", "size", "twice"],
)
def test_impossible_manifests_are_refused(
    specs: tuple[tuple[str, str, tuple[int, ...]], ...], names: str
) -> None:
    """A manifest from the wire cannot name what no model has."""
    with pytest.raises(ValueError, match=names):
        _manifest(*specs)
