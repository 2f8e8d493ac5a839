"""What engines do today between GPUs of one host, as one would write it with torch.distributed.

Each method has a trainer's side and a worker's side of a round, as in baselines.py, whose
acknowledgements they share: a worker answers when its device has done all of the round, over one
small gloo message. Nothing is checked on arrival by any of them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from baselines import Group, Method, Parts
from devices import Device
from shapes import Tensors

_CLOSE_S = 10.0


class World:
    """The ranks of a bench: NCCL (or gloo, for a try on CPUs), and the answers."""

    def __init__(self, group: Group, device: Device, *, backend: str) -> None:
        self._group = group
        self._backend = backend
        self.device = device

    def open(self) -> None:
        """Connect all ranks."""
        self._group.open()
        if self._backend == "nccl":
            stores: Any = dist  # its stubs leave the stores out
            dist.init_process_group(
                "nccl",
                store=stores.PrefixStore("bench-nccl", self._group.store),
                rank=self._group.rank,
                world_size=self._group.size,
                timeout=timedelta(seconds=self._group.timeout_s),
                device_id=self.device.torch,
            )

    def close(self) -> None:
        """Leave. Bounded: a group whose peer is gone may not come back from this."""
        if self._backend == "nccl":
            leaving = threading.Thread(target=dist.destroy_process_group, daemon=True)
            leaving.start()
            leaving.join(_CLOSE_S)

    def broadcast(self, tensor: Tensor) -> Any:
        """Queue a broadcast from rank 0 behind the current stream; wait() on what it returns."""
        if self._backend == "nccl":
            return dist.broadcast(tensor.view(-1).view(torch.uint8), 0, async_op=True)
        return self._group.broadcast(tensor)

    def gather_acks(self) -> None:
        """The trainer: wait for all workers' answers."""
        self._group.gather_acks()

    def acknowledge(self) -> None:
        """A worker: wait for the device, then answer."""
        self.device.synchronize()
        self._group.acknowledge(True)


class Dense:
    """All weights, one broadcast a tensor, straight into the worker's weights."""

    def __init__(self, world: World, tensors: Tensors, *, trainer: bool) -> None:
        self._world = world
        self._tensors = list(tensors.values())
        self.nbytes = _nbytes(self._tensors)

    def send(self) -> Parts:
        """The trainer's side."""
        began = time.perf_counter()
        _wait([self._world.broadcast(tensor) for tensor in self._tensors])
        self._world.gather_acks()
        return {"wire_apply": _ms(began)}

    def receive(self) -> Parts:
        """The worker's side."""
        began = time.perf_counter()
        _wait([self._world.broadcast(tensor) for tensor in self._tensors])
        self._world.acknowledge()
        return {"receive": _ms(began)}


class Buckets:
    """All weights, packed into two alternating buckets, unpacked on arrival.

    Each bucket has a stream: packing or unpacking the one overlaps with the broadcast of the
    other. The buckets are kept from round to round.
    """

    def __init__(self, world: World, tensors: Tensors, *, trainer: bool, nbytes: int) -> None:
        self._world = world
        flat = [tensor.view(-1) for tensor in tensors.values()]
        itemsize = flat[0].element_size()
        self._fills = list(_fills(flat, nbytes // itemsize))
        size = max(sum(piece.numel() for piece in fill) for fill in self._fills)
        self._buckets = [
            torch.empty(size, dtype=flat[0].dtype, device=flat[0].device)
            for _ in range(min(2, len(self._fills)))
        ]
        self._views = [
            _views(self._buckets[number % 2], fill) for number, fill in enumerate(self._fills)
        ]
        self._streams = [world.device.stream() for _ in self._buckets]
        self.nbytes = _nbytes(flat)

    def _each(self, work: Callable[[int, list[Tensor]], None]) -> None:
        device = self._world.device
        for stream in self._streams:
            device.follow(stream)
        for number, fill in enumerate(self._fills):
            with device.on(self._streams[number % 2]):
                work(number, fill)
        for stream in self._streams:
            device.join(stream)

    def _bucket(self, number: int, fill: list[Tensor]) -> Tensor:
        return self._buckets[number % 2][: sum(piece.numel() for piece in fill)]

    def send(self) -> Parts:
        """The trainer's side."""
        began = time.perf_counter()

        def pack(number: int, fill: list[Tensor]) -> None:
            torch._foreach_copy_(self._views[number], fill)
            self._world.broadcast(self._bucket(number, fill)).wait()

        self._each(pack)
        self._world.gather_acks()
        return {"wire_apply": _ms(began)}

    def receive(self) -> Parts:
        """The worker's side."""
        began = time.perf_counter()

        def unpack(number: int, fill: list[Tensor]) -> None:
            self._world.broadcast(self._bucket(number, fill)).wait()
            torch._foreach_copy_(fill, self._views[number])

        self._each(unpack)
        self._world.acknowledge()
        return {"receive": _ms(began)}


class Pairs:
    """vLLM #40096's way: `!=`, nonzero and gather a tensor; int32 positions and values.

    One broadcast of all counts goes ahead, then two broadcasts a tensor; `index_put_` on arrival.
    The trainer's old copy is brought up to date while the bytes travel.
    """

    def __init__(self, world: World, tensors: Tensors, *, trainer: bool) -> None:
        self._world = world
        self._now = [tensor.view(torch.int16).view(-1) for tensor in tensors.values()]
        self._old = [bits.clone() for bits in self._now] if trainer else []
        self._kept = list(tensors.values())
        self.nbytes = 0

    def send(self) -> Parts:
        """The trainer's side."""
        world = self._world
        began = time.perf_counter()
        found = []
        for old, now in zip(self._old, self._now, strict=True):
            index = (old != now).nonzero().view(-1)
            found.append((index.to(torch.int32), now.index_select(0, index)))
        diffed = _ms(began)
        sent_at = time.perf_counter()
        sizes = [index.numel() for index, _ in found]
        counts = torch.tensor(sizes, device=world.device.torch)
        works = [world.broadcast(counts)]
        for index, values in found:
            if index.numel():
                works += [world.broadcast(index), world.broadcast(values)]
        for old, (index, values) in zip(self._old, found, strict=True):
            if index.numel():
                old.index_put_((index,), values)
        _wait(works)
        world.gather_acks()
        self.nbytes = 8 * len(sizes) + 6 * sum(sizes)
        return {"diff": diffed, "wire_apply": _ms(sent_at)}

    def receive(self) -> Parts:
        """The worker's side."""
        world = self._world
        counts = torch.zeros(len(self._now), dtype=torch.int64, device=world.device.torch)
        began = time.perf_counter()
        _wait([world.broadcast(counts)])
        coming = []
        for at, (now, count) in enumerate(zip(self._now, counts.tolist(), strict=True)):
            if count:
                index = torch.empty(count, dtype=torch.int32, device=now.device)
                values = torch.empty(count, dtype=now.dtype, device=now.device)
                works = (world.broadcast(index), world.broadcast(values))
                coming.append((at, index, values, works))
        for at, index, values, works in coming:
            _wait(works)
            self._put(at, index, values)
        world.acknowledge()
        return {"receive_apply": _ms(began)}

    def _put(self, at: int, index: Tensor, values: Tensor) -> None:
        self._now[at].index_put_((index,), values)


class NanFilled(Pairs):
    """vLLM 0.33's way: the same wire; on arrival a NaN-filled tensor a parameter takes the values,
    and what is not NaN in it goes into the weights: work for every element."""

    def _put(self, at: int, index: Tensor, values: Tensor) -> None:
        weights = self._kept[at]
        full = torch.full_like(weights, float("nan"))
        full.view(-1).index_put_((index,), values.view(weights.dtype))
        weights.copy_(torch.where(torch.isnan(full), weights, full))


class Plain:
    """One broadcast of `nbytes`, by the device's clock: what the link carries at that size."""

    def __init__(self, world: World) -> None:
        self._world = world

    def times(self, nbytes: int, rounds: int) -> list[float]:
        """ms of each of `rounds` broadcasts, on this rank; every rank calls it."""
        device = self._world.device
        buffer = torch.zeros(nbytes, dtype=torch.uint8, device=device.torch)
        small = torch.zeros(1, dtype=torch.uint8, device=device.torch)
        found = []
        for _ in range(rounds + 2):
            # All ranks meet in a small one first: waiting for each other is no part of it.
            self._world.broadcast(small).wait()
            device_ms, _ = device.clocked(lambda: self._world.broadcast(buffer).wait())
            found.append(device_ms)
        return found[2:]


#: Those of a run on GPUs, by name; each takes the world, the tensors and whether it is the trainer.
METHODS: dict[str, Callable[..., Method]] = {
    "dense": Dense,
    "buckets_256m": lambda world, tensors, *, trainer: Buckets(
        world, tensors, trainer=trainer, nbytes=256 << 20
    ),
    "buckets_1g": lambda world, tensors, *, trainer: Buckets(
        world, tensors, trainer=trainer, nbytes=1 << 30
    ),
    "pairs": Pairs,
    "nan_filled": NanFilled,
}
#: Methods whose workers share one copy of the weights, lest 7B outgrow a GPU.
SHARED = {"buckets_1g": "buckets_256m"}


def _fills(flat: list[Tensor], size: int) -> Iterator[list[Tensor]]:
    """All elements in order, in lists of at most `size`: tensors are split where they must be."""
    fill: list[Tensor] = []
    room = size
    for tensor in flat:
        start = 0
        while start < tensor.numel():
            piece = tensor[start : start + room]
            fill.append(piece)
            start += piece.numel()
            room -= piece.numel()
            if not room:
                yield fill
                fill, room = [], size
    if fill:
        yield fill


def _views(bucket: Tensor, fill: list[Tensor]) -> list[Tensor]:
    return list(bucket[: sum(p.numel() for p in fill)].split([p.numel() for p in fill]))


def _nbytes(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _wait(works: Any) -> None:
    for work in works:
        work.wait()


def _ms(since: float) -> float:
    return 1e3 * (time.perf_counter() - since)
