"""What a trainer of several ranks does today, as one would write it with torch.distributed: gather
each rank's shards on the first one into full tensors, then broadcast these.

gloo on CPUs and for what keeps step; NCCL between GPUs. Every collective of a round is queued
before the first is waited for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from devices import Device
from shapes import Tensors
from sharding import rows_of

HOST = "127.0.0.1"


class World:
    """All processes: the ranks of the trainer first, then those of the worker.

    `trainers` are the former; `fleet` is the first of them with all of the latter.
    """

    def __init__(self, store: Any, rank: int, ranks: int, tp: int, device: Device) -> None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host's name may have no address
        self.device = device
        self.rank, self.ranks = rank, ranks
        size = ranks + tp
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.is_cuda else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=60),
            device_id=device.torch if device.is_cuda else None,
        )
        self.trainers: Any = dist.new_group(list(range(ranks)))
        self.fleet: Any = dist.new_group([0, *range(ranks, size)])

    def meet(self, group: Any) -> None:
        """Wait until all of the group are here, with nothing left to do on their devices."""
        self.device.synchronize()
        dist.all_reduce(torch.zeros(1), group=group)

    def gather(self, shards: Tensors, full: Tensors) -> None:
        """The shards of every rank of the trainer into the first one's full tensors."""
        if self.ranks == 1:
            return  # they are the same ones
        works = []
        for name, shard in shards.items():
            pieces = None
            if self.rank == 0:
                pieces = [_bytes(rows) for rows in rows_of(full[name], self.ranks)]
            works.append(dist.gather(_bytes(shard), pieces, 0, self.trainers, async_op=True))
        for work in works:
            work.wait()
        self.device.synchronize()

    def broadcast(
        self, full: Tensors, arrived: Callable[[str, Tensor], None] | None = None
    ) -> None:
        """The first rank's full tensors to the ranks of the worker, which take each as it comes."""
        works: Sequence[Any] = [
            dist.broadcast(_bytes(tensor), 0, self.fleet, async_op=True) for tensor in full.values()
        ]
        for work, (name, tensor) in zip(works, full.items(), strict=True):
            work.wait()
            if arrived is not None:
                arrived(name, tensor)

    def close(self) -> None:
        """Leave."""
        dist.destroy_process_group()


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)
