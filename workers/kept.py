"""The patches that a trainer has made and keeps until they are safe elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ..messages.control import Piece, Tags
from ..messages.layout import Layout
from ..messages.manifest import Manifest
from ..pipeline.delta import Diffed, Patch, merge
from ..pipeline.delta import checksum as checksum_of
from ..pipeline.delta.routing import restrict
from .streams import own, to_host

log = logging.getLogger("sparsecast.publisher")


@dataclass(slots=True)
class Facts:
    """What is known of a patch once it is whole. `checksum` None: not computed yet."""

    digest: int
    checksum: int | None
    diff_us: int
    encode_us: int


@dataclass(slots=True)
class Kept:
    """A patch; what its diff has found is asked for late, because asking waits for the device."""

    patch: Patch
    published_at: float
    step: int | None
    tags: Tags | None
    _found: Diffed | None = None
    _facts: Facts | None = None
    _host: torch.Tensor | None = field(default=None, repr=False)
    #: The window that it was parted for, and what each of its classes holds of it.
    routed: int = 0
    routes: tuple[Patch, ...] = ()

    @property
    def facts(self) -> Facts:
        """What its diff has found; waits until the patch is whole."""
        if self._facts is None:
            found = self._found
            assert found is not None
            self._facts = Facts(found.digest, found.checksum, found.diff_us, found.encode_us)
            self._found = None
        return self._facts

    @property
    def checksum(self) -> int:
        """The checksum of the bytes; waits until they are whole."""
        facts = self.facts
        if facts.checksum is None:
            facts.checksum = checksum_of(self.patch.buffer)
        return facts.checksum

    def on_host(self) -> torch.Tensor:
        """The bytes in host memory; copied once. On the torch thread."""
        if self._host is None:
            _ = self.facts
            self._host = to_host(self.patch.buffer)
        return self._host

    def part(
        self, window: int, ways: Sequence[Layout | None], local: Manifest
    ) -> tuple[Piece, ...]:
        """Part it, which names the tensors of `local`, for a window whose classes hold of those
        what a layout says (None: all); what each class gets. Without memory for that, nothing."""
        patch = self.patch
        try:
            routes = tuple(patch if way is None else restrict(patch, way, local) for way in ways)
            row = tuple(
                Piece(one.nbytes, self.checksum if one is patch else checksum_of(one.buffer))
                for one in routes
            )
        except (RuntimeError, MemoryError) as exc:
            log.warning("version %d goes whole to all ranks: %s", patch.version, exc)
            return ()
        self.routed, self.routes = window, routes
        return row

    def unpart(self) -> None:
        """Let go of its parts."""
        self.routed, self.routes = 0, ()


def merged(kept: Sequence[Kept]) -> Kept:
    """All as one: the newest contents, since the earliest call. Waits until they are whole."""
    if len(kept) == 1:
        return kept[0]
    facts = [one.facts for one in kept]
    patches = [one.patch for one in kept]
    own(*(patch.buffer for patch in patches))
    return Kept(
        patch=merge(patches),
        published_at=min(one.published_at for one in kept),
        step=kept[-1].step,
        tags=kept[-1].tags,
        _facts=Facts(
            digest=facts[-1].digest,
            checksum=None,
            diff_us=sum(one.diff_us for one in facts),
            encode_us=sum(one.encode_us for one in facts),
        ),
    )
