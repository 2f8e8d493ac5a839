"""Every message survives its codec, and garbage is refused by name."""

from __future__ import annotations

import contextlib
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsecast.messages import codec, control, metrics, ranks, rollouts
from sparsecast.messages.errors import RemoteProtocolError
from sparsecast.messages.manifest import ITEMSIZE, Manifest, TensorSpec

CONTROL = get_args(control.TrainerMessage) + get_args(control.WorkerMessage)
METRICS = get_args(metrics.Metric)
RANKS = get_args(ranks.AnyRankMessage)
ROLLOUTS = get_args(rollouts.RolloutMessage)

DECODERS = {
    "control": codec.decode,
    "rank": codec.decode_rank,
    "rollout": codec.decode_rollout,
    "lease": codec.decode_lease,
    "entry": codec.decode_entry,
    "layout": codec.decode_layout,
    "metric": codec.decode_metric,
}

_text = st.text(max_size=12)
_specs = st.builds(
    TensorSpec,
    name=st.text(min_size=1, max_size=8),
    dtype=st.sampled_from(sorted(ITEMSIZE)),
    shape=st.lists(st.integers(0, 9), max_size=3).map(tuple),
)
_manifests = st.lists(_specs, max_size=4, unique_by=lambda spec: spec.name).map(
    lambda specs: Manifest(tensors=tuple(specs))
)
_u64 = st.integers(0, 2**64 - 1)


def _of(kind: type[Any]) -> st.SearchStrategy[Any]:
    """Any value of a Struct, field by field."""
    fields = {}
    for field in msgspec.structs.fields(kind):
        if field.name in ("digest", "checksum"):
            fields[field.name] = _u64
        elif field.name == "details":
            fields[field.name] = st.none() | st.dictionaries(_text, st.integers(0, 9), max_size=2)
        elif kind is control.LogEntry and field.name == "pieces":
            fields[field.name] = st.just(())  # entries themselves: drawn below
        elif field.name == "tags":
            fields[field.name] = st.none() | st.dictionaries(
                _text, _text | st.booleans() | st.integers(-9, 9), max_size=2
            )
        else:
            fields[field.name] = _value(field.type)
    if kind is control.Join:
        fields["gpus"] = st.lists(_text, min_size=1, max_size=3).map(tuple)
        del fields["layouts"], fields["held_nbytes"]
        return st.builds(_join, st.booleans(), **fields)
    if kind is control.Opening:
        del fields["ranks"]
        fields["classes"] = st.booleans()
        return st.builds(_opening, **fields)
    return st.builds(kind, **fields)


def _opening(**fields: Any) -> control.Opening:
    """An opening in which every member has ranks."""
    ranks = tuple(range(1, len(fields["members"]) + 1))
    fields["classes"] = tuple(range(sum(ranks))) if fields["classes"] else ()
    return control.Opening(**fields, ranks=ranks)


def _join(tells: bool, **fields: Any) -> control.Join:
    """A word of a worker that tells what each of its ranks holds, or does not."""
    ranks = len(fields["gpus"]) if tells else 0
    layouts = tuple(bytes(rank) for rank in range(ranks))
    return control.Join(**fields, layouts=layouts, held_nbytes=tuple(range(ranks)))


def _value(annotation: Any) -> st.SearchStrategy[Any]:
    """Any value of an annotation as our messages use them."""
    if annotation is Manifest:
        return _manifests
    if annotation is msgspec.Raw:
        return _text.map(msgspec.msgpack.encode).map(msgspec.Raw)
    if annotation is int:
        return st.integers(0, 2**40)
    if annotation is float:
        return st.floats(allow_nan=False, allow_infinity=False, width=32)
    if isinstance(annotation, type) and issubclass(annotation, msgspec.Struct):
        return _of(annotation)
    args = get_args(annotation)
    origin = getattr(annotation, "__origin__", None)
    if origin is tuple:
        return st.lists(_value(args[0]), max_size=3).map(tuple)
    if str(annotation).startswith("typing.Literal"):
        return st.sampled_from(args)
    if args:
        return st.one_of(*(_value(arg) for arg in args))
    return st.from_type(annotation) if annotation is not str else _text


@pytest.mark.parametrize("kind", CONTROL, ids=lambda kind: kind.__name__)
@given(data=st.data())
def test_control_round_trips(kind: type[Any], data: st.DataObject) -> None:
    """Whatever one side says, the other side reads the same."""
    message = data.draw(_of(kind))
    assert codec.decode(codec.encode(message)) == message


@pytest.mark.parametrize("kind", ROLLOUTS, ids=lambda kind: kind.__name__)
@given(data=st.data())
def test_rollouts_round_trip(kind: type[Any], data: st.DataObject) -> None:
    """Requests and samples arrive as they were sent, log-probabilities to the bit."""
    message = data.draw(_of(kind))
    assert codec.decode_rollout(codec.encode(message)) == message


@pytest.mark.parametrize("kind", RANKS, ids=lambda kind: kind.__name__)
@given(data=st.data())
def test_what_ranks_say_round_trips(kind: type[Any], data: st.DataObject) -> None:
    """Orders and answers between the ranks of a worker arrive as they were sent."""
    message = data.draw(_of(kind))
    assert codec.decode_rank(codec.encode(message)) == message


@pytest.mark.parametrize("kind", METRICS, ids=lambda kind: kind.__name__)
@given(data=st.data())
def test_metrics_round_trip(kind: type[Any], data: st.DataObject) -> None:
    """Metrics are JSON that comes back as it was."""
    metric = data.draw(_of(kind))
    encoded = codec.encode_metric(metric)
    assert msgspec.json.decode(encoded)["type"] in ("trainer", "worker", "event")
    assert codec.decode_metric(encoded) == metric


@given(data=st.data())
def test_leases_and_log_entries_round_trip(data: st.DataObject) -> None:
    """What is stored beside the conversation comes back as it was."""
    lease, entry = data.draw(_of(control.Lease)), data.draw(_of(control.LogEntry))
    pieces = data.draw(st.lists(_of(control.LogEntry), max_size=3))
    entry = msgspec.structs.replace(entry, pieces=tuple(pieces))
    assert codec.decode_lease(codec.encode(lease)) == lease
    assert codec.decode_entry(codec.encode(entry)) == entry


@pytest.mark.parametrize("decoder", DECODERS)
@given(garbage=st.binary(max_size=64))
def test_garbage_is_refused_by_name(decoder: str, garbage: bytes) -> None:
    """Random bytes on a subject end in one kind of error that names the subject."""
    with pytest.raises(RemoteProtocolError, match="on some\\.subject"):
        DECODERS[decoder](garbage, subject="some.subject")


@pytest.mark.parametrize("kind", CONTROL, ids=lambda kind: kind.__name__)
@given(data=st.data())
def test_truncated_and_flipped_messages_never_crash(kind: type[Any], data: st.DataObject) -> None:
    """A message that lost its tail is refused; one with a flipped bit is refused or decodes."""
    encoded = codec.encode(data.draw(_of(kind)))
    cut = data.draw(st.integers(0, len(encoded) - 1))
    with pytest.raises(RemoteProtocolError):
        codec.decode(encoded[:cut])
    bit = data.draw(st.integers(0, len(encoded) * 8 - 1))
    flipped = bytearray(encoded)
    flipped[bit // 8] ^= 1 << bit % 8
    decoded: Any = None
    with contextlib.suppress(RemoteProtocolError):
        decoded = codec.decode(bytes(flipped))
    assert decoded is None or isinstance(decoded, CONTROL)


@pytest.mark.parametrize("decoder", ["control", "rollout", "lease", "entry", "layout"])
def test_deep_nesting_is_refused(decoder: str) -> None:
    """A bomb of nested arrays is refused instead of overflowing the stack."""
    with pytest.raises(RemoteProtocolError):
        DECODERS[decoder](b"\x91" * 100_000)


def test_fields_of_a_later_version_are_ignored() -> None:
    """A newer peer may add fields: they do not break an older reader."""
    beat = control.Beat(sender=control.Sender("trainer", "a"), epoch=1, version=2)
    newer = {**msgspec.to_builtins(beat), "type": "Beat", "mood": "good"}
    assert codec.decode(msgspec.msgpack.encode(newer)) == beat


@pytest.mark.parametrize("ranks", [(), (1,), (1, 0), (1, -1), (1, 1, 1)], ids=str)
def test_an_opening_says_how_many_ranks_each_member_has(ranks: tuple[int, ...]) -> None:
    """Two members, and ranks for fewer or more, or for one of them none: no rank could be told from
    that, and the message is refused."""
    sender = control.Sender("trainer", "1")
    members = (control.Sender("a", "1"), control.Sender("b", "1"))
    fields = {"type": "Opening", "sender": sender, "stamp": control.Stamp(1, 1), "kind": "gloo"}
    garbage = msgspec.msgpack.encode(fields | {"members": members, "ranks": ranks, "enters_at": 0})
    with pytest.raises(RemoteProtocolError, match="2 members have"):
        codec.decode(garbage)
    sound = msgspec.msgpack.encode(fields | {"members": members, "ranks": (2, 3), "enters_at": 0})
    opening = codec.decode(sound)
    assert isinstance(opening, control.Opening)
    assert [opening.first_rank(member) for member in members] == [1, 3]
    assert opening.size == 6


def test_a_worker_has_a_rank() -> None:
    """A Join that names the GPU of no rank is refused: no window could have a place for it."""
    fields = {"type": "Join", "sender": ("a", "1"), "epoch": 1, "manifest_hash": "", "offers": ()}
    place = {"device": "cpu", "host": "h", "pid": 1}
    with pytest.raises(RemoteProtocolError, match="without a rank"):
        codec.decode(msgspec.msgpack.encode(fields | place | {"gpus": ()}))
    assert isinstance(codec.decode(msgspec.msgpack.encode(fields | place)), control.Join)
