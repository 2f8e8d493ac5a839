"""A trainer of several ranks in one process: each rank's tensors are its part of a whole model."""

import asyncio
from typing import Any

from layouts import contents
from runs import QUICK, Site, Tensors
from sparsecast import AsyncPublisher, Contributor, Layout
from sparsecast.workers.updates import Made


class Trainers:
    """The ranks of a trainer, whose layouts say what each has of `whole`, which a test changes."""

    def __init__(
        self,
        site: Site,
        whole: Tensors,
        layouts: list[Layout],
        device: str = "cpu",
        masters: list[Layout] | None = None,
    ) -> None:
        self.site = site
        self.whole = whole
        #: As published, and as the ranks hold it.
        self.layouts = layouts
        self._masters = masters or layouts
        self.held = [
            {name: tensor.to(device) for name, tensor in contents(layout, whole).items()}
            for layout in self._masters
        ]

    def first(self, **options: Any) -> AsyncPublisher:
        """The first rank, not yet entered."""
        given = {"policy": QUICK, "linger_s": 5.0, "layout": self.layouts[0]} | options
        return AsyncPublisher(
            self.held[0],
            run=self.site.run,
            bus=self.site.url,
            ranks=len(self.layouts),
            **given,
        )

    def other(self, rank: int, **options: Any) -> Contributor:
        """Another rank, not yet entered."""
        given = {"policy": QUICK, "linger_s": 5.0, "layout": self.layouts[rank]} | options
        return Contributor(
            self.held[rank], run=self.site.run, bus=self.site.url, rank=rank, **given
        )

    async def start(self, **options: Any) -> AsyncPublisher:
        """All ranks, running until the test ends; the first one's publisher."""
        self.publisher = self.first(**options)
        common = ("policy", "log", "shadow", "dtype", "view")
        others = {name: options[name] for name in options if name in common}
        self.others = [self.other(rank, **others) for rank in range(1, len(self.layouts))]
        await asyncio.gather(*(rank.__aenter__() for rank in (*self.others, self.publisher)))
        for rank in (*self.others, self.publisher):
            self.site.ends(rank)
        return self.publisher

    def share(self) -> None:
        """Every rank's tensors are its part of the whole model as it is now."""
        for layout, held in zip(self._masters, self.held, strict=True):
            for name, tensor in contents(layout, self.whole).items():
                held[name].copy_(tensor)

    @property
    def ranks(self) -> list[Any]:
        """All of them, the first one first."""
        return [self.publisher, *self.others]

    async def publish(self) -> Any:
        """Publish on every rank at once; the first one's update."""
        self.share()
        return _same(await asyncio.gather(*(rank.publish() for rank in self.ranks)))

    async def rollback(self, version: int) -> Any:
        """Roll back on every rank at once; the first one's update."""
        return _same(await asyncio.gather(*(rank.rollback(version) for rank in self.ranks)))


def _same(updates: list[Made]) -> Made:
    assert len({update.version for update in updates}) == 1
    return updates[0]
