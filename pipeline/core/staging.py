"""Patches that are here, whole and checked, and wait to be applied."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from ...messages.control import Announce
from .commands import Drop

Source = Literal["window", "log"]


@dataclass(frozen=True, slots=True)
class Patch:
    """It carries weights at any version from base_version on (None: at any at all) to version."""

    base_version: int | None
    version: int
    nbytes: int
    source: Source
    #: What came with it, until the journal is known to have made this announcement.
    awaits: Announce | None = None

    def wider(self, other: Patch | None) -> bool:
        """Whether it goes back further than `other`: of two for one version that one is kept."""
        if other is None or other.base_version is None:
            return other is None
        return self.base_version is None or self.base_version < other.base_version


@dataclass(slots=True)
class Staging:
    """Staged patches by version. What is dropped here the driver has to drop as well."""

    patches: dict[int, Patch] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """How much is held."""
        return sum(patch.nbytes for patch in self.patches.values())

    def add(self, patch: Patch) -> None:
        """A patch is here; a wider one for its version stays, and one that awaits nothing."""
        known = self.patches.get(patch.version)
        if known is None or (known.awaits is None) == (patch.awaits is None):
            better = patch.wider(known)
        else:
            better = patch.awaits is None
        if better:
            self.patches[patch.version] = patch

    def confirm(self, announce: Announce) -> bool:
        """The journal has announced this; False if what awaits it here came with anything else."""
        patch = self.patches.get(announce.version)
        if patch is None or patch.awaits is None:
            return True
        if patch.awaits != announce:
            return False
        self.patches[patch.version] = replace(patch, awaits=None)
        return True

    def chain(self, at: int | None) -> tuple[int, ...]:
        """The versions that follow, without a hole, on weights at `at` (None: worth nothing)."""
        chain: list[int] = []
        for version, patch in sorted(self.patches.items()):
            if patch.awaits is not None or (at is not None and version <= at):
                continue
            if patch.base_version is None:
                chain = [version]
            elif at is not None and patch.base_version <= at:
                chain.append(version)
            else:
                continue
            at = version
        return tuple(chain)

    def useless(self, at: int | None) -> tuple[int, ...]:
        """The versions that weights at `at` hold already."""
        return tuple(v for v in sorted(self.patches) if at is not None and v <= at)

    def take(self, versions: tuple[int, ...]) -> Source:
        """These were applied; returns by which road the last of them came."""
        source: Source = "window"
        for version in versions:
            patch = self.patches.pop(version, None)
            source = patch.source if patch is not None else source
        return source

    def drop(self, versions: tuple[int, ...]) -> Drop:
        """These are not needed any more."""
        for version in versions:
            self.patches.pop(version, None)
        return Drop(versions)
