"""Which versions can be made again, when trainers died before their own anchors were stored."""

import itertools
from typing import Any

from logs import manifest
from sparsecast.messages.control import Claim, LogEntry, Sender
from sparsecast.pipeline.log.lineage import remakeable

MODEL = manifest(100)


def claim(epoch: int, version: int, digest: int) -> Claim:
    """A claim of trainer "t<epoch>"."""
    return Claim(
        sender=Sender("trainer", f"t{epoch}"), epoch=epoch, version=version, digest=digest,
        manifest=MODEL, nonce="", heartbeat_s=1.0,
    )  # fmt: skip


def stored(epoch: int, base: int | None, version: int, digest: int, **facts: Any) -> LogEntry:
    """An entry of trainer "t<epoch>"; an anchor has 1000 bytes, a patch 10."""
    return LogEntry(
        name=f"{epoch}-{base}-{version}", epoch=epoch, base_version=base, version=version,
        nbytes=1000 if base is None else 10, checksum=0, digest=digest, manifest_hash=MODEL.hash,
        chunks=1, **{"writer": f"t{epoch}"} | facts,
    )  # fmt: skip


def ways(*given: Any) -> dict[int, list[str]]:
    """What leads to each version, by the names of the entries."""
    return {version: [e.name for e in step.way] for version, step in remakeable(*given).items()}


def test_an_epoch_by_itself() -> None:
    """An anchor and what follows it, up to what was announced: an anchor may be ahead of that."""
    entries = [stored(1, None, 0, 90), stored(1, 0, 1, 91), stored(1, 1, 2, 92)]
    entries.append(stored(1, None, 4, 94))
    assert ways(entries, [claim(1, 0, 90)], 3) == {
        0: ["1-None-0"],
        1: ["1-None-0", "1-0-1"],
        2: ["1-None-0", "1-0-1", "1-1-2"],
    }


def test_the_fewest_bytes() -> None:
    """A merged patch is taken in place of two; an anchor only where patches do not lead."""
    entries = [stored(1, None, 0, 90), stored(1, 0, 1, 91), stored(1, 1, 2, 92)]
    entries += [stored(1, 0, 2, 92), stored(1, None, 2, 92), stored(1, 7, 8, 98)]
    assert ways(entries, [claim(1, 0, 90)], 8)[2] == ["1-None-2"]
    entries = entries[:4]
    assert ways(entries, [claim(1, 0, 90)], 8)[2] == ["1-None-0", "1-0-2"]
    assert 8 not in ways([*entries, stored(1, 7, 8, 98)], [claim(1, 0, 90)], 8)


def test_a_claim_goes_on_from_an_earlier_epoch() -> None:
    """Two trainers in a row died before their anchors were stored: the first one's leads to all."""
    entries = [stored(1, None, 0, 90), stored(1, 0, 1, 91), stored(2, 3, 4, 94)]
    entries.append(stored(3, 5, 6, 96))
    claims = [claim(1, 0, 90), claim(2, 3, 91), claim(3, 5, 94)]
    first = ["1-None-0", "1-0-1"]
    assert ways(entries, claims, 6) == {
        0: first[:1],
        1: first,
        3: first,
        4: [*first, "2-3-4"],
        5: [*first, "2-3-4"],
        6: [*first, "2-3-4", "3-5-6"],
    }


def test_weights_of_their_own_lead_nowhere_else() -> None:
    """The second claim's weights were never stored: what goes on from them cannot be made again,
    what was before them can."""
    entries = [stored(1, None, 0, 90), stored(2, 1, 2, 92)]
    assert ways(entries, [claim(1, 0, 90), claim(2, 1, 91)], 2) == {0: ["1-None-0"]}


def test_strangers_do_not_count() -> None:
    """Entries of a trainer that claimed the same epoch in a journal that was forgotten."""
    entries = [stored(1, None, 0, 90, writer="rival"), stored(1, 0, 1, 91)]
    assert ways(entries, [claim(1, 0, 90)], 1) == {}


def test_many_restarts_cost_little() -> None:
    """A trainer that dies again and again, in sixty epochs with the same contents."""
    entries = [stored(1, None, 0, 90)]
    entries += [stored(n, 2 * n, 2 * n + 1, 90) for n in range(2, 60)]
    claims = [claim(1, 0, 90), *(claim(n, 2 * n, 90) for n in range(2, 60))]
    assert len(ways(entries, claims, 119)) == 1 + 58 * 2
    assert ways([], list(itertools.islice(claims, 60)), 119) == {}
