"""The data path by kernels and by its torch reference, side by side, and a worker that follows.

On the first GPU where there is one, else on the CPU, where kernels run in Triton's interpreter:
there every operation of every program takes a millisecond or so, so models are of a few blocks.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsecast.pipeline.delta import (
    Diffed,
    Patch,
    Shadow,
    apply_checked,
    check,
    digest,
    kernels,
    manifest_of,
)
from states import State, bits, random_tensor

DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")

#: One element alone would be less than a pass of anything; this crosses a block and a tile.
WIDE = 65_536 + 4_465


@contextmanager
def by_torch() -> Iterator[None]:
    """Within, no device has kernels."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(kernels, "usable", lambda device: False)
        yield


@contextmanager
def by_kernels() -> Iterator[list[str]]:
    """Within, the device has kernels; gives the names of those that are launched.

    The readers of weights are noted: find, digest, scatter, bitmap, dense and checksum, and those
    of parts.
    """
    launched: list[str] = []

    def noting(name: str, launch: Callable[..., None]) -> Callable[..., None]:
        def noted(*args: Any, **kwargs: Any) -> None:
            launched.append(name)
            launch(*args, **kwargs)

        return noted

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(kernels, "usable", lambda device: device.type == DEVICE.type)
        for module in ("steps", "readied", "slices"):
            full = f"sparsecast.pipeline.delta.{module}"
            __import__(full)
            for name, value in list(vars(sys.modules[full]).items()):
                home = f"{kernels.__name__}.{name.removesuffix('_parts')}"
                if getattr(value, "__module__", "").startswith(home):
                    patched.setattr(sys.modules[full], name, noting(name, value))
        yield launched


def placed(tensor: Tensor) -> Tensor:
    """The same bits on the device, with memory of its own, the same strides and the same offset."""
    reach = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    offset = tensor.storage_offset() if tensor.numel() else 0
    memory = torch.zeros(offset + max(reach, 0), dtype=tensor.dtype, device=DEVICE)
    there = memory.as_strided(tensor.shape, tensor.stride(), offset)
    bits(there).copy_(bits(tensor))
    return there


def copied(state: Mapping[str, Tensor]) -> State:
    """All tensors of a state, each as placed() gives it."""
    return {name: placed(tensor) for name, tensor in state.items()}


def step(state: Mapping[str, Tensor], density: float | Mapping[str, float], seed: int) -> None:
    """Change about so much of each tensor's elements, in place, one bit each; names may differ."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in state.items():
        share = density if isinstance(density, float) else density.get(name, 0.0)
        size = tensor.element_size()
        mask = torch.rand(tensor.shape, generator=generator) < share
        high = 1 if tensor.dtype == torch.bool else 8 * size - 1
        flip = torch.randint(0, high, tensor.shape, generator=generator)
        change = mask.to(torch.int64) << flip
        bits(tensor).bitwise_xor_(change.to(bits(tensor).dtype).to(tensor.device))


def require_same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    """Two states are the same bit for bit."""
    assert list(one) == list(other)
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        differ = bits(tensor).cpu() != bits(other[name]).cpu()
        assert not differ.any(), f"{name} differs in {int(differ.sum())} elements"


def require_same_patch(one: Patch, other: Patch) -> None:
    """Two patches are the same bytes; says where they part."""
    first, second = one.buffer.cpu(), other.buffer.cpu()
    assert first.numel() == second.numel(), (one.encoding, other.encoding)
    differ = (first != second).nonzero().flatten().tolist()
    assert not differ, f"{len(differ)} bytes differ from {differ[0]} on: {one.sections}"


def model(dtype: torch.dtype, seed: int = 0, **shapes: tuple[int, ...]) -> State:
    """Random bits of one dtype in the given shapes, on the device."""
    generator = torch.Generator().manual_seed(seed)
    return copied({n: random_tensor(dtype, shape, generator) for n, shape in shapes.items()})


class Twins:
    """One model, a shadow that is diffed by kernels, one by torch, and a worker that is patched.

    The tensors of `state` are changed, or replaced, from outside.
    """

    def __init__(self, state: State, *, dtype: Any = None, host: bool = False) -> None:
        self.state = state
        self.version = 0
        with by_kernels():
            self.shadow = Shadow(state, dtype=dtype, host=host)
        with by_torch():
            self.reference = Shadow(state, dtype=dtype)
            self.worker = {
                spec.name: placed(state[spec.name].to(getattr(torch, spec.dtype)))
                for spec in self.reference.manifest.tensors
            }
        assert self.shadow.digest == self.reference.digest

    def publish(self, *, fused: bool = True) -> Diffed:
        """Diff by kernels (if `fused`; else they must see that they cannot) and by torch: the same
        bytes, digest and checksum."""
        versions = {"base_version": self.version, "version": self.version + 1}
        with by_kernels() as launched:
            found = self.shadow.diff(self.state, **versions)
            facts = found.digest, found.checksum, self.shadow.digest
        assert ("find" in launched) == fused
        with by_torch():
            expected = self.reference.diff(self.state, **versions)
        require_same_patch(found.patch, expected.patch)
        assert facts == (expected.digest, expected.checksum, expected.digest)
        self.version += 1
        return found

    def deliver(self, found: Diffed) -> list[str]:
        """Check and apply by kernels what publish() gave; the worker holds the state. Gives the
        kernels that wrote."""
        manifest = manifest_of(self.worker)
        with by_kernels() as launched:
            checked = check(Patch.from_buffer(found.patch.buffer), manifest)
            assert checked.readied is not None
            launched.clear()
            apply_checked(checked, self.worker)
            wrote = list(launched)
            assert digest(self.worker, manifest=manifest) == found.digest
        return wrote
