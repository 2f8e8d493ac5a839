"""A rehearsal launches every kernel of a round."""

import pytest
import torch

from sparsecast.pipeline.delta import rehearsal
from states import DTYPES
from twins import DEVICE, by_kernels

#: In the interpreter a block takes its time.
FEW = 3_000 if DEVICE.type == "cpu" else 70_001


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_whole_tensors(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """The kernels that check, write and digest whole tensors, of every encoding, are launched, and
    leave the right bits."""
    monkeypatch.setattr(rehearsal, "_NUMEL", FEW)
    with by_kernels() as launched:
        rehearsal.rehearse_whole(DEVICE, DTYPES[dtype], DTYPES[dtype])
    assert set(launched) >= {"checksum", "scatter", "bitmap", "dense", "digest"}


@pytest.mark.parametrize("dims", [2, 5])
@pytest.mark.parametrize("dtype", ["float8_e5m2", "bfloat16", "float32", "float64"])
def test_parts(monkeypatch: pytest.MonkeyPatch, dtype: str, dims: int) -> None:
    """The kernels that write parts, of every encoding, and those that digest them, are launched for
    one dimension, for two, and so on to the last that they have; what is left goes by torch."""
    from sparsecast.pipeline.delta.kernels.regions import MOST_DIMS

    monkeypatch.setattr(rehearsal, "_NUMEL", FEW)
    with by_kernels() as launched:
        rehearsal.rehearse_parts(DEVICE, DTYPES[dtype], dims)
    for name in ("scatter_parts", "bitmap_parts", "dense_parts", "digest_parts"):
        assert launched.count(name) == min(dims, MOST_DIMS)


def test_a_kernel_that_writes_elsewhere_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that leaves out the bitmap sections of parts is refused before the first round."""
    from sparsecast.messages.errors import CorruptPatch
    from sparsecast.pipeline.delta import readied

    monkeypatch.setattr(rehearsal, "_NUMEL", FEW)
    with by_kernels(), pytest.MonkeyPatch.context() as patched:
        patched.setattr(readied, "bitmap_parts", lambda *_: None)
        with pytest.raises(CorruptPatch, match="kernels do not work"):
            rehearsal.rehearse_parts(DEVICE, torch.bfloat16, 2)
