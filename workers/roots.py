"""What the ranks of a trainer send, and how each's patches go into the tensors of one worker rank.

A root is a rank that sends: its patches are in the coordinates of its own tensors. A trainer of one
rank, whose claim names no roots, sends the published tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import msgspec

from ..messages import codec
from ..messages.compose import through
from ..messages.control import Announce, Claim, LogEntry, Piece, added
from ..messages.errors import CorruptPatch, ManifestMismatch, PatchError
from ..messages.layout import Layout, identity, require_whole
from ..messages.manifest import Manifest

#: What is announced of the patch of one root.
AnyPiece: TypeAlias = Piece | Announce | LogEntry


@dataclass(frozen=True, slots=True)
class Root:
    """One sender's patches, here.

    `manifest` has the tensors that they name; `layout` says what of those is held here, and where
    (None: they are the tensors here). `source` is the hash of the layout of the sender's tensors;
    "": they are the published ones.
    """

    manifest: Manifest
    layout: Layout | None
    source: str = ""
    #: Whether any element of it is held here.
    held: bool = field(init=False)

    def __post_init__(self) -> None:
        parts = self.layout.parts if self.layout is not None else None
        held = parts is None or any(math.prod(part.shape) for part in parts)
        object.__setattr__(self, "held", held)


@dataclass(frozen=True, slots=True)
class Sources:
    """What may come under one claim: patches of the whole, or of each of its roots."""

    whole: Root
    roots: tuple[Root, ...]
    #: The roots as the claim has them.
    packed: tuple[bytes, ...]

    @property
    def manifest(self) -> Manifest:
        """The published tensors."""
        return self.whole.manifest

    @property
    def senders(self) -> tuple[Root, ...]:
        """Those that send updates."""
        return self.roots or (self.whole,)

    def are_of(self, claim: Claim) -> bool:
        """Whether another claim has the same: of many roots it takes seconds to see what they send
        here, and one claim may be proven several times."""
        return (self.manifest.hash, self.packed) == (claim.manifest.hash, claim.roots)

    def of(self, announce: Announce | LogEntry) -> list[tuple[Root, AnyPiece]]:
        """Whose patches an update or an entry of the log consists of, in the order of the roots,
        with what is announced of each.

        ManifestMismatch, CorruptPatch: they cannot be those of this claim.
        """
        # An entry by itself may be that of a trainer's only root.
        rooted = isinstance(announce, LogEntry) and announce.layout != ""
        published = announce.manifest_hash
        if isinstance(announce, LogEntry) and rooted:
            published = announce.whole
        if published != self.manifest.hash:
            raise ManifestMismatch(f"version {announce.version} is of another manifest")
        pieces = pieces_of(announce)
        if isinstance(announce, LogEntry) and not announce.pieces and not rooted:
            return [(self.whole, announce)]
        if len(pieces) != len(self.senders):
            raise CorruptPatch(
                f"version {announce.version} comes in {len(pieces)} pieces, and the claim has "
                f"{len(self.senders)} roots"
            )
        for at, (root, piece) in enumerate(zip(self.senders, pieces, strict=True)):
            if isinstance(piece, LogEntry) and piece.layout != root.source:
                raise ManifestMismatch(
                    f"log entry {piece.name!r} is in the coordinates of layout "
                    f"{piece.layout or 'none'}, root {at} of the claim has {root.source or 'none'}"
                )
        return list(zip(self.senders, pieces, strict=True))


def sources_of(claim: Claim, layout: Layout | None) -> Sources:
    """What a claim's trainer sends, for a rank that holds what `layout` says of the published
    tensors (None: them).

    RemoteProtocolError or ManifestMismatch: the roots are no layouts, or do not send every element
    once.
    """
    manifest = claim.manifest
    layouts = [codec.unpack_layout(packed) for packed in claim.roots]
    for root in layouts:
        root.require_fit(manifest)
    if layouts:
        require_whole(layouts, manifest)
    target = layout if layout is not None else identity(manifest)
    roots = (Root(root.local, through(root, target), root.hash) for root in layouts)
    return Sources(Root(manifest, layout), tuple(roots), claim.roots)


def pieces_of(announce: Announce | LogEntry) -> tuple[AnyPiece, ...]:
    """What is announced of each root's patch; of a trainer of one rank, the announcement itself.

    CorruptPatch if they are not what is announced of them together.
    """
    pieces: tuple[AnyPiece, ...] = announce.pieces or (announce,)
    nbytes = sum(piece.nbytes for piece in pieces)
    checksum = added(piece.checksum for piece in pieces)
    if nbytes != announce.nbytes or checksum != added([announce.checksum]):
        raise CorruptPatch(
            f"its pieces have {nbytes} bytes and checksum {checksum:016x}, announced was "
            f"{announce.nbytes} and {announce.checksum:016x}"
        )
    return pieces


def routed(announce: Announce, routes: Sequence[Sequence[Piece]], of_class: int | None) -> Announce:
    """The announcement as ranks of one class of a window get it: each root's patch without what
    they do not hold. CorruptPatch if nothing is routed to them."""
    if of_class is None or any(of_class >= len(classes) for classes in routes):
        raise CorruptPatch(f"version {announce.version} is routed to no class {of_class}")
    pieces = tuple(classes[of_class] for classes in routes)
    return msgspec.structs.replace(
        announce,
        pieces=pieces,
        nbytes=sum(piece.nbytes for piece in pieces),
        checksum=added(piece.checksum for piece in pieces),
    )


def named(exc: PatchError, root: int, roots: int) -> PatchError:
    """What was refused of one root's patch, with the root's number if there are several."""
    return exc if roots == 1 else PatchError(f"root {root}: {exc}")
