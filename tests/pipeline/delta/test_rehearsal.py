"""A rehearsal is a small update of every kind, and finds a device that computes wrongly."""

from typing import Any

import pytest
import torch

from sparsecast.messages.errors import CorruptPatch
from sparsecast.pipeline.delta import digest, rehearsal
from sparsecast.pipeline.delta.parts import Parts
from sparsecast.pipeline.delta.rehearsal import rehearse_parts, rehearse_whole
from states import DTYPES

CPU = torch.device("cpu")
PUBLISHED = ["bfloat16", "float8_e5m2", "float64", "int64", "bool", "complex64"]


@pytest.mark.parametrize(
    ("held", "dtype"), [("float32", "bfloat16"), *((dtype, dtype) for dtype in PUBLISHED)]
)
def test_a_rehearsal_is_a_round(held: str, dtype: str) -> None:
    """Diff, merge, check, apply and digest of a small state, with sparse, bitmap and dense
    sections, agree for every kind of tensor."""
    rehearse_whole(CPU, DTYPES[held], DTYPES[dtype])


@pytest.mark.parametrize("dims", range(1, 7))
@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e5m2", "bool", "complex64"])
def test_parts_are_rehearsed(monkeypatch: pytest.MonkeyPatch, dtype: str, dims: int) -> None:
    """An update of all encodings by a layout, whose parts are found by one dimension, by two, up to
    as many as a tensor has: the ranks' digest is the trainer's."""
    seen: list[Parts] = []
    encodings: set[str] = set()

    def checked(patch: Any, manifest: Any) -> Any:
        encodings.update(section.encoding.name for section in patch.sections_of(manifest))
        return check(patch, manifest)

    def applied(done: Any, tensors: Any, *, layout: Any) -> Any:
        seen.append(Parts(layout, done.manifest))
        return apply_checked(done, tensors, layout=layout)

    check, apply_checked = rehearsal.check, rehearsal.apply_checked
    monkeypatch.setattr(rehearsal, "check", checked)
    monkeypatch.setattr(rehearsal, "apply_checked", applied)
    rehearse_parts(CPU, DTYPES[dtype], dims)
    (parts,) = seen
    assert encodings == {"SPARSE", "BITMAP", "DENSE"}
    for at in range(3):
        found = {len(region.held) for region in parts.regions if region.tensor == at}
        assert found == set(range(1, dims + 1))


def test_a_device_that_computes_wrongly_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that leave other bits than they should, for whole tensors or for parts, are an error
    at the start, not a resync in every round."""

    def wrong(tensors: Any, **how: Any) -> int:
        return digest(tensors, **how) ^ 1

    monkeypatch.setattr(rehearsal, "digest", wrong)
    with pytest.raises(CorruptPatch, match="kernels do not work"):
        rehearse_whole(CPU, torch.bfloat16, torch.bfloat16)
    with pytest.raises(CorruptPatch, match="kernels do not work"):
        rehearse_parts(CPU, torch.bfloat16, 2)
