"""What a replica has heard of the journal: which claim counts, and what a digest shows."""

import pytest

from sparsecast.messages.control import Announce, Claim, Sender, Stamp
from sparsecast.pipeline.core.announced import HISTORY, Announced
from sparsecast.pipeline.core.events import LogItem
from toyworld import MANIFEST

OURS, OTHER = Sender("trainer", "t1"), Sender("trainer", "t2")


def claim(epoch: int, sender: Sender = OURS) -> Claim:
    """A claim at version 5, whose digest is 50."""
    return Claim(
        sender=sender, epoch=epoch, version=5, digest=50, manifest=MANIFEST, nonce="n",
        heartbeat_s=0.5,
    )  # fmt: skip


def announce(version: int, digest: int) -> Announce:
    """An announcement in epoch 3."""
    return Announce(
        sender=OURS, stamp=Stamp(3, 0, 0, version), base_version=version - 1,
        manifest_hash=MANIFEST.hash, nbytes=10, checksum=1, digest=digest, changed=1,
        encoding="sparse", dense_nbytes=16,
    )  # fmt: skip


def following() -> Announced:
    """Our trainer's claim of epoch 3 is followed."""
    announced = Announced()
    announced.claimed(claim(3))
    return announced


@pytest.mark.parametrize(
    ("newcomer", "refused"),
    [
        (claim(4), False),
        (claim(4, OTHER), False),
        (claim(3), True),
        (claim(2), True),
        (claim(2, OTHER), True),
        # Of a new journal, by someone who could not know ours.
        (claim(3, OTHER), False),
    ],
    ids=["ours, higher", "higher", "said twice", "ours, lower", "lower", "of another journal"],
)
def test_which_claim_counts(newcomer: Claim, refused: bool) -> None:
    """Epoch 3 is followed, and a claim comes."""
    assert following().outranks(newcomer) == refused
    assert not Announced().outranks(newcomer), "the first one counts, whatever it is"


def test_the_announced_digest_counts_before_the_logs() -> None:
    """The log says something else of version 6 than was announced, and speaks alone for 7."""
    announced = following()
    announced.announced(announce(6, digest=60))
    announced.logged([LogItem(5, 6, 61, 10), LogItem(6, 7, 70, 10)])
    assert dict(announced.digests) == {5: 50, 6: 60, 7: 70}
    assert announced.announce(6) == announce(6, digest=60)
    assert announced.announce(7) is None


def test_a_digest_shows_the_versions_that_have_it() -> None:
    """Nothing changed from 5 to 6: the weights are either. An unknown digest shows nothing."""
    announced = following()
    announced.announced(announce(6, digest=50))
    announced.announced(announce(7, digest=70))
    assert [announced.shown_by(digest) for digest in (50, 70, 99)] == [(5, 6), (7,), ()]


def test_a_new_epoch_forgets_what_the_old_one_announced() -> None:
    """Version 6 of the old epoch is void: neither its digest nor its announcement counts."""
    announced = following()
    announced.announced(announce(6, digest=60))
    announced.claimed(claim(4, OTHER))
    assert (announced.epoch, announced.head, dict(announced.digests)) == (4, 5, {5: 50})
    assert announced.announce(6) is None


def test_the_oldest_announcements_are_forgotten() -> None:
    """A run of many versions: a bounded number is remembered, the newest."""
    announced = following()
    for version in range(6, 7 + HISTORY):
        announced.announced(announce(version, version))
    assert announced.announce(6) is None
    assert announced.announce(7) is not None
    assert len(announced.digests) == HISTORY
