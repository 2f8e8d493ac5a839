"""What the trainer asks of the journal, and what each answer means."""

from typing import Literal

import pytest

from sparsecast.messages.control import Announce, Sender, Stamp
from sparsecast.pipeline.core import commands as cmd
from sparsecast.pipeline.core.announcing import Announcing
from sparsecast.pipeline.core.events import AnnounceFailed

Cause = Literal["fenced", "lost", "unavailable"]


def announce(version: int) -> Announce:
    """An announcement."""
    return Announce(
        sender=Sender("trainer", "t1"), stamp=Stamp(1, 2, 1, version), base_version=version - 1,
        manifest_hash="m", nbytes=10, checksum=1, digest=version, changed=1, encoding="sparse",
        dense_nbytes=16,
    )  # fmt: skip


def asking(version: int) -> Announcing:
    """This version was asked to be stored."""
    announcing = Announcing(retry_s=0.25)
    assert announcing.append(announce(version)) == cmd.Append(announce(version))
    return announcing


@pytest.mark.parametrize(
    ("cause", "version", "verdict", "retry_at"),
    [
        ("fenced", 1, "fenced", None),
        ("fenced", 7, None, None),
        ("lost", 1, "lost", None),
        # Told by the keeper of the lease, whatever it was about.
        ("lost", 7, "lost", None),
        ("unavailable", 1, None, 10.25),
        ("unavailable", 7, None, None),
    ],
)
def test_an_answer_that_is_no(
    cause: Cause, version: int, verdict: str | None, retry_at: float | None
) -> None:
    """Version 1 was asked for, and the journal refuses 1, or another one."""
    announcing = asking(1)
    assert announcing.failed(AnnounceFailed(version, cause, "the test's"), 10.0) == verdict
    assert announcing.retry_at == retry_at
    assert announcing.pending == announce(1), "nothing is given up yet"


def test_the_same_is_asked_again_until_it_is_confirmed() -> None:
    """The bus is away twice: the very same announcement, a pause after each failure; another
    version's confirmation is not ours."""
    announcing = asking(1)
    for now in (10.0, 20.0):
        announcing.failed(AnnounceFailed(1, "unavailable", "no bus"), now)
        assert announcing.retry(now + 0.2) is None
        assert announcing.retry(now + 0.25) == cmd.Append(announce(1))
        assert announcing.retry(now + 9.0) is None, "asked once"
    assert not announcing.confirmed(2)
    assert announcing.asks(Stamp(1, 2, 1, 1))
    assert announcing.confirmed(1)
    assert not announcing.confirmed(1)
    assert not announcing.asks(Stamp(1, 2, 1, 1))


def test_a_run_claimed_anew_gives_the_announcement_up() -> None:
    """The bus has forgotten: the claim is repeated until it is through, and what is said of the
    old append meanwhile and afterwards ends nothing."""
    announcing = asking(1)
    assert announcing.reclaim(2) == cmd.Reclaim(2)
    assert announcing.failed(AnnounceFailed(1, "fenced", "the old append"), 10.0) is None
    announcing.reclaim_failed(10.0)
    assert announcing.retry(10.25) == cmd.Reclaim(2)
    announcing.claimed()
    announcing.reclaim_failed(11.0)
    assert announcing.retry_at is None, "that was answered"
    assert announcing.failed(AnnounceFailed(1, "lost", "the old append"), 11.0) is None
    assert announcing.failed(AnnounceFailed(1, "lost", "the new one"), 12.0) == "lost", "once"
