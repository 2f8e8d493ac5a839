"""When the log is asked, and what holds that back."""

from sparsecast.pipeline.core.catchup import CatchUp
from sparsecast.pipeline.core.policy import Policy

POLICY = Policy(retry_s=0.25, backoff_max_s=30.0)


def claimed() -> CatchUp:
    """A new epoch, at 10 s."""
    made = CatchUp(POLICY)
    made.claimed(10.0)
    assert made.due == 10.0
    return made


def test_a_round_has_a_moment_before_the_log_is_asked() -> None:
    """A version is announced: the log a retry later; the trainer's Stored makes it now."""
    catchup = claimed()
    catchup.announced(11.0)
    assert catchup.due == 11.25
    catchup.stored(11.1)
    assert catchup.due == 11.1


def test_a_log_that_has_nothing_is_asked_ever_more_rarely() -> None:
    """Each failure doubles the pause, up to a bound, until something is found or stored."""
    catchup = claimed()
    pauses = []
    for _ in range(7):
        catchup.failed(10.0, "a hole")
        pauses.append(catchup.due - 10.0)
    assert pauses == [0.25, 0.5, 1.0, 2.0, 4.0, 4.0, 4.0]
    catchup.stored(10.5)
    assert catchup.due == 10.5
    catchup.found(11.0)
    catchup.failed(12.0, "a hole")
    assert catchup.due == 12.25


def test_weights_that_fail_again_and_again_do_not_storm_the_log() -> None:
    """Resync after resync: at once the first time, then ever later; Stored does not shorten that,
    since an anchor is a full copy. A proof ends it, and so does a new epoch."""
    catchup = claimed()
    pauses = []
    for _ in range(10):
        catchup.set_back(10.0)
        catchup.stored(10.0)
        pauses.append(catchup.due - 10.0)
    assert pauses == [0.0, 0.25, 0.75, 1.75, 3.75, 7.75, 15.75, 30.0, 30.0, 30.0]
    catchup.proven()
    catchup.set_back(11.0)
    assert catchup.due == 11.0
    catchup.set_back(11.0)
    catchup.claimed(11.1)
    assert catchup.due == 11.1
