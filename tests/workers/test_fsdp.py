"""Trainers that torch shards: real ranks of FSDP, HSDP and tensor parallelism publish what they
hold, and no rank ever gathers another one's."""

import asyncio
import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from runs import QUICK, Site, Tensors, eventually
from sparsecast import Layout, Publisher, layout_of
from sparsecast.pipeline.delta import lookup
from sparsecast.pipeline.delta.tensors import distinct
from spawn import Context, Processes

UPDATES = 10


class Block(nn.Module):
    """A norm and two layers, whose rows four ranks do not divide."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(24)
        self.up = nn.Linear(24, 38)
        self.down = nn.Linear(38, 24, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """The hidden state after this block."""
        out: Tensor = hidden + self.down(nn.functional.gelu(self.up(self.norm(hidden))))
        return out


class Toy(nn.Module):
    """Tokens in, logits out: an embedding, two blocks, a norm, a head, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(51, 24)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm = nn.LayerNorm(24)
        self.head = nn.Linear(24, 51)
        self.register_buffer("scale", torch.full((3,), 0.5))

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next token."""
        hidden = self.embed(tokens)
        for block in self.blocks:
            hidden = block(hidden)
        logits: Tensor = self.head(self.norm(hidden)) * self.scale[0]
        return logits


def _over(model: Toy, mesh: DeviceMesh) -> None:
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _fsdp(model: Toy, ranks: int) -> Layout | None:
    _over(model, init_device_mesh("cpu", (ranks,), mesh_dim_names=("dp",)))
    return None


def _hsdp(model: Toy, ranks: int) -> Layout | None:
    """Two copies, each over half of the ranks."""
    _over(model, init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("copy", "dp")))
    return None


def _fsdp_and_tp(model: Toy, ranks: int) -> Layout | None:
    """The layers of a block by columns and rows among pairs, and all of it over the pairs."""
    mesh = init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("dp", "tp"))
    for block in model.blocks:
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        parallelize_module(block, mesh["tp"], plan)
    _over(model, mesh["dp"])
    return layout_of(model, mesh=mesh)  # some lie on the one mesh, some on the other


SHARDINGS = {"fsdp": _fsdp, "hsdp": _hsdp, "fsdp-tp": _fsdp_and_tp}


def _cast(tensors: Mapping[str, Tensor]) -> Tensors:
    """A view that is given DTensors and returns such."""
    assert any(isinstance(tensor, DTensor) for tensor in tensors.values())
    return {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}


@contextlib.contextmanager
def nothing_gathered() -> Iterator[None]:
    """Whatever brings tensors of other ranks here fails."""
    names = [
        "all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "all_to_all",
        "all_to_all_single", "barrier", "broadcast", "gather", "reduce", "reduce_scatter",
        "reduce_scatter_tensor", "scatter", "send", "recv", "isend", "irecv",
    ]  # fmt: skip

    def forbidden(*_: Any, **__: Any) -> Any:
        raise AssertionError("publish() talked to other ranks through torch.distributed")

    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch.object(dist, name, forbidden))
            stack.enter_context(mock.patch.object(dist.distributed_c10d, name, forbidden))
        for name in ("full_tensor", "redistribute"):
            stack.enter_context(mock.patch.object(DTensor, name, forbidden))
        for name in ("allgather", "_allgather_base", "allreduce", "broadcast", "barrier"):
            stack.enter_context(mock.patch.object(dist.ProcessGroup, name, forbidden))
        yield


def refused(_: object) -> Any:
    """Nothing has moved, so nothing is to be looked up thoroughly."""
    raise AssertionError("publish() looked all tensors up anew")


def _full(model: nn.Module) -> Tensors:
    """The whole model as inference runs it; the one gather there is, for the test to compare."""
    whole = {}
    for name, tensor in model.state_dict().items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        whole[name] = full.detach().to(torch.bfloat16).clone()
    return whole


def train(
    context: Context, run: str, sharding: str, meeting: str, how: str
) -> tuple[int, list[bytes]]:
    """A rank: ten steps of AdamW on float32, each published as bfloat16; the first rank has the
    whole model after each. The bytes of what this rank publishes of it, and those."""
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=context.rank, world_size=context.size
    )
    torch.manual_seed(0)
    model = Toy()
    layout = SHARDINGS[sharding](model, context.size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    wholes: list[Tensors] = []
    given: dict[str, Any] = {"dtype": torch.bfloat16} if how == "dtype" else {"view": _cast}
    publisher = Publisher(
        model,
        run=run,
        bus=context.broker_url,
        rank=context.rank,
        ranks=context.size,
        layout=layout,
        policy=QUICK,
        **given,
    )
    with nothing_gathered():
        publisher.open()
    try:
        wholes.append(_full(model))
        context.mark("open")
        context.wait("worker", rank=-1)
        if context.rank == 0:
            publisher.wait_members(1, timeout_s=20)
        context.barrier("begin")
        for step in range(1, UPDATES + 1):
            tokens = torch.arange(step, step + 16).remainder(51).view(2, 8)
            loss = model(tokens).float().logsumexp(-1).sub(model(tokens)[..., 0]).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            thorough = distinct if step == 1 else refused
            with nothing_gathered(), mock.patch.object(lookup, "distinct", thorough):
                update = publisher.publish(step=step)
                assert update.version == step
                assert update.changed > 0
                if context.rank == 0:
                    report = update.wait_applied(timeout_s=20)  # type: ignore[union-attr]
                    assert report.complete, report
            wholes.append(_full(model))
        context.barrier("done")
    finally:
        publisher.close()
    dist.destroy_process_group()
    return update.dense_nbytes, [_bytes(whole) for whole in wholes] if context.rank == 0 else []


def _bytes(whole: Tensors) -> bytes:
    return b"".join(
        name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes()
        for name, tensor in sorted(whole.items())
    )


@pytest.mark.parametrize(
    ("sharding", "ranks", "how"),
    [("fsdp", 2, "dtype"), ("fsdp", 2, "view"), ("hsdp", 4, "dtype"), ("fsdp-tp", 4, "dtype")],
)
async def test_ranks_that_torch_shards_publish_what_they_hold(
    site: Site, tmp_path: Path, sharding: str, ranks: int, how: str
) -> None:
    """Real ranks train ten steps: a worker that holds the whole model has, at each version, the
    bits that gathering it would have given. publish() gathers nothing, and of what several ranks
    hold one publishes it."""
    mine = {name: tensor.to(torch.bfloat16) for name, tensor in Toy().state_dict().items()}
    for tensor in mine.values():
        tensor.zero_()
    with Processes(
        ranks, train, site.run, sharding, str(tmp_path / "meeting"), how,
        timeout_s=150, broker_url=site.url,
    ) as processes:  # fmt: skip
        await asyncio.to_thread(processes.wait, "open")
        replica = await site.replica(mine)
        await replica.wait_version(0, timeout_s=20)
        start = _bytes(mine)
        processes.mark("worker")
        # A rank that raises is told at once, with its traceback.
        results = await asyncio.to_thread(processes.results)
        await eventually(lambda: replica.verified == UPDATES)
    assert sum(nbytes for nbytes, _ in results) == sum(tensor.nbytes for tensor in mine.values())
    wholes = results[0][1]
    assert len(set(wholes)) == UPDATES + 1
    assert start == wholes[0]
    assert _bytes(mine) == wholes[UPDATES]
    assert replica.mismatches == 0
