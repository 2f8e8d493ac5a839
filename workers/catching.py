"""How far a worker is that catches up from the log, and when it says so. No bus, no terminal.

A catch-up begins with the first bytes that the log is asked for, may take several fetches (staging
is bounded), and is over when the digest of its target was right, or when something went wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from ..messages.control import LogEntry
from ..pipeline.core.policy import Policy

#: What an event's details call it.
State = Literal["under way", "done", "broken off"]
#: Hears one sentence, and the figures behind it.
Tell = Callable[[str, Mapping[str, Any]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """A catch-up at one moment."""

    #: What the weights were when it began; None: nothing of worth, so that it begins at an anchor.
    base_version: int | None
    #: What they are proven to be by now.
    version: int | None
    #: Where it leads; may grow while it lasts.
    target: int
    #: Bytes of entries that are here, and of all on the way. They fall where a tier of the log has
    #: failed midway and the next one begins anew.
    nbytes: int
    of_nbytes: int
    #: Entries that are here whole and checked, and all on the way.
    entries: int
    of_entries: int
    #: Since the log was asked.
    elapsed_s: float
    #: Whether it is worth telling (Policy.tell_s, Policy.tell_nbytes).
    notable: bool

    @property
    def share(self) -> float:
        """Of the bytes on the way, those that are here: 0 to 1."""
        return self.nbytes / self.of_nbytes if self.of_nbytes else 1.0

    @property
    def origin(self) -> str:
        """Where it began, in words."""
        return "a full copy" if self.base_version is None else f"version {self.base_version}"


class Catching:
    """Follows one worker's catch-ups, one at a time; calls that find none under way do nothing.

    `clock` is the driver's. `tell` hears of those that are notable: when they begin or prove to be,
    then at most once in `tell_s`, and at their end. Everything but `progress` on one thread.
    """

    def __init__(self, policy: Policy, clock: Callable[[], float], tell: Tell) -> None:
        self._policy = policy
        self._clock = clock
        self._tell = tell
        self._at: Progress | None = None
        self._since = 0.0
        #: Bytes of the entries that are here whole.
        self._whole_nbytes = 0
        self._told = False
        #: Outlives a catch-up: one that breaks off again and again must not flood the bus.
        self._told_at = float("-inf")

    @property
    def progress(self) -> Progress | None:
        """The catch-up under way, as it is now; None: there is none. On any thread."""
        at = self._at
        if at is None:
            return None
        elapsed_s = self._clock() - self._since
        policy = self._policy
        notable = elapsed_s > policy.tell_s or at.of_nbytes > policy.tell_nbytes
        return replace(at, elapsed_s=elapsed_s, notable=notable)

    def begin(self, held: int | None, way: Sequence[LogEntry], since: float) -> None:
        """These entries are to be loaded, to get on from `held`; the log was asked at `since`.

        What is under way goes on with them.
        """
        if not way:
            return
        at = self._at
        if at is None:
            self._since, self._whole_nbytes, self._told = since, 0, False
        self._at = Progress(
            base_version=held if at is None else at.base_version,
            version=held,
            target=way[-1].version,
            nbytes=self._whole_nbytes,
            of_nbytes=self._whole_nbytes + sum(entry.nbytes for entry in way),
            entries=0 if at is None else at.entries,
            of_entries=len(way) + (0 if at is None else at.entries),
            elapsed_s=0.0,
            notable=False,
        )
        self._perhaps_tell()

    def loaded(self, nbytes: int) -> None:
        """So many bytes of the entry under way are here."""
        if self._at is not None:
            self._at = replace(self._at, nbytes=self._whole_nbytes + nbytes)
            self._perhaps_tell()

    def staged(self, entry: LogEntry) -> None:
        """That entry is here whole, and checked."""
        if self._at is not None:
            self._whole_nbytes += entry.nbytes
            self._at = replace(self._at, nbytes=self._whole_nbytes, entries=self._at.entries + 1)
            self._perhaps_tell()

    def verified(self, version: int) -> None:
        """The weights are proven to be this version: the end, if that was the target."""
        if self._at is None:
            return
        self._at = replace(self._at, version=version)
        if version < self._at.target:
            return
        # A window may have brought the rest.
        self._at = replace(
            self._at,
            target=version,
            nbytes=self._whole_nbytes,
            of_nbytes=self._whole_nbytes,
            of_entries=self._at.entries,
        )
        self._end("done", "")

    def broke_off(self, reason: str) -> None:
        """It leads to nothing; what comes next is another one."""
        self._end("broken off", reason)

    def _perhaps_tell(self) -> None:
        now = self.progress
        assert now is not None
        if now.notable and self._since + now.elapsed_s - self._told_at >= self._policy.tell_s:
            self._say("under way", now)

    def _end(self, state: State, reason: str) -> None:
        now, self._at = self.progress, None
        if now is not None and self._told:
            self._say(state, now, reason)

    def _say(self, state: State, now: Progress, reason: str = "") -> None:
        # At the moment that is told: what is told next is so much later by its own words, too.
        self._told, self._told_at = True, self._since + now.elapsed_s
        details = asdict(now) | {"state": state}
        del details["notable"]
        self._tell(sentence(state, now, reason), details)


def sentence(state: State, at: Progress, reason: str = "") -> str:
    """A catch-up in words."""
    match state:
        case "under way":
            return (
                f"catching up from {at.origin} to version {at.target}: {at.nbytes} of "
                f"{at.of_nbytes} bytes, {at.entries} of {at.of_entries} entries, "
                f"{at.elapsed_s:.1f} s"
            )
        case "done":
            return f"caught up to version {at.version}: {at.nbytes} bytes in {at.elapsed_s:.1f} s"
        case "broken off":
            return (
                f"catching up to version {at.target} broke off after {at.nbytes} of "
                f"{at.of_nbytes} bytes: {reason}"
            )
