"""Engines of one, two and four ranks follow one trainer, each by the layouts of its ranks."""

import asyncio
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engines import FAMILIES, loaded, random_model
from ranks import fully_sharded
from runs import QUICK, Ear, Site, Tensors, eventually
from sparsecast import Replica, Shard, config_manifest, engine_layout
from sparsecast.messages.metrics import Event, TrainerMetrics, WorkerMetrics
from sparsecast.pipeline.delta import named_tensors
from trainers import Trainers

UPDATES = 10


@dataclass(frozen=True)
class Sharing:
    """How an engine spreads a model over its ranks."""

    ranks: int
    fused: bool = True
    ep: bool = False

    def loads(self, family: str, tensors: Tensors) -> list[Tensors]:
        """What each rank loads of a checkpoint, with memory of its own."""
        return [
            {
                name: tensor.clone(memory_format=torch.contiguous_format)
                for name, tensor in loaded(
                    family, tensors, self.ranks, rank, fused=self.fused, ep=self.ep
                ).items()
            }
            for rank in range(self.ranks)
        ]


ENGINES = {
    "qwen2": [Sharing(1), Sharing(2, fused=False), Sharing(4)],
    "qwen2, the other way": [Sharing(1, fused=False), Sharing(2), Sharing(4, fused=False)],
    "qwen3-moe": [Sharing(1), Sharing(2, fused=False), Sharing(4, ep=True)],
    "qwen3-moe, the other way": [
        Sharing(1, fused=False), Sharing(2, ep=True), Sharing(4, fused=False),
    ],
}  # fmt: skip


class Learner:
    """A model in fp32, of which bf16 is published: each step moves more of the weights."""

    def __init__(self, family: str) -> None:
        self.model: nn.Module = random_model(family, torch.float32)
        self._random = torch.Generator().manual_seed(1)
        self._optimizer = torch.optim.AdamW(self.model.parameters())

    def step(self, learning_rate: float) -> None:
        """One step on random tokens."""
        self._optimizer.param_groups[0]["lr"] = learning_rate
        tokens = torch.randint(100, (2, 12), generator=self._random)
        self._optimizer.zero_grad()
        self.model(input_ids=tokens, labels=tokens).loss.backward()
        self._optimizer.step()

    @property
    def published(self) -> Tensors:
        """The weights as engines get them."""
        return {name: t.to(torch.bfloat16) for name, t in named_tensors(self.model).items()}


async def start(
    site: Site, family: str, sharing: Sharing, name: str, held: list[Tensors]
) -> Replica:
    """A worker of all ranks that hold these tensors, running until the test ends."""
    manifest = config_manifest(FAMILIES[family])
    ranks: list[Replica | Shard] = []
    for rank, mine in enumerate(held):
        layout = engine_layout(
            FAMILIES[family], manifest, tp_size=sharing.ranks, tp_rank=rank,
            fused=sharing.fused, ep=sharing.ep,
        )  # fmt: skip
        given: dict[str, Any] = {
            "run": site.run, "bus": site.url, "name": name, "policy": QUICK, "layout": layout
        }  # fmt: skip
        if rank == 0:
            ranks.append(Replica(mine, ranks=sharing.ranks, **given))
        else:
            ranks.append(Shard(mine, rank=rank, **given))
    await asyncio.gather(*(rank.__aenter__() for rank in ranks))
    for one in reversed(ranks):
        site.ends(one)
    return ranks[0]


@pytest.mark.parametrize("trainers", [1, 2, 4])
@pytest.mark.parametrize("which", ENGINES)
async def test_ranks_hold_what_they_would_load(
    site: Site, ear: Ear, which: str, trainers: int
) -> None:
    """A trainer of one, two and four ranks, which share its rows; workers of one, two and four
    ranks, each fused and not, experts cut or whole, are in one window and take ten updates of a
    training, from a few changed elements to nearly all, of two ranks each what it holds. Then each
    rank has bit for bit what it would load of a checkpoint of the trainer's weights, padding and
    copies of heads too, and each worker has proven the trainer's digest. The first one began with
    zeros."""
    family = which.partition(",")[0]
    learner = Learner(family)
    if trainers == 1:
        publisher = await site.publisher(learner.model, dtype=torch.bfloat16)
    else:
        shards = fully_sharded(learner.published, trainers)
        sharded = Trainers(site, learner.published, shards)
        routing = "all-to-all" if trainers == 2 else "broadcast"
        publisher = await sharded.start(policy=replace(QUICK, routing=routing))
    engines = {f"tp{sharing.ranks}": sharing for sharing in ENGINES[which]}
    held = {name: sharing.loads(family, learner.published) for name, sharing in engines.items()}
    for tensor in held["tp1"][0].values():
        tensor.zero_()
    starts = (start(site, family, engines[name], name, held[name]) for name in engines)
    replicas = dict(zip(engines, await asyncio.gather(*starts), strict=True))
    await publisher.wait_members(3, timeout_s=30)

    def all_in() -> bool:
        opened = [e.reason for e in ear.heard if isinstance(e, Event) and e.kind == "window-open"]
        return any(reason.endswith(": tp1, tp2, tp4") for reason in opened)

    await eventually(all_in)
    for version in range(1, UPDATES + 1):
        learner.step(10 ** (0.7 * version - 7))
        if trainers == 1:
            update = await publisher.publish()
        else:
            sharded.whole = learner.published
            update = await sharded.publish()
        report = await update.wait_applied(timeout_s=20)
        assert report.complete, report
    await eventually(lambda: all(replica.verified == UPDATES for replica in replicas.values()))
    assert publisher.window == "gloo"
    rounds = [await ear.until(TrainerMetrics, version=v) for v in range(1, UPDATES + 1)]
    assert {one.encoding for one in rounds} == {"sparse", "bitmap", "dense"}

    final = learner.published
    for name, sharing in engines.items():
        told = await ear.until(WorkerMetrics, worker=name, version=UPDATES)
        assert (told.source, told.transport, told.verified) == ("window", "gloo", True)
        assert replicas[name].mismatches == 0
        for rank, expected in enumerate(sharing.loads(family, final)):
            mine = held[name][rank]
            assert mine.keys() == expected.keys()
            for tensor in expected:
                assert same(mine[tensor], expected[tensor]), f"{name}, rank {rank}: {tensor}"


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal bit for bit."""
    return one.shape == other.shape and torch.equal(one.view(torch.int16), other.view(torch.int16))
