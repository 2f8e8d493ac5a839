"""What all ranks of a trainer have published, as one: the first rank's own, and by its orders the
others'.

Versions are counted on each rank by itself: every rank calls publish() as often as the others, but
not at the same moment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from ..messages import codec
from ..messages.compose import published_by, shared_out
from ..messages.control import LogEntry, Piece, added
from ..messages.errors import LocalProtocolError, LogError, WaitTimeout
from ..messages.ranks import Begin, Deed, Held, Publish, Roll, Seal, Store
from ..pipeline.core.events import Sealed
from ..pipeline.core.policy import Policy
from ..pipeline.delta import Patch
from .leading import Leading
from .outgoing import Outgoing, Past, ShadowPlace
from .parted import Parted

#: How often the ranks are asked for one version, while some go on publishing.
TRIES = 8
#: So long the torch thread waits for publish() to come to where another rank is already: the next
#: take, for which that publish() may wait, is behind it.
BEHIND_S = 0.25


class United(Outgoing):
    """The outgoing side of the first rank, which speaks for all. See `Outgoing`; what waits for
    other ranks runs on the torch thread, and raises RankSilent and what they raise."""

    def __init__(self, *args: Any, leading: Leading, policy: Policy, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._leading = leading
        self._policy = policy
        #: The digest of the whole state at the versions that are kept.
        self._digests: dict[int, int] = {}

    def begin(self, version: int | None = None, past: Past | None = None) -> tuple[int, int]:
        """The run starts, or starts anew, on every rank; the version and its whole digest."""
        self._digests.clear()
        if version is not None:
            start, share = super().begin(version)
            found = self._all("begin", Begin(version=version))
            digest = added((share, *(held.digest for held in found)))
            if past is None or past.digest == digest:
                return start, digest
            order = self._order("since", (start, past.digest))
            self.go_on(start, past.tensors)
            _results(order)
            return start, past.digest

        def begin(made: int) -> list[Held]:
            order = self._order("begin", Begin(version=made, made=self.at(made)))
            return [self.begin_at(made), *_results(order)]

        return self._level(begin)

    def take(self, unsafe: Sequence[int], until: int | None = None) -> Sealed | None:
        """Fix the bytes of what is pending on every rank, up to what is pending here, or to what
        another rank has merged with that."""
        mine = super().take(unsafe, until)
        if mine is None:
            return None
        sealed = self._sealed(mine)
        furthest = max(one.version for one in sealed)
        while furthest > mine.version:
            self.wait_made(furthest, self._policy.store_s)
            unsafe = sorted({*unsafe, *(one.version for one in sealed)})
            found = super().take(unsafe, furthest)
            assert found is not None  # what was taken is kept, and is among the unsafe
            mine = found
            sealed = self._sealed(mine)
            furthest = max(one.version for one in sealed)
        for rank, other in enumerate(sealed):
            if (other.base_version, other.version) != (mine.base_version, mine.version):
                raise LocalProtocolError(
                    f"rank {rank} of the trainer has a patch {other.base_version} → "
                    f"{other.version}, the first rank {mine.base_version} → {mine.version}: every "
                    "rank has to call publish() as often as the others"
                )
        parted = len({one.routed for one in sealed}) == 1 and all(one.routes for one in sealed)
        self._digests[mine.version] = added(one.digest for one in sealed)
        return Sealed(
            base_version=mine.base_version,
            version=mine.version,
            nbytes=sum(one.nbytes for one in sealed),
            checksum=added(one.checksum for one in sealed),
            digest=self._digests[mine.version],
            changed=sum(one.changed for one in sealed),
            numel=sum(one.numel for one in sealed),
            encoding=max(sealed, key=lambda one: one.nbytes).encoding,
            dense_nbytes=sum(one.dense_nbytes for one in sealed),
            published_at=mine.published_at,
            diff_us=max(one.diff_us for one in sealed),
            encode_us=max(one.encode_us for one in sealed),
            step=mine.step,
            tags=mine.tags,
            pieces=tuple(Piece(one.nbytes, one.checksum) for one in sealed),
            routes=tuple(one.routes[0] for one in sealed) if parted else (),
            routed=mine.routed if parted else 0,
        )

    def join(self, versions: Sequence[int]) -> int:
        """Keep these versions as one patch here, and as one on every other rank."""
        nbytes = super().join(versions)
        self._order("join", versions[-1])
        return nbytes

    def entry(
        self, versions: Sequence[int], epoch: int, digest: int | None = None
    ) -> tuple[LogEntry, Patch]:
        """These kept versions as the first rank's piece of an entry; the others store theirs."""
        if digest is None:
            known = [version for version in versions if version in self._digests]
            if not known:
                raise LogError(f"versions {list(versions)} are not kept any more")
            digest = self._digests[max(known)]
        entry, patch = super().entry(versions, epoch, digest)
        store = Store(
            version=entry.version, epoch=epoch, digest=digest, step=entry.step, tags=entry.tags
        )
        self.beside[entry.name] = self._order("store", store)
        return entry, patch

    def release(self, version: int) -> None:
        """Kept patches up to this version are safe elsewhere, on every rank."""
        super().release(version)
        for known in [known for known in self._digests if known <= version]:
            del self._digests[known]
        self._order("release", version)

    def anchor(self, epoch: int) -> tuple[LogEntry, Patch]:
        """The first rank's piece of a full copy; the others store theirs."""
        copies: dict[int, Patch] = {}

        def copy(version: int) -> list[Held]:
            order = self._order("copy", self.at(version))
            copies.clear()  # of the try before
            patch, digest = self.copy()
            copies[patch.version] = patch
            return [Held(version=patch.version, digest=digest), *_results(order)]

        version, digest = self._level(copy)
        entry = self.anchored(copies[version], epoch, digest)
        self.beside[entry.name] = self._order("keep", (version, epoch, digest))
        return entry, copies[version]

    def recall(self, way: Sequence[LogEntry]) -> list[Future[Any]]:
        """Have the other ranks make again what these entries lead to, each of what it holds."""
        return self._leading.order("recall", tuple(way), self._policy.resume_s)

    def roll(self, roll: Roll) -> list[Future[Any]]:
        """Have the other ranks publish what they have made again, or not."""
        return self._order("roll", roll)

    # ---- the others

    def _sealed(self, mine: Sealed) -> list[Sealed]:
        """What every rank has sealed of what the first one has, that one's first."""
        seal = Seal(at=self.at(mine.version), base=mine.base_version)
        return [mine, *self._all("seal", seal)]

    def _level(self, at: Callable[[int], list[Held]]) -> tuple[int, int]:
        """Do something on all ranks at one version: that, and their digests' sum. LogError."""
        version = self.version
        for _ in range(TRIES):
            held = at(version)
            if all(one.version == version and one.digest is not None for one in held):
                return version, added(one.digest or 0 for one in held)
            version = max(one.version for one in held)
            try:
                self.wait_made(version, BEHIND_S)
            except WaitTimeout as exc:
                raise LogError(f"another rank of the trainer is ahead: {exc}") from exc
        raise LogError(f"the trainer's ranks are never at one version, the last was {version}")

    def _order(self, deed: Deed, what: Any) -> list[Future[Any]]:
        return self._leading.order(deed, what, self._policy.store_s + self._policy.bus_s)

    def _all(self, deed: Deed, what: Any) -> list[Any]:
        return _results(self._order(deed, what))


def unite(
    parted: Parted,
    leading: Leading,
    *,
    writer: str,
    policy: Policy,
    clock: Callable[[], float],
    shadow: ShadowPlace,
) -> United:
    """The outgoing side of all ranks, which have met: each has made its own.

    UnsupportedTensor, ManifestMismatch: the ranks' layouts make up no model.
    """
    layouts = [parted.layout(), *leading.layouts]
    manifest, roots = published_by(layouts), shared_out(layouts)
    publish = Publish(manifest=manifest, roots=tuple(map(codec.pack_layout, roots)), writer=writer)
    told = leading.order("publish", publish, policy.store_s)
    united = United(
        parted.choice,
        leading=leading,
        policy=policy,
        clock=clock,
        writer=writer,
        shadow=shadow,
        share=parted.share(0, tuple(roots), manifest),
    )
    _results(told)
    return united


def _results(futures: Sequence[Future[Any]]) -> list[Any]:
    return [future.result() for future in futures]
