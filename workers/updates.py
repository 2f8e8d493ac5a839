"""What publish() gives back: the facts of an update, and how far it has come."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

#: How many members have to hold an update: all of them, or so many.
AtLeast = Literal["all"] | int


@dataclass(frozen=True, slots=True)
class Report:
    """How far an update has come.

    `applied` maps worker names to the seconds from publish() until the trainer heard that the
    weights hold it (0.0 if that is no longer remembered); `missing` maps every other member to
    the reason.
    """

    version: int
    applied: Mapping[str, float]
    missing: Mapping[str, str]

    @property
    def complete(self) -> bool:
        """Whether every member has it, and there is at least one."""
        return bool(self.applied) and not self.missing

    def flat(self, prefix: str = "sparsecast/") -> dict[str, float]:
        """Scalars for any logger."""
        times = sorted(self.applied.values())
        return {
            f"{prefix}version": float(self.version),
            f"{prefix}applied": float(len(self.applied)),
            f"{prefix}missing": float(len(self.missing)),
            f"{prefix}applied_first_s": times[0] if times else 0.0,
            f"{prefix}applied_last_s": times[-1] if times else 0.0,
        }


@dataclass(frozen=True, slots=True)
class Published:
    """What one publish() found. `changed` counts elements; sizes are bytes."""

    base_version: int
    version: int
    changed: int
    numel: int
    nbytes: int
    dense_nbytes: int
    encoding: str


class Made:
    """The facts of one publish()."""

    def __init__(self, made: Published) -> None:
        self._made = made
        self.version = made.version
        self.base_version = made.base_version
        #: Elements whose bits changed, and bytes of the patch and of the same weights dense.
        self.changed = made.changed
        self.nbytes = made.nbytes
        self.dense_nbytes = made.dense_nbytes
        #: "none", "sparse", "bitmap" or "dense": what carries the most of those bytes.
        self.encoding = made.encoding
        self._numel = made.numel

    @property
    def density(self) -> float:
        """The share of elements that changed, 0 to 1."""
        return self.changed / self._numel if self._numel else 0.0
