"""Which ranks receive the same, whether parting patches for them pays, and what is said of it."""

from dataclasses import replace

import pytest
from msgspec.structs import replace as changed

from sparsecast.messages import control as msg
from sparsecast.messages.control import Piece, Sender, Stamp
from sparsecast.pipeline.core import commands as cmd
from sparsecast.pipeline.core import events as ev
from sparsecast.pipeline.core.membership import Member
from sparsecast.pipeline.core.policy import Policy
from sparsecast.pipeline.core.routing import Classes, routed
from toytalk import TRAINER, A, B, ReplicaTalk, TrainerTalk, announcement, sealed

ROUTES = ((Piece(6, 1), Piece(4, 2)),)


def member(name: str, *held: tuple[bytes, int]) -> Member:
    """A worker whose ranks hold these layouts, of so many bytes; without any it tells nothing."""
    ranks = max(1, len(held))
    return Member(
        sender=Sender(name, "1"), offers=("gloo",), device="cpu", host="h", gpus=("",) * ranks,
        heard=0.0, layouts=tuple(layout for layout, _ in held),
        held_nbytes=tuple(nbytes for _, nbytes in held),
    )  # fmt: skip


def test_ranks_that_hold_the_same_are_one_class() -> None:
    """Two engines of two ranks, between them one that holds what is published, one whose first rank
    does, and one that has left: five ranks of three classes, in the order in which they come."""
    one, other = (b"one", 50), (b"other", 50)
    members = [member("a", one, other), member("b"), member("c", (b"", 0), other), None]
    found = routed(members, "all-to-all", "gloo", 2, 100)
    assert found == Classes((0, 1, 2, 2, 1, 2), (b"one", b"other", b""))


@pytest.mark.parametrize("routing", ["auto", "all-to-all"])
def test_where_all_hold_the_same_there_are_no_classes(routing: str) -> None:
    """Nobody tells that it holds less than everything: a broadcast, whatever is asked for."""
    assert routed([member("a"), member("b"), None], routing, "gloo", 4, 100) == Classes()  # type: ignore[arg-type]
    assert routed([], routing, "gloo", 4, 100) == Classes()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("roots", "held", "all_to_all"),
    [
        pytest.param(4, [25] * 4, True, id="each a quarter of each"),
        pytest.param(1, [25] * 4, False, id="one root sends all of it anyway"),
        pytest.param(4, [100], False, id="one that holds everything"),
        pytest.param(4, [90, 10], False, id="one of two holds nearly all"),
        pytest.param(4, [25] * 16, False, id="held by four each"),
        pytest.param(2, [79, 79], True, id="within the margin"),
        pytest.param(2, [81, 79], False, id="beyond the margin"),
    ],
)
def test_the_busiest_link_decides(roots: int, held: list[int], all_to_all: bool) -> None:
    """Parting pays where every root sends a share and every rank takes one; not where one root has
    to send everything, or one rank takes it. Who asks for a way gets it."""
    ranks = [(str(at).encode(), nbytes) for at, nbytes in enumerate(held)]
    members = [member("a", *ranks)]
    assert bool(routed(members, "auto", "gloo", roots, 100).of) is all_to_all
    assert routed(members, "all-to-all", "nccl", roots, 100).of == tuple(range(len(held)))
    assert routed(members, "broadcast", "gloo", roots, 100) == Classes()
    assert routed(members, "auto", "nccl", roots, 100) == Classes()


def opened() -> TrainerTalk:
    """A trainer whose two members have told what they hold, each a part, with a window to both."""
    talk = TrainerTalk(policy=Policy(window="gloo", routing="all-to-all"))
    for member, layout in ((A, b"one"), (B, b"other")):
        talk.hear(changed(talk.join(member), layouts=(layout,), held_nbytes=(8,)))
        talk.open_window()
    return talk


def test_a_window_is_opened_for_the_classes_of_its_ranks() -> None:
    """Members hear of which class their ranks are, the trainer also what each class holds."""
    talk = TrainerTalk(policy=Policy(window="gloo", routing="all-to-all"))
    join = changed(talk.join(A), gpus=("", ""), layouts=(b"one", b"other"), held_nbytes=(8, 8))
    talk.hear(join)
    (opening,) = talk.said(msg.Opening)
    assert (opening.ranks, opening.classes) == ((2,), (0, 1))
    talk.go(opening.stamp, A)
    command = talk.only(cmd.OpenWindow)
    assert (command.size, command.classes) == (3, (0, 1))
    assert command.layouts == (b"one", b"other")


def test_routes_are_for_the_window_that_they_were_made_for() -> None:
    """What was parted for the open window goes by its routes. The attempt fails; in the next window
    the whole patch goes to every class, and so does what was parted for a window that is gone."""
    talk = opened()
    window = talk.core._windows.open
    assert window is not None
    talk.feed(ev.Published(1))
    talk.feed(replace(sealed(1), routes=ROUTES, routed=window.number))
    stamp = talk.only(cmd.Append).announce.stamp
    talk.feed(ev.Announced(1))
    talk.go(stamp, A, B)
    (go,) = talk.said(msg.Go)
    assert go.routes == ROUTES
    assert talk.only(cmd.Send).routed
    talk.feed(ev.Sent(stamp.window, stamp.attempt, "broken"))
    while talk.core._windows.exchange is None:
        talk.wait(0.1, alive=(A, B))
    talk.open_window()
    again = talk.only(msg.Call, [c.message for c in talk.out if isinstance(c, cmd.Say)])
    assert again is not None
    talk.go(again.stamp, A, B)
    (go,) = talk.said(msg.Go)
    assert go.routes == ()
    assert not talk.only(cmd.Send).routed
    talk.feed(ev.Sent(again.stamp.window, again.stamp.attempt))
    for member in (A, B):
        talk.hear(msg.Received(sender=member, stamp=again.stamp))
    talk.feed(ev.Published(2))
    talk.feed(replace(sealed(2), routes=ROUTES, routed=window.number))
    talk.feed(ev.Announced(2))
    talk.go(talk.core._windows.exchange.stamp, A, B)  # type: ignore[union-attr]
    assert [go.routes for go in talk.said(msg.Go)] == [()]


def test_a_worker_opens_the_ends_of_its_class_and_receives_by_routes() -> None:
    """The opening says which class it is of, go what comes for each class: both reach the hands."""
    talk = ReplicaTalk()
    stamp = Stamp(1, 3)
    opening = msg.Opening(
        sender=TRAINER, stamp=stamp, kind="gloo", members=(B, A), ranks=(2, 1), enters_at=0,
        classes=(0, 1, 0),
    )  # fmt: skip
    talk.hear(opening)
    talk.hear(msg.Go(sender=TRAINER, stamp=stamp))
    command = talk.only(cmd.OpenWindow)
    assert (command.rank, command.size, command.classes) == (3, 4, (0, 1, 0))
    talk.feed(ev.WindowOpened(1, 3))
    coming = Stamp(1, 3, 1, 1)
    talk.hear(announcement(coming))
    talk.hear(msg.Go(sender=TRAINER, stamp=coming, routes=ROUTES))
    assert talk.only(cmd.Receive).routes == ROUTES
