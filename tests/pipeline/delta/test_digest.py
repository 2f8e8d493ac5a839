"""The digest and the checksum against an independent reference in plain Python."""

import hashlib
import random
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsecast.messages.errors import ManifestMismatch
from sparsecast.pipeline.delta import checksum, digest, manifest_of, partial, partial_at
from states import DTYPES, bits, changed, random_tensor, seeds, states, values

M = (1 << 64) - 1


def mix(x: int) -> int:
    """splitmix64, after docs/patch-format.md."""
    z = (x + 0x9E3779B97F4A7C15) & M
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & M
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & M
    return z ^ (z >> 31)


def weight(name: str, i: int) -> int:
    """h(name, i), after docs/patch-format.md."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    g = mix((seed + (i >> 16) * 0x9E3779B97F4A7C15) & M) | 1
    a = mix(0x5350415253454341 + ((i >> 8) & 255)) | 1
    b = mix(0x5354444947455354 + (i & 255)) | 1
    return g * a * b & M


def slow(name: str, elements: list[int], start: int = 0, *, itemsize: int = 8) -> int:
    """Σ bits · h, one element at a time."""
    if itemsize == 8:
        elements = [x * 0x9E3779B97F4A7C15 & M for x in elements]
        elements = [x ^ (x >> 32) for x in elements]
    return sum(x * weight(name, start + i) for i, x in enumerate(elements)) & M


def slow_of(name: str, tensor: torch.Tensor, start: int = 0) -> int:
    """The same of a tensor."""
    return slow(name, values(tensor), start, itemsize=tensor.element_size())


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_digest_is_the_sum_that_the_document_gives(dtype: str) -> None:
    """Every dtype, with sizes around the 256 and 65,536 of the formula, element by element."""
    generator = torch.Generator().manual_seed(1)
    state = {
        f"layer.{n}": random_tensor(DTYPES[dtype], (n,), generator) for n in (0, 1, 255, 256, 1000)
    }
    state["scalar"] = random_tensor(DTYPES[dtype], (), generator)
    state["two blocks"] = random_tensor(DTYPES[dtype], (2, 32_900), generator)
    expected = sum(slow_of(name, tensor) for name, tensor in state.items()) & M
    assert digest(state) == expected


def test_digest_of_a_known_state_never_changes() -> None:
    """A figure that another implementation can aim at, and that no release may change."""
    state = {"w": torch.arange(70_000, dtype=torch.int32), "b": torch.tensor([1.5, -0.0])}
    assert digest(state) == slow_of("w", state["w"]) + slow_of("b", state["b"]) & M
    assert f"{digest(state):016x}" == "ef2bf404e9551dac"


@settings(max_examples=30, deadline=None)
@given(states(), seeds)
def test_shares_of_shards_add_up(state: dict[str, torch.Tensor], seed: int) -> None:
    """Tensors cut anywhere, also within rows of 256, give shares whose sum is the digest."""
    rng = random.Random(seed)
    total = 0
    for name, tensor in state.items():
        flat = bits(tensor).reshape(-1)
        cuts = sorted(rng.randrange(flat.numel() + 1) for _ in range(3))
        edges = [0, *cuts, flat.numel()]
        for start, stop in pairwise(edges):
            total += partial(flat[start:stop], name, start)
    assert total & M == digest(state)


def test_shares_of_scattered_elements_add_up() -> None:
    """A shard of columns is no range: its elements are given by index."""
    tensor = torch.randn(300, 500)
    index = torch.arange(tensor.numel()).view(300, 500)
    left = partial_at(tensor[:, :123], "w", index[:, :123])
    right = partial_at(tensor[:, 123:], "w", index[:, 123:])
    assert (left + right) & M == digest({"w": tensor})
    assert partial_at(tensor[:0], "w", index[:0]) == 0


@pytest.mark.parametrize("start", [2**31 - 3, 2**32 + 255, 2**40 - 70_000])
def test_elements_beyond_two_to_the_31_count(start: int) -> None:
    """A shard far into a huge tensor: the index arithmetic does not wrap at 31 or 32 bits."""
    elements = random_tensor(torch.bfloat16, (600,), torch.Generator().manual_seed(start))
    expected = slow_of("w", elements, start)
    assert partial(elements, "w", start) == expected
    assert partial_at(elements, "w", torch.arange(start, start + 600)) == expected


def test_order_names_and_single_bits_matter() -> None:
    """Two elements exchanged, two tensors exchanged, one bit flipped: each shows in the digest."""
    state = {"a": torch.arange(600.0), "b": torch.arange(600.0) + 1}
    seen = {digest(state)}
    seen.add(digest({"a": state["b"], "b": state["a"]}))
    exchanged = state["a"].clone()
    exchanged[[3, 300]] = exchanged[[300, 3]]
    seen.add(digest({**state, "a": exchanged}))
    flipped = state["a"].clone()
    bits(flipped)[599] ^= 1 << 30
    seen.add(digest({**state, "a": flipped}))
    assert len(seen) == 4
    assert digest({"b": state["b"], "a": state["a"]}) == digest(state)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "complex64"])
def test_two_flipped_signs_do_not_cancel(dtype: str) -> None:
    """The top bit of an odd multiple is the same whatever the odd number: two flips, even of the
    highest bits, must still show, wherever they are."""
    tensor = torch.ones(64).to(DTYPES[dtype])
    sign = 1 << (8 * tensor.element_size() - 2)
    seen = set()
    for bit in (sign, -2 * sign):
        for i in range(64):
            for j in range(i):
                flipped = tensor.clone()
                bits(flipped)[[i, j]] ^= bit
                seen.add(digest({"w": flipped}))
    seen.add(digest({"w": tensor}))
    assert len(seen) == 64 * 63 + 1


def test_digest_refuses_another_manifest() -> None:
    """A worker digests with the run's manifest: a tensor of another shape is named."""
    manifest = manifest_of({"w": torch.zeros(3)})
    with pytest.raises(ManifestMismatch, match="'w' has shape"):
        digest({"w": torch.zeros(4)}, manifest=manifest)


@settings(max_examples=30, deadline=None)
@given(st.binary(max_size=3000), st.integers(0, 9))
def test_checksum_is_the_sum_that_the_document_gives(data: bytes, skip: int) -> None:
    """Any length, also not a multiple of 8, and wherever the buffer starts in memory."""
    padded = data + bytes(-len(data) % 8)
    words = [int.from_bytes(padded[i : i + 8], "little") for i in range(0, len(padded), 8)]
    expected = (slow("payload", words) + len(data) * 0xD6E8FEB86659FD93) & M
    memory = torch.zeros(skip + len(data), dtype=torch.uint8)
    memory[skip:] = torch.tensor(list(data), dtype=torch.uint8)
    assert checksum(memory[skip:]) == expected


def test_checksum_sees_every_single_bit_and_the_length() -> None:
    """Every bit of a small payload flipped in turn, and zeros added at its end."""
    payload = torch.randint(0, 256, (100,), dtype=torch.uint8)
    seen = {checksum(payload)}
    for at in range(800):
        flipped = payload.clone()
        flipped[at >> 3] ^= 1 << (at & 7)
        seen.add(checksum(flipped))
    for zeros in range(1, 20):
        seen.add(checksum(torch.cat([payload, torch.zeros(zeros, dtype=torch.uint8)])))
    assert len(seen) == 820


def test_digest_over_several_chunks() -> None:
    """More than a chunk of elements, cut into shares at odd places, sums to the same."""
    tensor = random_tensor(torch.bfloat16, (3_000_017,), torch.Generator().manual_seed(2))
    whole = digest({"w": tensor})
    cut = 1_234_567
    assert (partial(tensor[:cut], "w") + partial(tensor[cut:], "w", cut)) & M == whole
    assert digest(changed({"w": tensor}, 1e-6, 3)) != whole


def test_a_bool_is_its_byte() -> None:
    """A byte of a bool that is neither 0 nor 1 counts as it is, strided or not: a flipped bit must
    not hide behind a copy."""
    straight = torch.tensor([[1, 0, 129], [1, 1, 0]], dtype=torch.uint8)
    strided = straight.t().contiguous().t()
    assert not strided.is_contiguous()
    found = digest({"w": strided.view(torch.bool)})
    assert found == digest({"w": straight.view(torch.bool)})
    assert found == slow("w", straight.flatten().tolist(), itemsize=1)
