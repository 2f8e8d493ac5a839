"""Staging and the way into the weights: what is refused, what tears, what only waits."""

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import pytest
import torch

from ranks import held, split
from runs import Tensors, same_bits, step, weights
from sparsecast import (
    CorruptPatch,
    ManifestMismatch,
    Patch,
    ReplicaTorn,
    WaitTimeout,
    diff,
    digest,
    merge,
)
from sparsecast.messages.control import Claim, LogEntry, Sender
from sparsecast.messages.manifest import Manifest
from sparsecast.pipeline.core import events as ev
from sparsecast.pipeline.delta import Shadow, manifest_of
from sparsecast.workers import incoming
from sparsecast.workers.engine import ModuleEngine
from sparsecast.workers.entries import describe
from sparsecast.workers.incoming import Incoming


class Troubled(ModuleEngine):
    """An engine whose after_apply or tensors fails when told so."""

    def __init__(self, tensors: Tensors) -> None:
        super().__init__(tensors)
        self.applied: list[tuple[int, list[str]]] = []
        self.after: Exception | None = None
        self.unreadable: Exception | None = None

    def tensors(self) -> Mapping[str, torch.Tensor]:
        if self.unreadable is not None:
            raise self.unreadable
        return super().tensors()

    def after_apply(self, version: int, changed: Sequence[str]) -> None:
        self.applied.append((version, list(changed)))
        if self.after is not None:
            raise self.after


def claim_of(trained: Tensors) -> Claim:
    """A trainer's claim of a run at version 0, with these weights."""
    return Claim(
        sender=Sender("trainer", "t"),
        epoch=1,
        version=0,
        digest=digest(trained),
        manifest=manifest_of(trained),
        nonce="n",
        heartbeat_s=0.5,
    )


class Stand:
    """One replica's staging over weights at version 0, and the trainer's states beside it."""

    def __init__(self, guard_s: float = 0.2) -> None:
        self.mine = weights()
        self.states = [weights()]
        for version in range(1, 4):
            newer = {name: tensor.clone() for name, tensor in self.states[-1].items()}
            step(newer, version)
            self.states.append(newer)
        self.engine = Troubled(self.mine)
        self.incoming = Incoming(self.engine, clock=lambda: 0.0, guard_s=guard_s)
        assert isinstance(self.prove(), ev.Proved)
        self.incoming.hold(0)

    def prove(self, other: Tensors | None = None) -> ev.Proved | ev.Unfit:
        """Compare with a claim of the trainer's weights, or of others."""
        return self.incoming.prove(claim_of(self.states[0] if other is None else other))

    def patch(self, base: int, version: int) -> Patch:
        """The way between two of the states."""
        return merge(
            [
                diff(self.states[at], self.states[at + 1], base_version=at, version=at + 1)
                for at in range(base, version)
            ]
        )

    def entry(self, patch: Patch) -> LogEntry:
        """What would be announced of a patch."""
        return describe(patch, 1, digest(self.states[patch.version]), None)

    def stage(self, patch: Patch, entry: LogEntry | None = None, **options: Any) -> None:
        """Stage a patch under what was announced of it."""
        self.incoming.stage(
            [patch.buffer.clone()],
            entry or self.entry(patch),
            receive_us=1,
            transport="bus",
            **options,
        )


def test_a_chain_is_applied_in_one_hold() -> None:
    """Three staged versions at once: one flip, one after_apply with all names, exact bits."""
    stand = Stand()
    for base in range(3):
        stand.stage(stand.patch(base, base + 1))
    done = stand.incoming.apply((1, 2, 3))
    assert isinstance(done, ev.AppliedHere)
    assert done.version == stand.engine.guard().version == 3
    assert [version for version, _ in stand.engine.applied] == [3]
    assert same_bits(stand.mine, stand.states[3])
    found = stand.incoming.digest(3)
    assert isinstance(found, ev.Digested)
    assert found.digest == digest(stand.states[3])
    assert isinstance(stand.incoming.digest(2), ev.DigestFailed)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"nbytes": 7}, "bytes, 7 were announced"),
        ({"checksum": 1}, "checksum"),
        ({"version": 2}, "announced was 0 → 2"),
        ({"base_version": None}, "announced was None → 1"),
    ],
    ids=["size", "checksum", "version", "base"],
)
def test_what_is_not_as_announced_is_refused(change: dict[str, Any], error: str) -> None:
    """Each fact of the announcement is held against the payload, and nothing is kept."""
    stand = Stand()
    patch = stand.patch(0, 1)
    with pytest.raises(CorruptPatch, match=error):
        stand.stage(patch, msgspec.structs.replace(stand.entry(patch), **change))
    assert isinstance(stand.incoming.apply((1,)), ev.ApplyFailed)
    assert same_bits(stand.mine, stand.states[0])


def test_a_payload_of_another_manifest_is_refused() -> None:
    """Its hash is not that of the claim: refused before a byte of it is read."""
    stand = Stand()
    patch = stand.patch(0, 1)
    with pytest.raises(ManifestMismatch, match="another manifest"):
        stand.stage(patch, msgspec.structs.replace(stand.entry(patch), manifest_hash="0" * 16))


def test_a_log_entry_without_bytes_is_refused() -> None:
    """The log gave nothing where an entry says that there is something."""
    stand = Stand()
    entry = stand.entry(stand.patch(0, 1))
    with pytest.raises(CorruptPatch, match="no bytes"):
        stand.incoming.stage_bytes([b""], entry, receive_us=1)


def test_scratch_is_checked_and_dropped() -> None:
    """An attempt that comes again for what is staged already leaves nothing, but is checked."""
    stand = Stand()
    patch = stand.patch(0, 1)
    stand.stage(patch, scratch=True)
    assert isinstance(stand.incoming.apply((1,)), ev.ApplyFailed)
    bad = Patch.from_bytes(patch.to_bytes())
    bad.buffer[-1] ^= 1
    with pytest.raises(CorruptPatch, match="checksum"):
        stand.stage(bad, stand.entry(patch), scratch=True)


def test_of_two_patches_for_one_version_the_wider_stays() -> None:
    """The log brought 0 → 2, the window 1 → 2: weights at 0 need the first, whichever came last."""
    for order in ((0, 1), (1, 0)):
        stand = Stand()
        for base in order:
            stand.stage(stand.patch(base, 2))
        assert isinstance(stand.incoming.apply((2,)), ev.AppliedHere)
        assert same_bits(stand.mine, stand.states[2])


def test_a_patch_for_another_base_changes_nothing() -> None:
    """1 → 2 does not fit weights at 0: refused by name, and the weights are served as they were."""
    stand = Stand()
    stand.stage(stand.patch(1, 2))
    failed = stand.incoming.apply((2,))
    assert isinstance(failed, ev.ApplyFailed)
    assert not failed.torn
    assert "1 → 2" in failed.reason
    with stand.engine.guard().reading() as version:
        assert version == 0
    assert same_bits(stand.mine, stand.states[0])


def test_readers_in_the_way_only_delay() -> None:
    """A reader outstays the deadline: the patch stays in staging and goes in afterwards."""
    stand = Stand(guard_s=0.05)
    stand.stage(stand.patch(0, 1))
    inside, leave = threading.Event(), threading.Event()

    def read() -> None:
        with stand.engine.guard().reading():
            inside.set()
            leave.wait(10)

    reader = threading.Thread(target=read)
    reader.start()
    assert inside.wait(5)
    failed = stand.incoming.apply((1,))
    leave.set()
    reader.join(5)
    assert isinstance(failed, ev.ApplyFailed)
    assert (failed.waiting, failed.torn) == (True, False)
    assert isinstance(stand.incoming.apply((1,)), ev.AppliedHere)


@pytest.mark.parametrize(
    "trouble",
    [RuntimeError("no memory"), WaitTimeout("pause", 1.0, "a request still runs")],
    ids=["error", "timeout"],
)
def test_an_engine_that_fails_after_the_write_is_torn(trouble: Exception) -> None:
    """after_apply raised, a timeout of its own included: torn, not waiting for readers."""
    stand = Stand()
    stand.engine.after = trouble
    stand.stage(stand.patch(0, 1))
    failed = stand.incoming.apply((1,))
    assert isinstance(failed, ev.ApplyFailed)
    assert (failed.torn, failed.waiting) == (True, False)
    with pytest.raises(ReplicaTorn), stand.engine.guard().reading():
        pass
    stand.engine.after = None
    anchor = Shadow(stand.states[1]).anchor(1)
    stand.stage(anchor)
    assert isinstance(stand.incoming.apply((1,)), ev.AppliedHere)
    assert same_bits(stand.mine, stand.states[1])


def test_another_model_and_an_unreadable_one_are_unfit() -> None:
    """The first difference is named; so is what a device said that could not be read."""
    stand = Stand()
    other = weights()
    del other["steps"]
    unfit = stand.prove(other)
    assert isinstance(unfit, ev.Unfit)
    assert "steps" in unfit.difference
    stand.engine.unreadable = RuntimeError("CUDA error: out of memory")
    unfit = stand.prove()
    assert isinstance(unfit, ev.Unfit)
    assert "out of memory" in unfit.difference


def test_an_engine_with_a_layout_is_got_ready_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is rehearsed at the start, and looked up when a round is near, is what an apply by the
    rank's layout will use."""
    layout = split(weights(), 2)[1]
    mine = held(layout, weights())
    rank = Incoming(ModuleEngine(mine), clock=lambda: 0.0, guard_s=0.2, layout=layout)
    rehearsed: list[tuple[set[str], Any]] = []
    warmed: list[tuple[set[str], Manifest, Any]] = []

    def rehearse(tensors: Tensors, device: torch.device, *, layout: Any) -> None:
        rehearsed.append((set(tensors), layout))

    def warm(tensors: Tensors, manifest: Manifest, device: torch.device, layout: Any) -> None:
        warmed.append((set(tensors), manifest, layout))

    monkeypatch.setattr(incoming, "rehearse", rehearse)
    monkeypatch.setattr(incoming, "warm", warm)
    rank.start()
    assert rehearsed == [(set(mine), layout)]
    rank.warm()
    assert not warmed  # of what is published nothing is known yet
    assert isinstance(rank.prove(claim_of(weights())), ev.Proved)
    rank.warm()
    assert warmed == [(set(mine), manifest_of(weights()), layout)]


def test_torn_weights_prove_nothing() -> None:
    """What is quarantined is not read for a proof: the anchor decides."""
    stand = Stand()
    stand.incoming.quarantine("a digest was wrong")
    proved = stand.prove()
    assert isinstance(proved, ev.Proved)
    assert proved.digest == -1
