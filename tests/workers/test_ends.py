"""The ends of one window: who is at which, and their life, which is a window's, on real gloo."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from runs import QUICK, Site
from sparsecast.messages.control import Stamp
from sparsecast.messages.errors import WindowError
from sparsecast.messages.subjects import Subjects
from sparsecast.pipeline.bus.nats import connect
from sparsecast.pipeline.core.commands import OpenWindow
from sparsecast.pipeline.core.events import WindowFailed
from sparsecast.pipeline.windows import open_window
from sparsecast.pipeline.windows.base import WindowSpec
from sparsecast.workers.ends import Ends, Place, places_of
from sparsecast.workers.together import Together

#: Three ranks of workers, the first and the last of which hold the same.
CLASSES = (0, 1, 0)


def command(rank: int, roots: Sequence[int], of: int, classes: Sequence[int]) -> OpenWindow:
    """What a rank is asked to open."""
    layouts = tuple(bytes([one]) for one in range(max(classes) + 1)) if classes and not rank else ()
    return OpenWindow(
        Stamp(1, 1), "gloo", rank, 1 + (len(classes) or 3), 5.0, tuple(roots), of,
        tuple(classes), layouts,
    )  # fmt: skip


@given(roots=st.integers(1, 4), of=st.lists(st.integers(0, 2), max_size=5))
def test_all_ranks_agree_on_who_is_at_which_end(roots: int, of: list[int]) -> None:
    """Any number of roots, and ranks of any classes: at every end each place is taken once, the
    root's is 0, and all that are there know how many they are. A rank has one end for each root."""
    known = sorted(set(of))
    classes = [known.index(one) for one in of]
    ranks = len(classes) or 3
    at: dict[str, list[Place]] = {}
    for root in range(roots):
        for place in places_of(command(0, (root,), roots, classes)):
            assert (place.root, place.rank) == (root, 0)
            at.setdefault(place.suffix, []).append(place)
    for rank in range(1, ranks + 1):
        mine = places_of(command(rank, range(roots), roots, classes))
        assert [place.root for place in mine] == list(range(roots))
        for place in mine:
            assert place.of_class == (classes[rank - 1] if classes else None)
            at.setdefault(place.suffix, []).append(place)
    assert len(at) == roots * (len(known) or 1)
    for places in at.values():
        assert sorted(place.rank for place in places) == list(range(places[0].size))
        assert len({place.size for place in places}) == 1


class Rank:
    """One rank of a window with two roots and classes, on a connection of its own."""

    def __init__(self, site: Site, bus: Any, rank: int, root: int | None = None) -> None:
        self.site = site
        self.bus = bus
        self.command = command(rank, (0, 1) if root is None else (root,), 2, CLASSES)

    def ends(self, window: int) -> Ends:
        """Its ends of a window of this number."""
        prefix = Subjects(self.site.run).window(1, window)
        places = places_of(self.command)
        specs = [
            WindowSpec("gloo", prefix + place.suffix, 1, window, place.rank, place.size)
            for place in places
        ]
        return Ends(places, [open_window(spec, self.bus) for spec in specs])


async def crew(site: Site) -> list[Rank]:
    """Two ranks of a trainer, then three of workers; their connections end with the test."""
    ranks = []
    for at in range(5):
        bus = await connect(site.url, name=f"rank-{at}", timeout_s=5)
        site.ends(_Closing(bus))
        ranks.append(Rank(site, bus, 0, root=at) if at < 2 else Rank(site, bus, at - 1))
    return ranks


class _Closing:
    def __init__(self, bus: Any) -> None:
        self._bus = bus

    async def __aexit__(self, *_: object) -> None:
        await self._bus.close()


def payload(root: int, of_class: int) -> torch.Tensor:
    """What a root sends to a class: as many bytes as are of no other."""
    return torch.full((100 + 10 * root + of_class,), 16 * root + of_class, dtype=torch.uint8)


async def round_of(ends: list[Ends], attempt: int) -> None:
    """Every root sends to each class what is for it; every rank gets just that."""
    got = [[torch.zeros_like(payload(root, one)) for root in (0, 1)] for one in CLASSES]
    sends = [
        ends[root].send([payload(root, one) for one in (0, 1)], attempt=attempt, timeout_s=5)
        for root in (0, 1)
    ]
    receives = [
        end.receive(mine, attempt=attempt, timeout_s=5)
        for end, mine in zip(ends[2:], got, strict=True)
    ]
    await asyncio.gather(*sends, *receives)
    for one, mine in zip(CLASSES, got, strict=True):
        assert all(torch.equal(mine[root], payload(root, one)) for root in (0, 1))


async def test_every_rank_receives_what_is_for_its_class(site: Site) -> None:
    """Two roots, three ranks of two classes, several rounds through ends that stay open; opening
    them twice opens once. They are left in order."""
    ends = [rank.ends(1) for rank in await crew(site)]
    await asyncio.gather(*(end.open(5) for end in ends))
    await asyncio.gather(*(end.open(5) for end in ends))
    for attempt in range(1, 5):
        await round_of(ends, attempt)
    await asyncio.gather(*(end.close() for end in ends))
    await asyncio.gather(*(end.close() for end in ends))


async def test_after_an_abort_the_ranks_meet_again(site: Site) -> None:
    """A worker's rank aborts while the others send and receive: all of them end within their
    deadline, and the next window opens and brings everything."""
    ranks = await crew(site)
    ends = [rank.ends(1) for rank in ranks]
    await asyncio.gather(*(end.open(5) for end in ends))
    await round_of(ends, 1)
    absent = ends[3]
    rest = [end for end in ends if end is not absent]
    works = [end.send([payload(0, 0), payload(0, 1)], attempt=2, timeout_s=1) for end in ends[:2]]
    works += [
        end.receive([payload(0, 0), payload(1, 0)], attempt=2, timeout_s=1)
        for end in (ends[2], ends[4])
    ]
    waiting = asyncio.gather(*works, return_exceptions=True)
    await asyncio.sleep(0.1)
    await absent.abort()
    async with asyncio.timeout(5):
        outcomes = await waiting
    assert any(isinstance(one, WindowError) for one in outcomes)
    await asyncio.gather(*(end.abort() for end in rest))
    again = [rank.ends(2) for rank in ranks]
    await asyncio.gather(*(end.open(5) for end in again))
    await round_of(again, 1)
    await asyncio.gather(*(end.abort() for end in again))


@pytest.mark.parametrize("missing", [1, 3], ids=["a root", "a worker's rank"])
async def test_who_does_not_come_costs_one_deadline(site: Site, missing: int) -> None:
    """A root, or a rank, is absent: whoever needs it hears so by the deadline, and nobody hangs."""
    ends = [rank.ends(1) for rank in await crew(site)]
    here = [end for at, end in enumerate(ends) if at != missing]
    async with asyncio.timeout(5):
        opened = await asyncio.gather(*(end.open(1) for end in here), return_exceptions=True)
        assert all(one is None or isinstance(one, WindowError) for one in opened)
        assert any(isinstance(one, WindowError) for one in opened)
        await asyncio.gather(*(end.abort() for end in ends))


async def test_a_rank_that_cannot_open_its_end_is_not_waited_for() -> None:
    """Another rank of the trainer says that its end did not open: the first one does not wait for
    the workers until the deadline, and says whose it was."""
    told: Future[WindowFailed] = Future()
    leading: Any = mock.Mock(ranks=frozenset({1}))
    leading.silent.return_value = None
    leading.order.return_value = [told]
    opening = asyncio.Event()

    async def mine(_: OpenWindow) -> WindowFailed:
        opening.set()
        await asyncio.sleep(60)
        raise AssertionError("it waited")

    together = Together(leading, QUICK)
    task = asyncio.ensure_future(together.open(mine, command(0, (0,), 2, ())))
    await opening.wait()
    told.set_result(WindowFailed(1, 1, "rank 1: no memory"))
    assert await asyncio.wait_for(task, 5) == WindowFailed(1, 1, "rank 1: no memory")
