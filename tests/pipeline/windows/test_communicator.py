"""NCCL that hesitates, fails or hangs: what becomes of the rank that calls it.

NCCL itself is played here: none of this can be asked of the real one.
"""

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from sparsecast.messages.errors import WindowAborted, WindowError, WindowTimeout
from sparsecast.pipeline.windows.communicator import Communicator, Library
from sparsecast.pipeline.windows.lifecycle import Deadline

PAYLOAD = torch.zeros(1, dtype=torch.uint8)


class Refusal(Exception):
    """What nccl4py raises."""


class Played(Library):
    """A library whose communicator answers `states`, one after the other, the last for ever."""

    def __init__(self, *states: int, hang: threading.Event | None = None) -> None:
        self.core = self.bindings = self
        self.errors = (Refusal,)
        self.states = list(states)
        self.hang = hang
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *_, **__: self._called(name)

    def _called(self, name: str) -> Any:
        self.calls.append(name)
        if name == "comm_get_async_error":
            return self.states.pop(0) if len(self.states) > 1 else self.states[0]
        if name == "broadcast" and self.hang is not None:
            assert self.hang.wait(20)
        if name in ("get_last_error", "get_error_string"):
            return f"{name} of NCCL"
        return self

    @property
    def Communicator(self) -> Any:
        return self

    @property
    def UniqueId(self) -> Any:
        return self


def connected(library: Played) -> Communicator:
    """A rank that has come in."""
    communicator = Communicator("nccl:1.1", library)
    communicator.connect(0, 2, b"identity", Deadline(5))
    return communicator


def test_no_call_follows_before_nccl_has_settled() -> None:
    """NCCL says "in progress" three times: asked until it is done, and only then called again."""
    library = Played(7, 7, 7, 0)
    connected(library).broadcast(PAYLOAD, 1, Deadline(5))
    calls = [name for name in library.calls if name != "comm_get_async_error"]
    assert calls == ["from_bytes", "NCCLConfig", "init", "Comm", "broadcast"]
    assert library.calls[2:8] == ["init", "Comm", *["comm_get_async_error"] * 4]


def test_a_communicator_that_never_comes_about_costs_the_deadline() -> None:
    """The peers met and then one died: NCCL would wait for it for ever."""
    started = time.monotonic()
    with pytest.raises(WindowTimeout, match=r"connecting: not done within 0\.2 s"):
        Communicator("nccl:1.1", Played(7)).connect(0, 2, b"identity", Deadline(0.2))
    assert time.monotonic() - started < 2


def test_what_nccl_says_is_in_the_error() -> None:
    """NCCL found a fault by itself: its own words come along."""
    library = Played(0)
    communicator = connected(library)
    library.states = [6]
    with pytest.raises(WindowError, match=r"get_error_string of NCCL \(get_last_error of NCCL\)"):
        communicator.check()


def test_abort_comes_through_a_call_that_is_stuck() -> None:
    """A broadcast does not return: abort() comes from another thread all the same, and the stuck
    thread makes no call any more when it comes free."""
    hang = threading.Event()
    library = Played(0, hang=hang)
    communicator = connected(library)
    found: list[BaseException] = []

    def broadcast() -> None:
        try:
            communicator.broadcast(PAYLOAD, 1, Deadline(20))
        except WindowAborted as exc:
            found.append(exc)

    thread = threading.Thread(target=broadcast)
    thread.start()
    while "broadcast" not in library.calls:
        time.sleep(0.01)
    started = time.monotonic()
    communicator.abort()
    assert time.monotonic() - started < 3
    assert library.calls[-1] == "abort"
    hang.set()
    thread.join(5)
    assert [type(error) for error in found] == [WindowAborted]
    assert library.calls[-1] == "abort"
    communicator.abort()
    assert library.calls.count("abort") == 1


def test_after_abort_nothing_is_called() -> None:
    """Aborted before it connected: no communicator is made, and no call gets through."""
    library = Played(0)
    communicator = Communicator("nccl:1.1", library)
    communicator.abort()
    with pytest.raises(WindowAborted):
        communicator.connect(0, 2, b"identity", Deadline(5))
    with pytest.raises(WindowAborted):
        communicator.check()
    assert library.calls == []


def test_leaving_is_finalized_before_it_is_destroyed() -> None:
    """In order: NCCL flushes, then frees; abort() finds nothing afterwards."""
    library = Played(0, 0, 7, 0)
    communicator = connected(library)
    communicator.leave(Deadline(5))
    calls = [name for name in library.calls if name != "comm_get_async_error"]
    assert calls[-2:] == ["finalize", "destroy"]
    communicator.abort()
    assert "abort" not in library.calls
