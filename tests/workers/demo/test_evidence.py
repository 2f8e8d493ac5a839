"""The proof of a demo: what counts as proven, and what is said when something is wanting."""

from sparsecast.messages import control as msg
from sparsecast.messages.control import Sender, Stamp
from sparsecast.messages.manifest import Manifest
from sparsecast.workers.demo.evidence import Evidence, WorkerOutcome

TRAINER = Sender("trainer", "t")


def evidence(*digests: int) -> Evidence:
    """Versions 0, 1, … announced with these digests."""
    found = Evidence()
    found.hear(
        msg.Claim(
            sender=TRAINER, epoch=1, version=0, digest=digests[0],
            manifest=Manifest(tensors=()), nonce="n", heartbeat_s=0.5,
        ),
        0.0,
    )  # fmt: skip
    for version, digest in enumerate(digests[1:], 1):
        found.hear(
            msg.Announce(
                sender=TRAINER, stamp=Stamp(1, 1, 1, version), base_version=version - 1,
                manifest_hash="", nbytes=1, checksum=1, digest=digest, changed=1,
                encoding="sparse", dense_nbytes=2,
            ),
            0.0,
        )  # fmt: skip
    return found


def apply(found: Evidence, name: str, version: int) -> None:
    """A worker applied."""
    found.hear(msg.Applied(sender=Sender(name, "a"), epoch=1, version=version), 0.0)


def verify(found: Evidence, name: str, version: int, digest: int, *, ok: bool = True) -> None:
    """A worker digested."""
    found.hear(
        msg.Verified(sender=Sender(name, "a"), epoch=1, version=version, digest=digest, ok=ok), 0.0
    )


def test_all_applied_and_verified_with_the_announced_digest_is_proven() -> None:
    """Two workers, one of which skipped a version by a merged patch: nothing is wanting."""
    found = evidence(10, 11, 12)
    for name, versions in (("w0", (1, 2)), ("w1", (2,))):
        for version in versions:
            apply(found, name, version)
            verify(found, name, version, 10 + version)
    assert found.missing(["w0", "w1"], 2) == []
    assert found.outcome("w0") == WorkerOutcome(applied=2, verified=2, mismatches=0, version=2)
    assert found.outcome("w1") == WorkerOutcome(applied=1, verified=1, mismatches=0, version=2)


def test_a_digest_that_is_not_the_announced_one_is_a_mismatch_even_if_called_ok() -> None:
    """The worker says ok, the digest says otherwise: the announcement is what counts."""
    found = evidence(10, 11)
    apply(found, "w0", 1)
    verify(found, "w0", 1, 99)
    assert found.outcome("w0").mismatches == 1
    assert "w0 held other bits than announced at version 1" in found.missing(["w0"], 1)


def test_a_mismatch_that_was_healed_still_counts() -> None:
    """A worker found a wrong digest, resynced and verified: the demo is not proven."""
    found = evidence(10, 11)
    apply(found, "w0", 1)
    verify(found, "w0", 1, 99, ok=False)
    verify(found, "w0", 1, 11)
    assert found.outcome("w0") == WorkerOutcome(applied=1, verified=1, mismatches=1, version=1)
    assert len(found.missing(["w0"], 1)) == 1


def test_what_was_applied_and_not_verified_is_wanting() -> None:
    """A version in the middle was never digested."""
    found = evidence(10, 11, 12)
    apply(found, "w0", 1)
    apply(found, "w0", 2)
    verify(found, "w0", 2, 12)
    assert found.missing(["w0"], 2) == ["w0 applied version 1 and did not verify it"]


def test_a_worker_that_stopped_short_or_never_spoke_is_wanting() -> None:
    """One worker is a version behind, the other was never heard."""
    found = evidence(10, 11, 12)
    apply(found, "w0", 1)
    verify(found, "w0", 1, 11)
    assert found.missing(["w0", "w1"], 2) == [
        "w0 has verified version 1, not 2",
        "w1 has verified version None, not 2",
    ]
