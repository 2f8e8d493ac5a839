"""The journal of a run: one writer, every reader hears everything once and in order."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from servers import Proxy, until
from sparsecast.messages import codec
from sparsecast.messages.control import Announce, Beat, Claim, Sender, Stamp
from sparsecast.messages.errors import (
    BusUnavailable,
    RemoteProtocolError,
    SequenceConflict,
    StreamMissing,
)
from sparsecast.messages.manifest import Manifest, TensorSpec
from sparsecast.messages.subjects import Subjects
from sparsecast.pipeline.bus import journal
from sparsecast.pipeline.bus.base import Handler, Message, Subscription
from sparsecast.pipeline.bus.broker import Broker
from sparsecast.pipeline.bus.journal import Journal
from sparsecast.pipeline.bus.nats import NatsBus

Connect = Callable[..., Awaitable[NatsBus]]
Heard = list[tuple[str, int, int]]
S = 5.0
MANIFEST = Manifest(tensors=(TensorSpec("w", "bfloat16", (2, 3)),))


def claim(epoch: int, version: int = 0, who: str = "one") -> Claim:
    """A trainer's claim."""
    return Claim(
        sender=Sender("trainer", who),
        epoch=epoch,
        version=version,
        digest=0,
        manifest=MANIFEST,
        nonce="n",
        heartbeat_s=1.0,
    )


def announce(version: int, epoch: int = 1, who: str = "one") -> Announce:
    """A trainer's announcement."""
    return Announce(
        sender=Sender("trainer", who),
        stamp=Stamp(epoch, 1, 1, version),
        base_version=version - 1,
        manifest_hash=MANIFEST.hash,
        nbytes=1,
        checksum=2,
        digest=3,
        changed=4,
        encoding="sparse",
        dense_nbytes=5,
    )


class Writer:
    """A trainer that keeps its place in the journal."""

    def __init__(self, bus: NatsBus, run: str, who: str = "one") -> None:
        self.journal = Journal(bus, run)
        self.who = who
        self.sequence = 0

    async def open(self) -> None:
        self.sequence = (await self.journal.open(S)).last_sequence

    async def claim(self, epoch: int, version: int = 0) -> None:
        await self._append(claim(epoch, version, self.who), f"{self.who}-{epoch}")

    async def announce(self, version: int, epoch: int = 1) -> None:
        message = announce(version, epoch, self.who)
        await self._append(message, f"{self.who}-{epoch}-{version}")

    async def _append(self, message: Claim | Announce, message_id: str) -> None:
        self.sequence = await self.journal.append(
            message, message_id=message_id, expected_sequence=self.sequence, timeout_s=S
        )


@pytest.fixture
async def writer(bus: NatsBus, run: str) -> Writer:
    """A trainer that has claimed the run: one message is in the journal."""
    writer = Writer(bus, run)
    await writer.open()
    await writer.claim(1)
    return writer


def note(heard: Heard) -> Callable[[Claim | Announce, int], None]:
    """A handler that writes down kind, version and sequence."""

    def handler(message: Claim | Announce, sequence: int) -> None:
        heard.append((type(message).__name__, message.version, sequence))

    return handler


class Lossy:
    """A bus that loses what it is told to: everything else is the real one's."""

    def __init__(self, bus: NatsBus) -> None:
        self._bus = bus
        self.lose: Callable[[Message], bool] = lambda _message: False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bus, name)

    async def subscribe(self, subject: str, handler: Handler, **options: Any) -> Subscription:
        def lossy(message: Message) -> None:
            if not self.lose(message):
                handler(message)

        return await self._bus.subscribe(subject, lossy, **options)


# ---- writing


async def test_a_trainer_finds_what_its_predecessor_left(bus: NatsBus, run: str) -> None:
    """The first trainer makes the journal; the second finds its nonce, claim, last announcement
    and the sequence at which to append."""
    first = await Journal(bus, run).open(S)
    assert (first.created, first.last_sequence, first.claim, first.announce) == (
        True, 0, None, None,
    )  # fmt: skip
    writer = Writer(bus, run)
    await writer.claim(1)
    for version in (1, 2, 3):
        await writer.announce(version)
    second = await Journal(bus, run).open(S)
    assert not second.created
    assert second.nonce == first.nonce != ""
    assert second.last_sequence == 4
    assert (second.claim, second.announce) == (claim(1), announce(3))


async def test_a_claim_outlasts_its_announcements(
    bus: NatsBus, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long run: old announcements fall out of the journal. A successor and a new member find the
    claim all the same, and the newest announcement."""
    monkeypatch.setattr(journal, "KEPT", 4)
    writer = Writer(bus, run)
    await writer.open()
    await writer.claim(1)
    for version in range(1, 8):
        await writer.announce(version)
    state = await Journal(bus, run).open(S)
    assert (state.claim, state.announce, state.last_sequence) == (claim(1), announce(7), 8)
    assert await bus.get(Subjects(run).journal_stream, 2, timeout_s=S) is None
    heard: Heard = []
    following = await Journal(bus, run).follow(note(heard))
    assert heard == [("Claim", 0, 1), ("Announce", 7, 8)]
    await following.unsubscribe()


async def test_a_stale_trainer_is_fenced_off(
    bus: NatsBus, broker: Broker, connected: Connect, writer: Writer, run: str
) -> None:
    """A successor claims the run; whatever the old trainer appends is refused, also when it says
    again what it has said before; members hear the successor alone."""
    heard: Heard = []
    following = await Journal(bus, run).follow(note(heard))
    await writer.announce(1)
    successor = Writer(await connected(broker.url), run, "two")
    await successor.open()
    await successor.claim(2, 2)
    with pytest.raises(SequenceConflict):
        await writer.announce(2)
    stale = writer.sequence
    await successor.announce(3, 2)
    with pytest.raises(SequenceConflict):
        await writer.announce(2)
    assert writer.sequence == stale
    await until(lambda: len(heard) == 4)
    assert heard == [("Claim", 0, 1), ("Announce", 1, 2), ("Claim", 2, 3), ("Announce", 3, 4)]
    await following.unsubscribe()


async def test_finding_ones_own_message_is_success(bus: NatsBus, writer: Writer, run: str) -> None:
    """The acknowledgement was lost, and so was the server's memory of message ids: the message
    that stands there is ours, so appending it again succeeds with its sequence."""
    expected = writer.sequence
    await writer.announce(1)
    for message_id in ("one-1-1", "an id that the server has never seen"):
        sequence = await writer.journal.append(
            announce(1), message_id=message_id, expected_sequence=expected, timeout_s=S
        )
        assert sequence == expected + 1
    with pytest.raises(SequenceConflict):
        await writer.journal.append(
            announce(1, who="two"), message_id="two", expected_sequence=expected, timeout_s=S
        )


async def test_a_journal_that_is_gone_is_missing(bus: NatsBus, writer: Writer, run: str) -> None:
    """The bus has forgotten the run: the trainer hears StreamMissing, and opens anew with another
    nonce."""
    before = await writer.journal.open(S)
    await bus.delete_stream(Subjects(run).journal_stream, timeout_s=S)
    with pytest.raises(StreamMissing):
        await writer.announce(1)
    after = await writer.journal.open(S)
    assert after.created
    assert after.nonce != before.nonce
    assert (after.last_sequence, after.claim) == (0, None)


async def test_a_trainer_reads_all_claims(bus: NatsBus, writer: Writer, run: str) -> None:
    """Three trainers had the run, and somebody wrote nonsense between: each claim, in order. The
    head is what was claimed or announced last, whatever an older epoch announced."""
    await writer.announce(1)
    subjects = Subjects(run)
    await bus.append(subjects.journal_stream, subjects.announce_claim, b"nonsense", timeout_s=S)
    for epoch, who in ((2, "two"), (3, "three")):
        other = Writer(bus, run, who)
        await other.open()
        await other.claim(epoch, 2 * epoch)
        assert (await other.journal.open(S)).head == 2 * epoch
    await other.announce(7, epoch=3)
    assert (await other.journal.open(S)).head == 7
    claims = await writer.journal.claims(S)
    assert [(one.epoch, one.sender.incarnation) for one in claims] == [
        (1, "one"),
        (2, "two"),
        (3, "three"),
    ]


async def test_garbage_in_the_journal_does_not_stop_a_trainer(
    bus: NatsBus, writer: Writer, run: str
) -> None:
    """Somebody wrote nonsense as the newest claim: the trainer takes the newest that is one."""
    subjects = Subjects(run)
    for data in (b"\xff nonsense", codec.encode(announce(9))):
        await bus.append(subjects.journal_stream, subjects.announce_claim, data, timeout_s=S)
    state = await writer.journal.open(S)
    assert state.claim == claim(1)
    assert state.last_sequence == 3
    assert await writer.journal.claim(S) == claim(1)


async def test_who_only_looks_makes_no_journal(bus: NatsBus, run: str) -> None:
    """A run that never was: its newest claim is asked for twice, and there is no journal either
    time."""
    for _ in range(2):
        with pytest.raises(StreamMissing):
            await Journal(bus, run).claim(S)


# ---- following


async def test_a_late_member_hears_the_claim_and_the_newest_announcement(
    bus: NatsBus, writer: Writer, run: str
) -> None:
    """A member comes in mid-run: the claim, the newest announcement, then all that follows."""
    for version in range(1, 6):
        await writer.announce(version)
    heard: Heard = []
    following = await Journal(bus, run).follow(note(heard))
    assert heard == [("Claim", 0, 1), ("Announce", 5, 6)]
    await writer.announce(6)
    await writer.announce(7)
    await until(lambda: len(heard) == 4)
    assert heard[2:] == [("Announce", 6, 7), ("Announce", 7, 8)]
    await following.unsubscribe()
    await writer.announce(8)
    await asyncio.sleep(0.05)
    assert len(heard) == 4


async def test_an_announcement_of_an_older_epoch_is_not_news(
    bus: NatsBus, writer: Writer, run: str
) -> None:
    """The newest message is a successor's claim: what was announced before it is not delivered."""
    await writer.announce(1)
    await writer.claim(2, 5)
    heard: Heard = []
    following = await Journal(bus, run).follow(note(heard))
    assert heard == [("Claim", 5, 3)]
    await following.unsubscribe()


async def test_a_member_may_come_before_the_trainer(bus: NatsBus, run: str) -> None:
    """There is no journal yet; the trainer comes later and is heard at once."""
    heard: Heard = []
    following = await Journal(bus, run).follow(note(heard), missing_poll_s=30.0)
    writer = Writer(bus, run)
    await writer.open()
    await writer.claim(1)
    await writer.announce(1)
    await until(lambda: len(heard) == 2, 2.0)
    assert heard == [("Claim", 0, 1), ("Announce", 1, 2)]
    await following.unsubscribe()


async def test_a_claim_that_was_not_heard_is_found_by_looking(bus: NatsBus, run: str) -> None:
    """The republished claim is lost on its way to a member that knows of no journal: it looks for
    one now and then, and finds it."""
    heard: Heard = []
    lossy = Lossy(bus)
    lossy.lose = lambda _message: True
    following = await Journal(lossy, run).follow(note(heard), missing_poll_s=0.1)
    writer = Writer(bus, run)
    await writer.open()
    await writer.claim(1)
    await until(lambda: heard == [("Claim", 0, 1)], 2.0)
    await following.unsubscribe()


async def test_a_gap_is_filled_before_what_follows(bus: NatsBus, writer: Writer, run: str) -> None:
    """Three announcements are lost on the way; the next one shows the gap: the lost ones are read
    from the stream and come first, in order, and the gap is told."""
    heard: Heard = []
    gaps: list[tuple[int, int]] = []
    lossy = Lossy(bus)
    following = await Journal(lossy, run).follow(
        note(heard), on_gap=lambda first, last: gaps.append((first, last)), silent_poll_s=60.0
    )
    await writer.announce(1)
    lossy.lose = lambda message: message.sequence in (3, 4, 5)
    for version in range(2, 6):
        await writer.announce(version)
    await until(lambda: len(heard) == 6)
    assert [sequence for _, _, sequence in heard] == [1, 2, 3, 4, 5, 6]
    assert [version for _, version, _ in heard] == [0, 1, 2, 3, 4, 5]
    assert gaps == [(3, 6)]
    await following.unsubscribe()


async def test_a_lost_last_word_is_found_by_looking(bus: NatsBus, writer: Writer, run: str) -> None:
    """The last announcement before a long silence is lost: no later message shows the gap, but a
    look at the stream does."""
    heard: Heard = []
    lossy = Lossy(bus)
    following = await Journal(lossy, run).follow(note(heard), silent_poll_s=0.1)
    lossy.lose = lambda _message: True
    await writer.announce(1)
    await until(lambda: heard[-1:] == [("Announce", 1, 2)], 2.0)
    await following.unsubscribe()


async def test_what_comes_twice_is_heard_once(bus: NatsBus, writer: Writer, run: str) -> None:
    """Republished messages are repeated, late and in disorder: each is delivered once."""
    heard: Heard = []
    copies: list[tuple[Handler, Message]] = []

    class Echo(Lossy):
        async def subscribe(self, subject: str, handler: Handler, **options: Any) -> Subscription:
            def twice(message: Message) -> None:
                copies.append((handler, message))
                handler(message)
                for earlier, old in copies[::-1]:
                    earlier(old)

            return await self._bus.subscribe(subject, twice, **options)

    following = await Journal(Echo(bus), run).follow(note(heard))
    for version in range(1, 20):
        await writer.announce(version)
    await until(lambda: len(heard) == 20)
    await asyncio.sleep(0.1)
    assert [sequence for _, _, sequence in heard] == list(range(1, 21))
    await following.unsubscribe()


async def test_what_was_said_during_an_outage_is_caught_up(
    bus: NatsBus, broker: Broker, connected: Connect, writer: Writer, run: str
) -> None:
    """A member's line is down while the trainer goes on: after the reconnection it hears all of
    it, in order, without waiting for the next announcement."""
    async with Proxy(broker.url) as proxy:
        member = await connected(proxy.url)
        heard: Heard = []
        following = await Journal(member, run).follow(note(heard), silent_poll_s=60.0)
        await writer.announce(1)
        await until(lambda: len(heard) == 2)
        proxy.cut(refuse=True)
        await until(lambda: not member.connected)
        await writer.announce(2)
        await writer.claim(2, 5)
        await writer.announce(6, 2)
        proxy.accept()
        await until(lambda: len(heard) == 5)
        assert heard[2:] == [("Announce", 2, 3), ("Claim", 5, 4), ("Announce", 6, 5)]
        await following.unsubscribe()


async def test_a_journal_made_anew_is_heard_from_its_start(
    bus: NatsBus, writer: Writer, run: str
) -> None:
    """The stream is deleted and made again, with lower sequences: the member hears its claim and
    what follows, though it has seen those sequences before."""
    heard: Heard = []
    following = await Journal(bus, run).follow(note(heard), silent_poll_s=60.0)
    for version in (1, 2, 3):
        await writer.announce(version)
    await until(lambda: len(heard) == 4)
    await bus.delete_stream(Subjects(run).journal_stream, timeout_s=S)
    await writer.open()
    await writer.claim(2, 3)
    await until(lambda: len(heard) == 5)
    await writer.announce(4, 2)
    await writer.announce(5, 2)
    await until(lambda: len(heard) == 7)
    assert heard[4:] == [("Claim", 3, 1), ("Announce", 4, 2), ("Announce", 5, 3)]
    await following.unsubscribe()


@pytest.mark.parametrize("words", [1, 3, 6])
async def test_a_broker_that_forgot_while_the_member_was_away(
    tmp_path: Path, connected: Connect, words: int
) -> None:
    """The broker comes back without its store; before the member is connected again, the trainer
    has made the journal anew, with fewer, as many or more messages than the member had seen: the
    member hears the new claim and the newest announcement."""
    first = Broker(store_dir=tmp_path / "one")
    url = first.start()
    async with Proxy(url) as proxy:
        trainer, member = await connected(url), await connected(proxy.url)
        writer = Writer(trainer, "run")
        await writer.open()
        await writer.claim(1)
        heard: Heard = []
        following = await Journal(member, "run").follow(note(heard), silent_poll_s=60.0)
        await writer.announce(1)
        await writer.announce(2)
        await until(lambda: len(heard) == 3)
        proxy.cut(refuse=True)
        first.close()
        await until(lambda: not trainer.connected)
        second = Broker(port=int(url.rpartition(":")[2]), store_dir=tmp_path / "two")
        await asyncio.to_thread(second.start)
        try:
            with pytest.raises(StreamMissing):
                await writer.announce(3)
            await writer.open()
            await writer.claim(2, 2)
            for version in range(3, 2 + words):
                await writer.announce(version, 2)
            proxy.accept()
            expected = [("Claim", 2, 1)]
            if words > 1:
                expected.append(("Announce", 1 + words, words))
            await until(lambda: heard[3:] == expected)
            await writer.announce(50, 2)
            await until(lambda: heard[-1] == ("Announce", 50, words + 1))
            assert len(heard) == 3 + len(expected) + 1
        finally:
            await following.unsubscribe()
            await asyncio.gather(trainer.close(), member.close())
            second.close()


async def test_garbage_is_told_and_passed_over(bus: NatsBus, writer: Writer, run: str) -> None:
    """Nonsense, a message of another kind, and one that was published past the journal: each is
    told, none is delivered, and what follows is heard."""
    subjects = Subjects(run)
    heard: Heard = []
    told: list[tuple[str, int]] = []

    def garbage(error: RemoteProtocolError, sequence: int) -> None:
        told.append((error.reason.split(" ")[0], sequence))

    following = await Journal(bus, run).follow(note(heard), on_garbage=garbage)
    beat = codec.encode(Beat(sender=Sender("x", "y"), epoch=1, version=1))
    for data in (b"", b"\xc1", beat):
        await bus.append(subjects.journal_stream, subjects.announce_update, data, timeout_s=S)
    await bus.publish(subjects.announced_update, codec.encode(announce(99)))
    await until(lambda: len(told) == 4)
    writer.sequence = 4
    await writer.announce(1)
    await until(lambda: len(heard) == 2)
    assert heard[1] == ("Announce", 1, 5)
    assert sorted(told) == [("a", 4), ("published", 0), ("undecodable", 2), ("undecodable", 3)]
    await following.unsubscribe()


async def test_a_handler_that_fails_is_not_the_end(
    bus: NatsBus, writer: Writer, run: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The handler raises on one message: it is logged, and the next one is delivered."""
    heard: list[int] = []

    def handler(message: Claim | Announce, sequence: int) -> None:
        if sequence == 2:
            raise ValueError("cannot")
        heard.append(sequence)

    following = await Journal(bus, run).follow(handler)
    await writer.announce(1)
    await writer.announce(2)
    await until(lambda: heard == [1, 3])
    assert "failed on message 2" in caplog.text
    await following.unsubscribe()


async def test_following_a_bus_that_does_not_answer_fails_in_time(
    broker: Broker, connected: Connect, run: str
) -> None:
    """The server does not take the subscription: follow() says so at its deadline."""
    async with Proxy(broker.url) as proxy:
        member = await connected(proxy.url)
        proxy.stall()
        with pytest.raises(BusUnavailable):
            await Journal(member, run).follow(lambda _message, _sequence: None, timeout_s=0.3)
        proxy.flow()


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_whatever_is_lost_or_doubled_all_is_heard_in_order(
    broker: Broker, data: st.DataObject
) -> None:
    """Any messages are lost, doubled or late, in any pattern: every member hears the whole journal
    from its claim on, in order and once, as soon as one message gets through."""
    count = data.draw(st.integers(1, 8), "announcements")
    fates = data.draw(
        st.lists(
            st.sampled_from(["keep", "lose", "double", "late"]), min_size=count, max_size=count
        ),
        "fates",
    )
    number = data.draw(st.integers(0, 1 << 60), "run")

    async def scenario() -> None:
        from sparsecast.pipeline.bus.nats import connect

        bus = await connect(broker.url, name="t")
        run = f"fates-{number}"
        try:
            writer = Writer(bus, run)
            await writer.open()
            await writer.claim(1)
            heard: Heard = []
            late: list[tuple[Handler, Message]] = []

            class Fate(Lossy):
                async def subscribe(
                    self, subject: str, handler: Handler, **options: Any
                ) -> Subscription:
                    def decide(message: Message) -> None:
                        place = (message.sequence or 0) - 2
                        fate = fates[place] if place < count else "keep"
                        if fate == "late":
                            late.append((handler, message))
                            return
                        for _ in range({"keep": 1, "lose": 0, "double": 2}[fate]):
                            handler(message)
                        while late and place >= count:
                            again, old = late.pop()
                            again(old)

                    return await self._bus.subscribe(subject, decide, **options)

            following = await Journal(Fate(bus), run).follow(note(heard), silent_poll_s=60.0)
            for version in range(1, count + 2):
                await writer.announce(version)
            await until(lambda: len(heard) >= count + 2)
            await asyncio.sleep(0.01)
            assert heard == [
                ("Claim", 0, 1),
                *(("Announce", version, version + 1) for version in range(1, count + 2)),
            ]
            await following.unsubscribe()
            await bus.delete_stream(Subjects(run).journal_stream, timeout_s=S)
        finally:
            await bus.close()

    asyncio.run(scenario())
