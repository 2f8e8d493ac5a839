"""Digests and checksums by kernels are those by torch."""

from functools import partial as bound

import pytest
import torch

from sparsecast.pipeline.delta import checksum, digest, manifest_of, partial
from states import DTYPES, laid_out, random_tensor
from twins import DEVICE, WIDE, by_kernels, by_torch, copied, model, placed

MASK = (1 << 64) - 1


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_a_state(dtype: str) -> None:
    """Random bits of every dtype: more than a block, little, 0-dim, none, strided and askew; and
    the parts of it add up."""
    generator = torch.Generator().manual_seed(2)
    state = model(DTYPES[dtype], wide=(WIDE,), small=(7,), scalar=(), none=(0, 3), block=(256, 256))
    for layout in ("transposed", "askew"):
        state[layout] = placed(laid_out(random_tensor(DTYPES[dtype], (37, 41), generator), layout))
    with by_torch():
        expected = digest(state)
    with by_kernels() as launched:
        assert digest(state) == expected
        assert digest(state, manifest=manifest_of(state)) == expected
    assert "digest" in launched
    assert sum(partial(tensor, name) for name, tensor in state.items()) & MASK == expected


def test_one_bit_and_one_place() -> None:
    """A bit flips, or two elements change places: another digest, the reference's."""
    state = model(torch.bfloat16, w=(3_000,), v=(3_000,))
    other = copied(state)
    other["w"][[1, 2_999]] = state["w"][[2_999, 1]]
    swapped = {"v": state["w"], "w": state["v"]}
    found = []
    for one in (state, other, swapped):
        with by_torch():
            expected = digest(one)
        with by_kernels():
            found.append(digest(one))
        assert found[-1] == expected
    assert len(set(found)) == 3


def test_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large state is read slice by slice, others may go between: the digest is the same, and
    `pause` is called between slices, not before the first nor behind the last."""
    from sparsecast.pipeline.delta import slices

    state = model(torch.uint8, a=(3 * 65_536,), b=(WIDE,)) | model(torch.float32, c=(65_537,))
    with by_torch():
        expected = digest(state)
    monkeypatch.setattr(slices, "_SLICE_NBYTES", 4 * 65_536)
    pauses: list[int] = []
    with by_kernels() as launched:
        assert digest(state, pause=bound(pauses.append, 1)) == expected
    assert (
        launched.count("digest") == 4
    )  # of five blocks of one byte: 4 and 1; two of four: 1 and 1
    assert len(pauses) == 3


@pytest.mark.parametrize("nbytes", [8, 16, 4_096, 32_768, 32_776, 530_000, 600_008])
def test_a_payload(nbytes: int) -> None:
    """Payloads of one word, two, a program's share and a word more, more than a block of words."""
    generator = torch.Generator().manual_seed(nbytes)
    payload = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator).to(DEVICE)
    with by_torch():
        expected = checksum(payload)
    with by_kernels() as launched:
        assert checksum(payload) == expected
        assert launched == ["checksum"]
        payload[-1] ^= 0x80
        assert checksum(payload) != expected


def test_payloads_that_are_not_whole_words() -> None:
    """An odd length, or an odd start: torch does it, with the same result wherever it lies."""
    payload = torch.arange(1_000, device=DEVICE).to(torch.uint8)
    for nbytes, start in ((999, 0), (992, 8), (992, 3)):
        with by_torch():
            expected = checksum(payload[start : start + nbytes].clone())
        with by_kernels() as launched:
            assert checksum(payload[start : start + nbytes]) == expected
        assert launched == []
