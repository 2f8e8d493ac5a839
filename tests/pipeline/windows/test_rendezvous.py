"""How ranks meet over the bus: questions, answers, and what is neither."""

import asyncio
import gc
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsecast.messages.errors import WindowAborted, WindowError, WindowTimeout
from sparsecast.pipeline.bus.broker import Broker
from sparsecast.pipeline.bus.nats import NatsBus
from sparsecast.pipeline.windows import WindowSpec
from sparsecast.pipeline.windows.lifecycle import Deadline
from sparsecast.pipeline.windows.rendezvous import Rendezvous
from sparsecast.pipeline.windows.store import BusStore

Connect = Callable[..., Awaitable[NatsBus]]


def _spec(run: str, rank: int, size: int = 3) -> WindowSpec:
    return WindowSpec("gloo", f"sparsecast.{run}.window.1.1", 1, 1, rank, size)


async def _started(run: str, bus: NatsBus, size: int) -> list[Rendezvous]:
    ends = [Rendezvous(_spec(run, rank, size), bus) for rank in range(size)]
    for end in ends:
        await end.start()
    return ends


async def test_all_meet_and_share_a_dictionary(bus: NatsBus, run: str) -> None:
    """Three ranks learn each other's addresses; what one puts, the others get when they want it."""
    ends = await _started(run, bus, 3)
    met = await asyncio.gather(
        *(end.meet(f"10.0.0.{rank}", Deadline(5)) for rank, end in enumerate(ends))
    )
    assert met == [("10.0.0.0", "10.0.0.1", "10.0.0.2")] * 3
    wanting = asyncio.ensure_future(ends[2].want(["a", "b"], Deadline(5)))
    await ends[1].put({"a": b"1"}, Deadline(5))
    await asyncio.sleep(0.05)
    assert not wanting.done()
    await ends[0].put({"b": b"\0"}, Deadline(5))
    assert await wanting == {"a": b"1", "b": b"\0"}
    await ends[0].stop("done")


async def test_the_reason_names_the_absent_ranks(bus: NatsBus, run: str) -> None:
    """Rank 1 never comes: rank 0 says who is missing, and tells it those who wait."""
    ends = await _started(run, bus, 3)
    waiting = asyncio.ensure_future(ends[2].meet("b", Deadline(20)))
    with pytest.raises(WindowTimeout, match=r"2/3 ranks met, ranks \[1\] did not come within 0.3"):
        await ends[0].meet("a", Deadline(0.3))
    await ends[0].stop("the window was aborted")
    with pytest.raises(WindowError, match="rank 0 says: the window was aborted"):
        await waiting


async def test_nobody_answers(bus: NatsBus, run: str) -> None:
    """Rank 0 is not there at all: a timeout at the deadline that says so."""
    started = time.monotonic()
    with pytest.raises(WindowTimeout, match="nobody listens"):
        await Rendezvous(_spec(run, 1), bus).meet("a", Deadline(0.3))
    assert 0.25 < time.monotonic() - started < 3


async def test_strangers_and_doubles_are_refused(bus: NatsBus, run: str) -> None:
    """A rank that the window does not have, and a second process that claims a rank: refused."""
    ends = await _started(run, bus, 2)
    with pytest.raises(WindowError, match="there is no rank 5 of 2"):
        await Rendezvous(_spec(run, 5, 6), bus).meet("x", Deadline(5))
    first = asyncio.ensure_future(ends[1].meet("a", Deadline(5)))
    await asyncio.sleep(0.05)
    with pytest.raises(WindowError, match="joined twice"):
        await Rendezvous(_spec(run, 1, 2), bus).meet("b", Deadline(5))
    assert await ends[0].meet("r", Deadline(5)) == ("r", "a")
    assert await first == ("r", "a")
    await ends[0].stop("done")


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    data=st.binary(max_size=200)
    | st.builds(
        msgspec.msgpack.encode,
        st.recursive(
            st.none() | st.integers(-9, 9) | st.text(max_size=8),
            lambda inner: st.dictionaries(
                st.sampled_from(["type", "rank", "keys", "entries"]), inner
            ),
        ),
    )
)
def test_garbage_is_answered_with_an_error(data: bytes, run: str) -> None:
    """Whatever comes as a question, rank 0 answers that it is none, and keeps its dictionary."""
    answers: list[bytes] = []

    class Courier:
        async def publish(self, subject: str, data: bytes, *, reply: str = "") -> None:
            answers.append(data)

    class Message:
        subject, reply = "s", "r"

        def __init__(self, data: bytes) -> None:
            self.data = data

    async def ask() -> None:
        end = Rendezvous(_spec(run, 0), Courier())  # type: ignore[arg-type]
        end._heard(Message(data))
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    asyncio.run(ask())
    (answer,) = answers
    assert msgspec.msgpack.decode(answer)["type"] == "failed"


async def test_an_undecodable_answer_is_an_error(bus: NatsBus, run: str) -> None:
    """Someone else answers on the window's subject: an error, not a crash of the decoder."""
    spec = _spec(run, 1)

    def answer(message: Any) -> None:
        asyncio.ensure_future(bus.publish(message.reply, b"\xc1 what?"))  # noqa: RUF006 - the connection outlives it

    subscription = await bus.subscribe(f"{spec.prefix}.store", answer)
    with pytest.raises(WindowError, match="undecodable answer"):
        await Rendezvous(spec, bus).meet("a", Deadline(5))
    await subscription.unsubscribe()


async def test_a_lost_answer_is_asked_for_again(bus: NatsBus, run: str) -> None:
    """The first answer never comes: the question is repeated within about a second."""
    spec = _spec(run, 1)
    heard = 0

    def answer(message: Any) -> None:
        nonlocal heard
        heard += 1
        if heard > 1:
            met = msgspec.msgpack.encode({"type": "met", "addresses": ["a", "b", "c"]})
            asyncio.ensure_future(bus.publish(message.reply, met))  # noqa: RUF006 - the connection outlives it

    subscription = await bus.subscribe(f"{spec.prefix}.store", answer)
    assert await Rendezvous(spec, bus).meet("b", Deadline(10)) == ("a", "b", "c")
    assert heard == 2
    await subscription.unsubscribe()


async def test_a_store_blocks_its_thread_and_not_the_loop(
    broker: Broker, connected: Connect, run: str
) -> None:
    """A collective's thread waits in get() until another rank sets the key."""
    ends = await _started(run, await connected(broker.url), 2)
    loop = asyncio.get_running_loop()
    stores = [BusStore(end, Deadline(5), loop, lambda key, value: {}) for end in ends]
    getting = asyncio.ensure_future(asyncio.to_thread(stores[1].get, "key"))
    await asyncio.sleep(0.1)
    assert not getting.done()
    await asyncio.to_thread(stores[0].set, "key", b"value")
    assert await getting == b"value"
    await ends[0].stop("done")


@pytest.mark.parametrize("rank", [0, 1])
async def test_abort_wakes_a_blocked_store(bus: NatsBus, run: str, rank: int) -> None:
    """A collective's thread waits for a key that nobody sets: abort() ends it, and later calls."""
    ends = await _started(run, bus, 2)
    store = BusStore(ends[rank], Deadline(30), asyncio.get_running_loop(), lambda k, v: {})
    ended = threading.Event()
    errors: list[BaseException] = []

    def want() -> None:
        for _ in range(2):
            try:
                store.get("never")
            except WindowAborted as exc:
                errors.append(exc)
        ended.set()

    threading.Thread(target=want, daemon=True).start()
    await asyncio.sleep(0.2)
    assert not errors
    store.abort()
    assert await asyncio.to_thread(ended.wait, 5)
    assert len(errors) == 2
    await ends[0].stop("done")


async def test_an_error_amid_an_abort_is_not_complained_of() -> None:
    """abort() cancels a call that waits for other ranks, and it ends with an error all the same:
    the blocked thread gets WindowAborted, and asyncio has no error that nobody collected."""
    complaints: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: complaints.append(context))

    class Failing:
        label = "gloo:1.1"

        async def want(self, keys: list[str], deadline: Deadline) -> dict[str, bytes]:
            loop.call_soon(store.abort)
            try:
                await asyncio.sleep(20)
            except asyncio.CancelledError:
                raise WindowError(self.label, "rank 0 says: the window was aborted") from None
            return {}

    store = BusStore(Failing(), Deadline(5), loop, lambda k, v: {})  # type: ignore[arg-type]
    # No name for the call or its error: they would keep the task, which complains when it goes.
    with pytest.raises(WindowAborted):
        await asyncio.to_thread(store.get, "key")
    await asyncio.sleep(0.05)
    gc.collect()
    assert complaints == []
