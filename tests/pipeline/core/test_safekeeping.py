"""Rule 3 as a table: what is stored, what is merged into the next, and when it is tried again."""

from collections.abc import Callable

import pytest

from sparsecast.pipeline.core.safekeeping import Safekeeping


def holding(*versions: int, storing: int = 0) -> Safekeeping:
    """Announced versions, of which the first `storing` are on their way into the log."""
    keeping = Safekeeping(retry_s=0.25)
    for number, version in enumerate(versions, 1):
        keeping.announced(version)
        if number == storing:
            assert keeping.store(10.0) == versions[:storing]
    return keeping


def everyone(*versions: int) -> Callable[[int], bool]:
    """All members have these."""
    return lambda version: version in versions


@pytest.mark.parametrize(
    ("keeping", "with_everyone", "mergeable"),
    [
        (holding(), (), ()),
        (holding(1, 2), (1, 2), ()),
        (holding(1, 2), (), (1, 2)),
        # Without a hole: what follows on what is not safe goes along.
        (holding(1, 2, 3), (1, 3), (2, 3)),
        (holding(1, 2, 3), (2, 3), (1, 2, 3)),
        # What is on its way into the log is not taken from it.
        (holding(1, 2, storing=1), (), (2,)),
        (holding(1, 2, storing=2), (), ()),
    ],
    ids=["nothing", "all safe", "none safe", "the middle", "the first", "on its way", "all are"],
)
def test_what_is_merged_into_the_next(
    keeping: Safekeeping, with_everyone: tuple[int, ...], mergeable: tuple[int, ...]
) -> None:
    """A patch is about to be taken: it takes along what is neither stored nor with everyone."""
    assert keeping.mergeable(everyone(*with_everyone)) == mergeable


def test_one_entry_at_a_time_with_all_that_has_gathered() -> None:
    """Two versions come while the first is stored: one entry for both follows."""
    keeping = holding(1, 2, 3, storing=1)
    assert (keeping.due, keeping.store(10.0)) == (None, ())
    assert keeping.confirmed(1), "news"
    assert keeping.store(10.0) == (2, 3)
    assert keeping.confirmed(3)
    assert (keeping.stored, keeping.unsafe, keeping.due) == (3, (), None)


def test_a_log_that_fails_is_tried_ever_more_rarely_and_told_once() -> None:
    """It fails again and again: the pause doubles, up to a bound; only the first one is news, and
    so is the first after a success."""
    keeping = holding(1)
    now, pauses, news = 10.0, [], []
    for _ in range(9):
        due = keeping.due
        assert due is not None
        pauses.append(due - now)
        now = max(due, now)
        keeping.store(now)
        news.append(keeping.failed(1, now))
    assert pauses[1:] == [0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 16.0]
    assert news == [True] + 8 * [False]
    keeping.store(100.0)
    keeping.confirmed(1)
    keeping.announced(2)
    keeping.store(100.0)
    assert keeping.failed(2, 100.0)


def test_what_failed_together_is_kept_as_one() -> None:
    """Three versions were merged to be stored: only the last number is kept."""
    keeping = holding(1, 2, 3, 4, storing=3)
    keeping.failed(3, 10.0)
    assert keeping.unsafe == (3, 4)
    assert keeping.store(10.2) == (), "not before the pause is over"
    assert keeping.store(10.25) == (3, 4)


def test_what_a_patch_has_taken_along_is_not_kept_alone() -> None:
    """1 is on its way into the log, 2 was merged into 3: 1 stays, 2 goes."""
    keeping = holding(1, 2, storing=1)
    keeping.merged(1, 3)
    assert keeping.unsafe == (1,)


def test_answers_of_an_epoch_that_is_over_change_nothing() -> None:
    """The run begins anew at 5 while 4 is being stored: what the log says of 4 comes too late."""
    keeping = holding(4, storing=1)
    keeping.reset(5)
    assert not keeping.confirmed(4)
    assert not keeping.failed(4, 10.0)
    assert (keeping.stored, keeping.unsafe, keeping.due) == (5, (), None)
