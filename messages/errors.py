"""The error tree: everything that sparsecast raises on purpose.

Errors say what happened, to what, and what to do; the facts are attributes as well as prose.
They survive pickling, so that a child process can hand its own to its parent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def _rebuild(
    cls: type[SparsecastError], args: tuple[Any, ...], state: dict[str, Any]
) -> SparsecastError:
    error = cls.__new__(cls, *args)
    Exception.__init__(error, *args)
    error.__dict__.update(state)
    return error


class SparsecastError(Exception):
    """The root of every error that sparsecast raises on purpose."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args, self.__dict__.copy())


# ---- the protocol


class ProtocolError(SparsecastError):
    """A message or event came that the state does not allow."""


class LocalProtocolError(ProtocolError):
    """Our own fault: an event that this state machine must never be given in this state."""


class RemoteProtocolError(ProtocolError):
    """The other side's fault: a message that cannot be decoded or that breaks the protocol.

    `subject` is where the message came from, `reason` what is wrong with it.
    """

    def __init__(self, reason: str, *, subject: str = "") -> None:
        super().__init__(f"{reason} (on {subject})" if subject else reason)
        self.reason = reason
        self.subject = subject


class InvalidName(SparsecastError, ValueError):
    """A run or worker name that cannot be one token of a subject, or is the trainer's."""

    def __init__(
        self,
        kind: str,
        name: str,
        reason: str = "names have 1 to 64 letters, digits, '-' or '_'",
    ) -> None:
        super().__init__(f"{kind} {name!r} cannot be used: {reason}")
        self.kind = kind
        self.name = name


class SettingsError(SparsecastError, ValueError):
    """A setting that is missing, unknown or cannot be used: flag, environment or file."""


# ---- who holds what


class RunBusy(SparsecastError):
    """Another trainer holds the lease of this run."""

    def __init__(self, run: str, holder: str, *, lease_s: float) -> None:
        super().__init__(
            f"run {run!r} is held by trainer {holder}; stop it, wait {lease_s:g} s after it died, "
            "or choose another run name"
        )
        self.run = run
        self.holder = holder
        self.lease_s = lease_s


class Fenced(SparsecastError):
    """This trainer lost its run to a successor; nothing it publishes is accepted any more."""

    def __init__(self, run: str, epoch: int, reason: str) -> None:
        super().__init__(
            f"trainer of run {run!r} (epoch {epoch}) is fenced off: {reason}; "
            "stop it, or start a new Publisher to take the run back"
        )
        self.run = run
        self.epoch = epoch
        self.reason = reason


class CannotResume(SparsecastError):
    """Publisher(resume="must") found no state of the run to go on from; nothing was claimed."""

    def __init__(self, run: str, reason: str) -> None:
        super().__init__(
            f"run {run!r} cannot be resumed: {reason}; give the log and the model that it had, or "
            'start it with resume="auto" (from your own weights: workers fetch a full copy of them)'
        )
        self.run = run
        self.reason = reason


class NameInUse(SparsecastError):
    """A live worker already has this name in this run."""

    def __init__(self, run: str, name: str) -> None:
        super().__init__(
            f"worker name {name!r} is in use in run {run!r} by a live worker; "
            "choose another --name, or stop that worker first"
        )
        self.run = run
        self.name = name


# ---- the bus


class BusError(SparsecastError):
    """The bus refused or failed something."""


class BusUnavailable(BusError):
    """The broker cannot be reached, or did not answer within the deadline."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(f"bus {url} is not available: {reason}")
        self.url = url
        self.reason = reason


class PayloadTooLarge(BusError):
    """A message is larger than the server takes (its max_payload)."""

    def __init__(self, subject: str, nbytes: int, limit: int) -> None:
        super().__init__(
            f"message of {nbytes} bytes for {subject} is above the server's limit of {limit}; "
            "raise max_payload in the server's configuration"
        )
        self.subject = subject
        self.nbytes = nbytes
        self.limit = limit


class PermissionDenied(BusError):
    """The server denied this client a subject."""


class SequenceConflict(BusError):
    """A compare-and-set found another sequence than the expected one."""

    def __init__(self, subject: str, expected: int, last: int | None = None) -> None:
        found = "another" if last is None else str(last)
        super().__init__(f"{subject}: expected last sequence {expected}, the stream has {found}")
        self.subject = subject
        self.expected = expected
        self.last = last


class StreamMissing(BusError):
    """The stream is not there (any more): the broker lost its store, or nobody made it yet."""

    def __init__(self, stream: str) -> None:
        super().__init__(f"stream {stream!r} does not exist on this broker")
        self.stream = stream


class StreamFull(BusError):
    """The stream holds as many bytes as it may: nothing more is stored until something goes."""

    def __init__(self, stream: str, reason: str) -> None:
        super().__init__(f"stream {stream!r} is full: {reason}")
        self.stream = stream
        self.reason = reason


# ---- patches and tensors


class PatchError(SparsecastError):
    """A patch was refused; nothing was changed."""


class WrongBase(PatchError):
    """A patch for another base version than the one that the weights hold."""

    def __init__(self, *, base_version: int, version: int, held: int | None) -> None:
        super().__init__(
            f"patch {base_version} → {version} does not fit weights at version {held}; "
            "fetch the patches between them from the log, or an anchor"
        )
        self.base_version = base_version
        self.version = version
        self.held = held


class CorruptPatch(PatchError):
    """Bytes that are not the patch they claim to be: truncated, flipped, out of range."""

    def __init__(self, reason: str, *, tensor: str | None = None) -> None:
        super().__init__(f"corrupt patch: {reason}" + (f" (tensor {tensor!r})" if tensor else ""))
        self.reason = reason
        self.tensor = tensor


class ManifestMismatch(PatchError):
    """Two models that are not the same: names, dtypes or shapes differ.

    `difference` names the first one.
    """

    def __init__(self, difference: str) -> None:
        super().__init__(f"the models differ: {difference}")
        self.difference = difference


class UnsupportedTensor(PatchError, TypeError):
    """A tensor that cannot be published or patched (meta, sparse, quantised, shared storage)."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"tensor {name!r}: {reason}")
        self.name = name
        self.reason = reason


# ---- windows


class WindowError(SparsecastError):
    """A window failed; it is to be aborted, and a new one opened."""

    def __init__(self, window: str, reason: str) -> None:
        super().__init__(f"window {window}: {reason}")
        self.window = window
        self.reason = reason


class WindowTimeout(WindowError):
    """An operation on a window ran past its deadline."""


class WindowAborted(WindowError):
    """The window was aborted while the operation ran, or before."""


class WindowUnavailable(WindowError):
    """This machine or process cannot open that kind of window."""


# ---- the log


class LogError(SparsecastError):
    """The log failed to store or load an entry."""


class LogHole(LogError):
    """The log holds no unbroken way to the version that was asked for."""

    def __init__(self, reason: str, *, version: int | None = None) -> None:
        super().__init__(f"the log has no unbroken way: {reason}")
        self.reason = reason
        self.version = version


class LogFull(LogError):
    """An entry has no room in the log: a bound of its size is reached, and nothing was stored."""


# ---- waiting, reading, generating


class WaitTimeout(SparsecastError, TimeoutError):
    """A bounded wait ended without what it waited for; `reason` says what was missing."""

    def __init__(self, what: str, timeout_s: float, reason: str) -> None:
        super().__init__(f"{what} not within {timeout_s:g} s: {reason}")
        self.what = what
        self.timeout_s = timeout_s
        self.reason = reason


class PublisherBusy(SparsecastError):
    """publish(on_busy="error") while a patch is already waiting for the round in flight."""


class ReplicaTorn(SparsecastError):
    """An apply failed after its first write: the weights are not served until they are resynced."""


class ReplicaLagging(SparsecastError):
    """A worker is further behind the trainer than `max_lag` or `offline_s` allow."""


class ReplicaRefused(SparsecastError):
    """The trainer of the run refused this replica; `reason` is the trainer's."""

    def __init__(self, run: str, name: str, reason: str) -> None:
        super().__init__(f"worker {name!r} was refused by run {run!r}: {reason}")
        self.run = run
        self.name = name
        self.reason = reason


class Closed(SparsecastError):
    """The object was closed, or never started."""


class EngineError(SparsecastError):
    """The inference engine failed or cannot do what was asked."""


class WorkerDied(SparsecastError):
    """A worker process that is needed has ended; the message carries its last words."""


class GenerationFailed(SparsecastError):
    """Prompts were not answered; `failures` maps the index of a prompt to its reason."""

    def __init__(self, failures: Mapping[int, str]) -> None:
        first = next(iter(sorted(failures.items())), None)
        detail = f"; prompt {first[0]}: {first[1]}" if first else ""
        super().__init__(f"{len(failures)} prompt(s) were not answered{detail}")
        self.failures = dict(failures)


def brief(exc: Exception) -> str:
    """An error of ours in its own words, a foreign one by its name and first line."""
    if isinstance(exc, SparsecastError):
        return str(exc)
    return f"{type(exc).__name__}: {exc}".split("\n", 1)[0]
