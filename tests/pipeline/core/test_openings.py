"""Which kinds of window may be opened when, after some that did not open."""

from sparsecast.messages.control import WindowKind
from sparsecast.pipeline.core.openings import Openings
from sparsecast.pipeline.core.policy import Policy

KINDS: tuple[WindowKind, ...] = ("gloo", "bus")
AUTO = Policy(attempts=3, backoff_s=1.0, backoff_max_s=30.0)
ONLY = Policy(window="gloo", attempts=3, backoff_s=1.0, backoff_max_s=30.0)


def test_the_next_best_kind_comes_after_a_few_tries() -> None:
    """gloo fails three times: it rests, and bus is usable meanwhile; afterwards it has one try."""
    openings = Openings(AUTO)
    for now in (10.0, 11.0):
        openings.failed("gloo", now)
        assert openings.usable(KINDS, now) == KINDS
    openings.failed("gloo", 12.0)
    assert openings.usable(KINDS, 41.9) == ("bus",)
    assert openings.usable(KINDS, 42.0) == KINDS
    assert openings.resume_at == 0.0, "bus may be opened at once"
    openings.failed("gloo", 42.0)
    assert openings.usable(KINDS, 71.9) == ("bus",)


def test_the_last_resort_is_tried_ever_more_rarely() -> None:
    """There is nothing after bus, nor after the only kind allowed: a pause instead, which doubles
    up to a bound."""
    for openings, kind in ((Openings(AUTO), KINDS[1]), (Openings(ONLY), KINDS[0])):
        pauses = []
        for _ in range(9):
            openings.failed(kind, 10.0)
            pauses.append(max(openings.resume_at - 10.0, 0.0))
            assert openings.usable(KINDS, 10.0) == KINDS
        assert pauses == [0.0, 0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]


def test_a_window_that_opens_ends_it() -> None:
    """After a rest one opens: the next failures have all of their tries again."""
    openings = Openings(ONLY)
    for _ in range(4):
        openings.failed("gloo", 10.0)
    openings.opened("gloo")
    for now in (20.0, 21.0):
        openings.failed("gloo", now)
        assert openings.resume_at < now
    openings.failed("gloo", 22.0)
    assert openings.resume_at == 23.0


def test_a_new_epoch_has_all_of_its_tries() -> None:
    """Two tries failed before the run was claimed anew: they do not count."""
    openings = Openings(ONLY)
    for _ in range(2):
        openings.failed("gloo", 10.0)
    openings.reset()
    openings.failed("gloo", 10.0)
    assert openings.resume_at == 0.0
