"""Weights for the tests of the data path: random bits in every dtype, shape and stride."""

import random
import struct
from collections.abc import Mapping
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from sparsecast.messages.manifest import ITEMSIZE

DTYPES = {name: getattr(torch, name) for name in ITEMSIZE}
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

State = dict[str, Tensor]


def bits(tensor: Tensor) -> Tensor:
    """The bits of a tensor as integers of its itemsize, same shape and memory."""
    return tensor.view(INTEGERS[tensor.element_size()])


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Random bits: NaN payloads, infinities, subnormals and -0.0 among them."""
    size = torch.empty(0, dtype=dtype).element_size()
    high = 2 if dtype == torch.bool else 256
    raw = torch.randint(0, high, (*shape, size), dtype=torch.uint8, generator=generator)
    return raw.contiguous().view(dtype).reshape(shape)


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same elements with other strides."""
    if layout == "columns" and tensor.dim() >= 1:
        wide = torch.zeros((*tensor.shape[:-1], tensor.shape[-1] * 2 + 1), dtype=tensor.dtype)
        part = wide[..., 1 : 1 + tensor.shape[-1]]
    elif layout == "transposed" and tensor.dim() >= 2:
        part = torch.zeros(tuple(reversed(tensor.shape)), dtype=tensor.dtype).permute(
            *reversed(range(tensor.dim()))
        )
    elif layout == "askew":
        part = torch.zeros(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)
    else:
        part = torch.zeros(tensor.shape, dtype=tensor.dtype)
    bits(part).copy_(bits(tensor))
    return part


def clone(state: Mapping[str, Tensor]) -> State:
    """A copy with memory of its own and the same strides, gaps between elements included."""
    copied = {}
    for name, tensor in state.items():
        reach = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        memory = torch.zeros(reach if tensor.numel() else 0, dtype=tensor.dtype)
        copied[name] = memory.as_strided(tensor.shape, tensor.stride())
        bits(copied[name]).copy_(bits(tensor))
    return copied


def changed(state: Mapping[str, Tensor], density: float, seed: int) -> State:
    """A copy in which about `density` of the elements of each tensor have other bits."""
    generator = torch.Generator().manual_seed(seed)
    new = clone(state)
    for tensor in new.values():
        flat = bits(tensor).reshape(-1)
        mask = torch.rand(flat.shape, generator=generator) < density
        flip = torch.randint(0, 8 * flat.element_size() - 1, flat.shape, generator=generator)
        flip = torch.zeros_like(flip) if tensor.dtype == torch.bool else flip
        other = flat ^ (torch.ones_like(flat) << flip.to(flat.dtype))
        bits(tensor).copy_(torch.where(mask, other, flat).view(tensor.shape))
    return new


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether two states are the same bit for bit."""
    return list(one) == list(other) and all(
        tensor.dtype == other[name].dtype
        and tensor.shape == other[name].shape
        and torch.equal(bits(tensor), bits(other[name]))
        for name, tensor in one.items()
    )


def raw(tensor: Tensor) -> bytes:
    """The elements in C order, little-endian."""
    return bits(tensor).contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def values(tensor: Tensor) -> list[int]:
    """The elements in C order, as unsigned integers."""
    code = {1: "B", 2: "H", 4: "I", 8: "Q"}[tensor.element_size()]
    return [value for (value,) in struct.iter_unpack("<" + code, raw(tensor))]


@st.composite
def states(draw: Any, max_tensors: int = 5, max_side: int = 40) -> State:
    """A state of a few tensors: any dtype, any layout; empty, 0-dim and block-crossing ones."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shapes = st.one_of(
        st.just(()),
        st.just((0, 3)),
        st.tuples(st.integers(1, max_side)),
        st.tuples(st.integers(1, max_side), st.integers(1, max_side)),
        st.sampled_from([(65_535,), (65_537,), (2, 3, 5), (17_001,), (131_080,)]),
    )
    state = {}
    for index in range(draw(st.integers(0, max_tensors))):
        dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
        tensor = random_tensor(dtype, draw(shapes), generator)
        layout = draw(st.sampled_from(["plain", "plain", "columns", "transposed", "askew"]))
        state[f"t{index}"] = laid_out(tensor, layout)
    return state


densities = st.sampled_from([0.0, 0.0005, 0.01, 0.05, 0.2, 0.5, 0.9, 1.0])
seeds = st.integers(0, 2**31)


def garbled(data: bytes, rng: random.Random) -> bytes:
    """The bytes with one bit flipped."""
    at = rng.randrange(len(data) * 8)
    flipped = bytearray(data)
    flipped[at >> 3] ^= 1 << (at & 7)
    return bytes(flipped)
