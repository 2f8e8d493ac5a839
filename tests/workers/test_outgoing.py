"""What a trainer has published and not yet given away: nothing of it may be lost."""

import threading

import pytest
import torch

from runs import Tensors, same_bits, step, weights
from sparsecast import LogError, ManifestMismatch, Patch, UnsupportedTensor, apply, digest
from sparsecast.pipeline.core.events import Sealed
from sparsecast.workers import kept as kept_module
from sparsecast.workers import outgoing as module
from sparsecast.workers.choice import Choice
from sparsecast.workers.outgoing import PENDING, Outgoing


def _outgoing(tensors: Tensors) -> Outgoing:
    return Outgoing(Choice(tensors), clock=lambda: 1.0)


def _publish(outgoing: Outgoing, trained: Tensors, times: int) -> None:
    for _ in range(times):
        step(trained, outgoing.version)
        outgoing.publish(outgoing.version + 1, None)


def _apply(payload: torch.Tensor | None, tensors: Tensors) -> None:
    assert payload is not None
    apply(Patch.from_buffer(payload), tensors)


def test_pending_patches_are_taken_as_one() -> None:
    """Three publishes, one patch: from the first base to the newest version, digest and step."""
    trained, mine = weights(), weights()
    outgoing = _outgoing(trained)
    _publish(outgoing, trained, 3)
    sealed = outgoing.take(())
    assert sealed is not None
    assert (sealed.base_version, sealed.version, sealed.step) == (0, 3, 3)
    assert sealed.digest == digest(trained)
    assert outgoing.take(()) is None
    _apply(outgoing.payload(3), mine)
    assert same_bits(trained, mine)


def test_who_takes_while_a_patch_is_made_gets_it() -> None:
    """take() is asked for as soon as publish() says that it has begun: it waits for the patch."""
    trained = weights()
    outgoing = _outgoing(trained)
    taken: list[Sealed | None] = []
    taker = threading.Thread(target=lambda: taken.append(outgoing.take(())))

    def begun() -> None:
        taker.start()
        taker.join(0.05)
        assert taker.is_alive()

    outgoing.publish(None, None, begun)
    taker.join(5.0)
    assert [sealed and sealed.version for sealed in taken] == [1]


def test_who_takes_while_a_publish_fails_gets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has begun and comes to nothing: nobody waits on, and the next one makes the version. What
    is refused has not even begun."""
    trained = weights()
    outgoing = _outgoing(trained)
    taken: list[Sealed | None] = []
    taker = threading.Thread(target=lambda: taken.append(outgoing.take(())))
    lost = trained.popitem()
    with pytest.raises(ManifestMismatch):
        outgoing.publish(None, None, taker.start)
    assert taker.ident is None
    trained.update([lost])

    def fails(*args: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(module.Shadow, "_diff_torch", fails)
        with pytest.raises(MemoryError):
            outgoing.publish(None, None, taker.start)
    taker.join(5.0)
    assert taken == [None]
    assert outgoing.publish(None, None).version == 1


def test_unsafe_versions_travel_again() -> None:
    """Version 1 was announced and nobody has it: the patch of version 2 goes back to 0."""
    trained, mine = weights(), weights()
    outgoing = _outgoing(trained)
    for _ in range(2):
        _publish(outgoing, trained, 1)
        sealed = outgoing.take((1,))
    assert sealed is not None
    assert (sealed.base_version, sealed.version) == (0, 2)
    assert outgoing.payload(1) is None
    _apply(outgoing.payload(2), mine)
    assert same_bits(trained, mine)


def test_a_bus_that_is_away_costs_memory_for_a_few_patches() -> None:
    """Fifty publishes and no round: never more than a handful wait, and none is lost."""
    trained, mine = weights(), weights()
    outgoing = _outgoing(trained)
    for _ in range(50):
        _publish(outgoing, trained, 1)
        assert len(outgoing._pending) < PENDING
    sealed = outgoing.take(())
    assert sealed is not None
    assert (sealed.base_version, sealed.version) == (0, 50)
    _apply(outgoing.payload(50), mine)
    assert same_bits(trained, mine)


def test_a_merge_that_fails_loses_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """No memory to merge what waits: publish() goes on, and the next merge brings everything."""
    trained, mine = weights(), weights()
    outgoing = _outgoing(trained)
    merge, failures = kept_module.merge, []

    def failing(patches: list[Patch]) -> Patch:
        if not failures:
            failures.append(1)
            raise MemoryError("no room")
        return merge(patches)

    monkeypatch.setattr(kept_module, "merge", failing)
    _publish(outgoing, trained, PENDING + 2)
    assert failures
    sealed = outgoing.take(())
    assert sealed is not None
    assert (sealed.base_version, sealed.version) == (0, PENDING + 2)
    _apply(outgoing.payload(sealed.version), mine)
    assert same_bits(trained, mine)


def test_a_publish_that_fails_leaves_no_version() -> None:
    """A tensor without data: nothing is pending, and the next publish is the first."""
    trained = weights()
    outgoing = _outgoing(trained)
    whole = trained["embed"]
    trained["embed"] = whole.to("meta")
    with pytest.raises(UnsupportedTensor, match="embed"):
        outgoing.publish(None, None)
    assert outgoing.version == 0
    assert outgoing.take(()) is None
    trained["embed"] = whole
    assert outgoing.publish(None, None).version == 1


def test_a_log_entry_of_several_versions_keeps_them_as_one() -> None:
    """Stored together, kept under the last; released when the log has them, refused afterwards."""
    trained, mine = weights(), weights()
    outgoing = _outgoing(trained)
    for _ in range(2):
        _publish(outgoing, trained, 1)
        outgoing.take(())
    entry, patch = outgoing.entry((1, 2), 7)
    assert (entry.epoch, entry.base_version, entry.version) == (7, 0, 2)
    assert entry.digest == digest(trained)
    assert outgoing.payload(1) is None
    apply(patch, mine)
    assert same_bits(trained, mine)
    again, _ = outgoing.entry((2,), 7)
    assert again == entry
    outgoing.release(2)
    with pytest.raises(LogError, match="not kept"):
        outgoing.entry((2,), 7)


def test_beginning_anew_drops_what_the_anchor_holds() -> None:
    """The run is claimed anew: what waited is in the shadow, and in the anchor of it."""
    trained, mine = weights(), weights(seed=5)
    outgoing = _outgoing(trained)
    _publish(outgoing, trained, 2)
    outgoing.take(())
    _publish(outgoing, trained, 1)
    assert outgoing.begin() == (3, digest(trained))
    assert outgoing.take(()) is None
    assert outgoing.payload(2) is None
    entry, anchor = outgoing.anchor(2)
    assert (entry.base_version, entry.version, entry.digest) == (None, 3, digest(trained))
    apply(anchor, mine)
    assert same_bits(trained, mine)
    assert outgoing.begin(9) == (9, digest(trained))


def test_waiting_until_it_is_taken() -> None:
    """wait_taken() returns when the round takes what is pending, or says that it did not."""
    trained = weights()
    outgoing = _outgoing(trained)
    assert outgoing.wait_taken(0.0)
    _publish(outgoing, trained, 1)
    assert not outgoing.wait_taken(0.0)
    taker = threading.Timer(0.05, outgoing.take, ((),))
    taker.start()
    assert outgoing.wait_taken(5.0)
    taker.join()
