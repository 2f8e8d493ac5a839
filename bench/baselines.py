"""What sparsecast is measured against: torch.distributed over gloo, as one would write it.

Each method has a trainer's side and a worker's side of one round; both return what its parts took,
in ms. Every broadcast of a round is queued before the first is waited for, so that none waits for
Python. A worker acknowledges when its weights hold the update.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from shapes import Tensors
from sparsecast.pipeline.delta import checksum

Parts = dict[str, float]
_ACK = 7


class Group:
    """A gloo process group of its own, rank 0 the trainer. `port` 0 at rank 0 takes a free one."""

    def __init__(
        self, rank: int, size: int, *, own: str, trainer: str, port: int, timeout_s: float
    ) -> None:
        self._limit = timedelta(seconds=timeout_s)
        self._own = own
        self.timeout_s = timeout_s
        self.rank = rank
        self.size = size
        torch_dist: Any = dist  # its stubs leave the stores out
        self.store = torch_dist.TCPStore(
            trainer, port, size, rank == 0, self._limit, wait_for_workers=False
        )
        self._group: Any = None

    @property
    def port(self) -> int:
        """Where the store of rank 0 listens."""
        return int(self.store.port)

    def open(self) -> None:
        """Connect all ranks."""
        gloo: Any = dist.ProcessGroupGloo
        options = gloo._Options()
        options._timeout = self._limit
        options._devices = [gloo.create_device(hostname=self._own)]
        self._group = gloo(self.store, self.rank, self.size, options)

    def broadcast(self, tensor: Tensor) -> Any:
        """Queue a broadcast of a contiguous tensor from rank 0, as bytes."""
        options = dist.BroadcastOptions()
        options.rootRank = 0
        return self._group.broadcast([tensor.view(-1).view(torch.uint8)], options)

    def acknowledge(self, ok: bool) -> None:
        """A worker: tell the trainer that the round is over here."""
        self._group.send([torch.tensor([int(ok)])], 0, _ACK).wait()

    def gather_acks(self) -> None:
        """The trainer: wait for all workers."""
        for rank in range(1, self.size):
            ack = torch.zeros(1, dtype=torch.int64)
            self._group.recv([ack], rank, _ACK).wait()
            if not int(ack.item()):
                raise RuntimeError(f"rank {rank} refused what it received")


class Method(Protocol):
    """One way to bring the workers' weights up to date; `nbytes` of the last round's payload."""

    nbytes: int

    def send(self) -> Parts:
        """The trainer's side of a round."""

    def receive(self) -> Parts:
        """A worker's side of a round."""


class Dense:
    """All weights, one broadcast a tensor, straight into the worker's weights."""

    def __init__(self, group: Group, tensors: Tensors, *, trainer: bool) -> None:
        self._group = group
        self._tensors = list(tensors.values())
        self.nbytes = sum(t.numel() * t.element_size() for t in self._tensors)

    def send(self) -> Parts:
        """The trainer's side."""
        began = time.perf_counter()
        _wait([self._group.broadcast(tensor) for tensor in self._tensors])
        self._group.gather_acks()
        return {"wire_apply": _ms(began)}

    def receive(self) -> Parts:
        """The worker's side."""
        began = time.perf_counter()
        _wait([self._group.broadcast(tensor) for tensor in self._tensors])
        received = _ms(began)
        self._group.acknowledge(True)
        return {"receive": received}


class DenseSafe:
    """All weights, received as safely as ours: into staging, checksummed, then copied.

    The trainer's checksums go along; a worker checks each tensor while the next ones arrive, and
    writes nothing before all of them are right.
    """

    def __init__(self, group: Group, tensors: Tensors, *, trainer: bool) -> None:
        self._group = group
        self._tensors = list(tensors.values())
        self.nbytes = sum(t.numel() * t.element_size() for t in self._tensors)
        self.nbytes += 8 * len(self._tensors)
        self._staging: list[Tensor] = []

    def send(self) -> Parts:
        """The trainer's side."""
        began = time.perf_counter()
        sums = torch.tensor([_checksum(tensor) for tensor in self._tensors])
        checked = _ms(began)
        sent_at = time.perf_counter()
        _wait([self._group.broadcast(tensor) for tensor in [sums, *self._tensors]])
        self._group.gather_acks()
        return {"checksum": checked, "wire_apply": _ms(sent_at)}

    def receive(self) -> Parts:
        """The worker's side."""
        if not self._staging:  # kept between rounds: its first touch is not measured
            self._staging = [torch.empty_like(tensor) for tensor in self._tensors]
        sums = torch.zeros(len(self._tensors), dtype=torch.int64)
        began = time.perf_counter()
        works = [self._group.broadcast(tensor) for tensor in [sums, *self._staging]]
        _wait(works[:1])
        right = True
        for work, staged, expected in zip(works[1:], self._staging, sums.tolist(), strict=True):
            work.wait()
            right = right and _checksum(staged) == expected
        received = _ms(began)
        copied_at = time.perf_counter()
        if right:
            for tensor, staged in zip(self._tensors, self._staging, strict=True):
                tensor.copy_(staged)
        copied = _ms(copied_at)
        self._group.acknowledge(right)
        return {"receive_check": received, "apply": copied}


class Peers:
    """The peers' sparse way: `!=`, nonzero and gather a tensor; int32 indices and values.

    One broadcast of all counts goes ahead, then two broadcasts a tensor; `index_put_` on arrival.
    Nothing is checked. The trainer brings its old copy up to date while the bytes travel.
    """

    def __init__(self, group: Group, tensors: Tensors, *, trainer: bool) -> None:
        self._group = group
        self._now = [tensor.view(torch.int16).view(-1) for tensor in tensors.values()]
        self.old = [tensor.clone() for tensor in self._now] if trainer else []
        self.nbytes = 0

    def send(self) -> Parts:
        """The trainer's side."""
        began = time.perf_counter()
        found = []
        for old, now in zip(self.old, self._now, strict=True):
            index = (old != now).nonzero().view(-1)
            found.append((index, index.to(torch.int32), now.index_select(0, index)))
        diffed = _ms(began)
        sent_at = time.perf_counter()
        counts = torch.tensor([index.numel() for index, _, _ in found])
        works = [self._group.broadcast(counts)]
        for index, narrow, values in found:
            if index.numel():
                works += [self._group.broadcast(narrow), self._group.broadcast(values)]
        for old, (index, _, values) in zip(self.old, found, strict=True):
            old.index_put_((index,), values)
        _wait(works)
        self._group.gather_acks()
        self.nbytes = 8 * counts.numel() + 6 * int(counts.sum().item())
        return {"diff": diffed, "wire_apply": _ms(sent_at)}

    def receive(self) -> Parts:
        """The worker's side."""
        counts = torch.zeros(len(self._now), dtype=torch.int64)
        began = time.perf_counter()
        _wait([self._group.broadcast(counts)])
        coming = []
        for now, count in zip(self._now, counts.tolist(), strict=True):
            if count:
                index = torch.empty(count, dtype=torch.int32)
                values = torch.empty(count, dtype=now.dtype)
                works = (self._group.broadcast(index), self._group.broadcast(values))
                coming.append((now, index, values, works))
        applied = 0.0
        for now, index, values, works in coming:
            _wait(works)
            at = time.perf_counter()
            now.index_put_((index,), values)
            applied += _ms(at)
        everything = _ms(began)
        self._group.acknowledge(True)
        return {"receive": everything - applied, "apply": applied}


#: Those of a run on CPUs, by name; each takes the group, the tensors and whether it is the trainer.
METHODS: dict[str, Callable[..., Method]] = {
    "dense": Dense,
    "dense_safe": DenseSafe,
    "peers": Peers,
}


def _checksum(tensor: Tensor) -> int:
    """As int64, as tensors carry it."""
    found = checksum(tensor.view(-1).view(torch.uint8))
    return found - (1 << 64) if found >> 63 else found


def _wait(works: Any) -> None:
    for work in works:
        work.wait()


def _ms(since: float) -> float:
    return 1e3 * (time.perf_counter() - since)
