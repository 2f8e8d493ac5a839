"""A worker whose weights are spread over several ranks, all of them in one process."""

import asyncio
from typing import Any

from ranks import held, same, split
from runs import QUICK, Site, Tensors
from sparsecast import Replica, Shard
from sparsecast.workers.engine import ModuleEngine


class Team:
    """A worker of several ranks: the first one's replica, and the others' shards."""

    def __init__(self, site: Site, start: Tensors, ranks: int, name: str = "w0") -> None:
        self.site = site
        self.name = name
        self.layouts = split(start, ranks)
        self.held = [held(layout, start) for layout in self.layouts]
        self.engines = [ModuleEngine(mine) for mine in self.held]

    def first(self, **options: Any) -> Replica:
        """The first rank, not yet entered."""
        given = {"name": self.name, "policy": QUICK, "layout": self.layouts[0]} | options
        return Replica(
            self.engines[0],
            run=self.site.run,
            bus=self.site.url,
            ranks=len(self.layouts),
            **given,
        )

    def other(self, rank: int, **options: Any) -> Shard:
        """Another rank, not yet entered."""
        given = {"name": self.name, "policy": QUICK, "layout": self.layouts[rank]} | options
        return Shard(self.engines[rank], run=self.site.run, bus=self.site.url, rank=rank, **given)

    async def start(self, **options: Any) -> tuple[Replica, list[Shard]]:
        """All ranks, running until the test ends."""
        first = self.first(**options)
        common = {name: options[name] for name in options if name in ("policy", "log")}
        others = [self.other(rank, **common) for rank in range(1, len(self.layouts))]
        await asyncio.gather(*(rank.__aenter__() for rank in (*others, first)))
        for rank in (*others, first):
            self.site.ends(rank)
        return first, others

    def same(self, tensors: Tensors) -> bool:
        """Whether every rank holds its part of these weights."""
        return same(self.layouts, self.held, tensors)
