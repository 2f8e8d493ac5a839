"""How a demo is interrupted."""

import contextlib
import signal

import pytest

from sparsecast.workers.demo.run import signals_raise


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_whose_exception_was_lost_still_ends_the_demo(number: signal.Signals) -> None:
    """Ctrl-C arrives while a finaliser runs, which swallows the exception: the next look at whether
    one came raises it again. Without a signal the look finds nothing; afterwards handlers are those
    of before."""
    before = signal.getsignal(number)
    with signals_raise() as check:
        check()
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(number)
        with pytest.raises(KeyboardInterrupt):
            check()
    assert signal.getsignal(number) is before
