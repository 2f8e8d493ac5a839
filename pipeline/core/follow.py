"""Which versions of a run a replica wants: the latest, every k-th, or one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, Self, get_args

from ...messages.control import Role
from ...messages.errors import SettingsError

#: How far a fetch goes: as far as the log does; to its target, or where no entry ends there to the
#: first version behind it; to its target or nowhere.
Reach = Literal["newest", "nearest", "exact"]


@dataclass(frozen=True, slots=True)
class Follow:
    """What "latest", "every:K" and "version:N" mean. Versions count from 0."""

    every: int = 1
    pinned: int | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read what a user types. ValueError says what there is to type."""
        if text == "latest":
            return cls()
        found = re.fullmatch(r"(every|version):(\d{1,18})", text, re.ASCII)
        if found is None:
            raise ValueError(f"{text!r} is none of latest, every:K and version:N")
        number = int(found[2])
        if found[1] == "version":
            return cls(pinned=number)
        if number < 1:
            raise ValueError("every:K needs a K of at least 1")
        return cls(every=number)

    def __str__(self) -> str:
        if self.pinned is not None:
            return f"version:{self.pinned}"
        return "latest" if self.every == 1 else f"every:{self.every}"

    @property
    def latest(self) -> bool:
        """Whether every version is wanted."""
        return self.pinned is None and self.every == 1

    @property
    def reach(self) -> Reach:
        """How far the log is to be followed."""
        if self.pinned is not None:
            return "exact"
        return "newest" if self.latest else "nearest"

    def goal(self, start: int, head: int) -> int | None:
        """The version that is wanted in an epoch from `start` on, when `head` is the newest that
        was announced; None: there is none yet."""
        if self.pinned is not None:
            return self.pinned if self.pinned <= head else None
        return max(start, head - head % self.every)

    def admits(self, version: int) -> bool:
        """Whether weights at this version may be held: patches lead onwards, never back."""
        return self.pinned is None or version <= self.pinned


def follow_of(role: str, text: str) -> Follow:
    """What a worker of this role follows. SettingsError says what there is to type."""
    if role not in get_args(Role):
        raise SettingsError(f"role is one of {', '.join(get_args(Role))}, not {role!r}")
    try:
        follow = Follow.parse(text)
    except ValueError as exc:
        raise SettingsError(f"follow: {exc}") from exc
    if role == "rollout" and not follow.latest:
        raise SettingsError(
            f"follow {text!r} is for workers of role 'evaluation': updates wait for a rollout "
            "worker, which follows the latest"
        )
    return follow
