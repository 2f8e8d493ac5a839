"""One rank's NCCL communicator, without a torch.distributed world and never blocking.

NCCL says "in progress" to almost every call; until it has settled, the next call fails. All calls
are made one at a time, under a lock; abort() alone may come from another thread at any moment.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from ...messages.errors import WindowAborted, WindowError, WindowTimeout
from .lifecycle import Deadline

if TYPE_CHECKING:
    import torch

_T = TypeVar("_T")

log = logging.getLogger("sparsecast.windows")

#: ncclResult_t.
_SUCCESS, _IN_PROGRESS = 0, 7
#: ncclUint8 of ncclDataType_t.
_UINT8 = 1
#: How long a wait spins before it sleeps between two looks: a launch takes some 30 µs, and the
#: shortest sleep 70.
_SPIN_S = 0.002
_POLL_S = 0.0002
#: How long abort() waits for a call that is under way: these return at once unless they are stuck.
_PATIENCE_S = 0.5


class Library:
    """nccl4py, loaded: ImportError, OSError or RuntimeError if it or NCCL cannot be."""

    def __init__(self) -> None:
        self.core: Any = importlib.import_module("nccl.core")
        self.bindings: Any = importlib.import_module("nccl.bindings.nccl")
        #: What it raises: for what NCCL refuses, and for what it refuses itself.
        self.errors: tuple[type[Exception], ...] = (
            self.bindings.NCCLError,
            self.core.NcclInvalid,
        )

    def version(self) -> str:
        """The version of the NCCL library, "" if there is none."""
        found = self.core.get_version().libnccl
        return "" if found is None else str(found.version)

    def unique_id(self) -> bytes:
        """A new communicator's identity; whoever calls this hosts its bootstrap. Single use."""
        return bytes(self.core.get_unique_id().as_bytes)


class Communicator:
    """One rank's end. The calling thread's CUDA device must be the rank's, in every method.

    All errors are WindowErrors in the name of `label`; after one, only abort() is left.
    """

    def __init__(self, label: str, library: Library) -> None:
        self._label = label
        self._library = library
        self._lock = threading.Lock()
        self._comm: Any = None
        #: The same, for the calls of each round: nccl4py looks up a tensor's kind twice a call.
        self._bare: Any = None
        self._over = False

    def connect(self, rank: int, size: int, unique_id: bytes, deadline: Deadline) -> None:
        """Become a rank of the communicator of this identity: all ranks call it."""
        core = self._library.core

        def init() -> None:
            found = core.Communicator.init(
                size, rank, core.UniqueId.from_bytes(unique_id), core.NCCLConfig(blocking=False)
            )
            if self._over:  # abort() came meanwhile and had nothing to abort yet
                found.abort()
                raise WindowAborted(self._label, "aborted while it connected")
            self._comm, self._bare = found, self._library.bindings.Comm(found.ptr)

        self._call("connecting", init)
        self._settle("connecting", deadline)

    def broadcast(self, tensor: torch.Tensor, stream: int, deadline: Deadline) -> None:
        """Enqueue on `stream`: `tensor` (uint8, contiguous, on the rank's GPU) goes from rank 0 to
        the same tensor on the others.

        Returns when NCCL has taken it; it is done when the stream is.
        """
        enqueue, address = self._library.bindings.broadcast, tensor.data_ptr()
        nbytes = tensor.numel()
        self._call(
            "broadcast",
            lambda: enqueue(address, address, nbytes, _UINT8, 0, self._bare, stream),
        )
        self._settle("broadcast", deadline)

    def check(self) -> None:
        """WindowError if NCCL has found that something is wrong."""
        self._state("broadcast")

    def leave(self, deadline: Deadline) -> None:
        """Leave in order: nothing is under way, and the other ranks leave as well."""
        self._call("leaving", lambda: self._comm.finalize())
        self._settle("leaving", deadline)

        def destroy() -> None:
            comm, self._comm, self._over = self._comm, None, True
            self._bare = None
            comm.destroy()

        self._call("leaving", destroy)

    def abort(self) -> None:
        """Break off whatever is under way, on the device too. From any thread; idempotent."""
        self._over = True
        # The other thread may be stuck in its call: that is what abort() is for.
        held = self._lock.acquire(timeout=_PATIENCE_S)
        try:
            comm, self._comm, self._bare = self._comm, None, None
            if comm is not None:
                comm.abort()
        except self._library.errors as exc:
            log.warning("window %s: NCCL's abort failed: %s", self._label, exc)
        finally:
            if held:
                self._lock.release()

    # ---- inside

    def _call(self, what: str, call: Callable[[], _T]) -> _T:
        with self._lock:
            if self._over:
                raise WindowAborted(self._label, f"aborted, {what}")
            try:
                return call()
            except self._library.errors as exc:
                raise WindowError(self._label, f"NCCL, {what}: {exc}{self._detail()}") from exc

    def _state(self, what: str) -> int:
        result = int(
            self._call(what, lambda: self._library.bindings.comm_get_async_error(self._bare))
        )
        if result not in (_SUCCESS, _IN_PROGRESS):
            text = self._library.core.get_error_string(result)
            with self._lock:
                raise WindowError(self._label, f"NCCL, {what}: {text}{self._detail()}")
        return result

    def _settle(self, what: str, deadline: Deadline) -> None:
        spin = Deadline(_SPIN_S)
        while self._state(what) == _IN_PROGRESS:
            if deadline.passed:
                raise WindowTimeout(
                    self._label, f"NCCL, {what}: not done within {deadline.timeout_s:g} s"
                )
            if spin.passed:
                time.sleep(_POLL_S)
            else:
                os.sched_yield()  # time.sleep(0) takes some 70 µs

    def _detail(self) -> str:
        text = ""
        with contextlib.suppress(*self._library.errors):
            text = self._comm.get_last_error() if self._comm is not None else ""
        return f" ({text.strip()})" if text.strip() else ""
