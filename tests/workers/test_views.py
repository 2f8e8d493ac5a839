"""What is published in place of the trainer's tensors: a function of them, and nothing else."""

import gc
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from runs import (
    QUICK,
    Ear,
    Site,
    Tensors,
    checkpoint,
    codes,
    eventually,
    published,
    same_bits,
    step,
    until_stored,
    weights,
)
from sparsecast import (
    AsyncPublisher,
    Broker,
    CannotResume,
    ManifestMismatch,
    Patch,
    Publisher,
    Replica,
    SettingsError,
    UnsupportedTensor,
    apply,
    digest,
)
from sparsecast.messages.metrics import Event
from sparsecast.workers.choice import Choice
from sparsecast.workers.outgoing import Outgoing
from sparsecast.workers.views import View


def copied(tensors: Mapping[str, Tensor]) -> Tensors:
    """Tensors of a worker's own, of the same bits."""
    return {name: tensor.clone() for name, tensor in tensors.items()}


def zeroed(tensors: Mapping[str, Tensor]) -> Tensors:
    """Tensors of a worker's own that hold nothing yet."""
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


def outgoing(tensors: Tensors, view: View, **choice: Any) -> Outgoing:
    """What a trainer has published, without a bus."""
    return Outgoing(Choice(tensors, view=view, **choice), clock=lambda: 1.0)


# ---- what workers hold


async def test_workers_hold_what_the_view_makes(site: Site) -> None:
    """One worker has the view of the trainer's first weights, another one nothing: both follow ten
    versions bit for bit, proven, and no update is as large as what they hold."""
    trained = weights()
    mine, theirs = copied(codes(trained)), zeroed(codes(trained))
    publisher = await site.publisher(trained, view=codes)
    replicas = [await site.replica(mine, "w0"), await site.replica(theirs, "w1")]
    await publisher.wait_members(2, timeout_s=10)
    for version in range(1, 11):
        step(trained, version, share=0.001)
        update = await publisher.publish()
        assert (await update.wait_applied(timeout_s=10)).complete
        made = codes(trained)
        assert update.dense_nbytes == sum(tensor.nbytes for tensor in made.values())
        assert 0 < update.nbytes < update.dense_nbytes
        assert same_bits(made, mine)
        assert same_bits(made, theirs)
    await eventually(lambda: all(replica.verified == 10 for replica in replicas))
    assert [replica.mismatches for replica in replicas] == [0, 0]


async def test_what_it_leaves_alone_may_change_after_publish(site: Site) -> None:
    """The view returns the trainer's own storage, and the trainer trains on as soon as publish()
    returns: version 1 is what was there when it was called."""
    trained = weights()
    mine = copied(trained)
    publisher = await site.publisher(trained, view=dict)
    replica = await site.replica(mine)
    await publisher.wait_members(1, timeout_s=10)
    step(trained, 1)
    then = copied(trained)
    update = await publisher.publish()
    step(trained, 2, share=1.0)
    assert (await update.wait_applied(timeout_s=10)).complete
    await eventually(lambda: replica.verified == 1)
    assert same_bits(then, mine)
    assert replica.mismatches == 0


async def test_a_view_that_draws_lots_costs_only_bytes(site: Site) -> None:
    """The weights stand still and every call gives other bits: each version is what the call for it
    gave, proven on the worker."""
    given: list[Tensors] = []

    def dithered(tensors: Mapping[str, Tensor]) -> Tensors:
        given.append({"codes": torch.rand(tensors["embed"].shape).to(torch.float8_e4m3fn)})
        return given[-1]

    publisher = await site.publisher(weights(), view=dithered)
    mine = zeroed(given[0])
    replica = await site.replica(mine)
    await publisher.wait_members(1, timeout_s=10)
    for version in (1, 2, 3):
        update = await publisher.publish()
        assert update.changed > 0
        assert (await update.wait_applied(timeout_s=10)).complete
        await eventually(lambda version=version: replica.verified == version)
        assert same_bits(given[-1], mine)
    assert replica.mismatches == 0


def test_a_module_in_synchronous_code(broker: Broker, run: str) -> None:
    """publish() is called under inference mode, under autocast, and with gradients on: a view sees
    none of it, a product in it is as exact as by hand, and the parameters keep their gradients."""
    model = nn.Linear(40, 30)
    modes: set[tuple[bool, ...]] = set()

    def product(tensors: Mapping[str, Tensor]) -> Tensors:
        modes.add(
            (
                torch.is_grad_enabled(),
                torch.is_inference_mode_enabled(),
                torch.is_autocast_enabled("cpu"),
            )
        )
        return {"product": tensors["weight"] @ tensors["weight"].t(), "bias": tensors["bias"]}

    def by_hand() -> Tensors:
        with torch.no_grad():
            return {"product": model.weight @ model.weight.t(), "bias": model.bias.detach()}

    mine = zeroed(by_hand())
    with Publisher(model, run=run, bus=broker.url, policy=QUICK, view=product) as publisher:
        replica = Replica(mine, run=run, bus=broker.url, name="w0", policy=QUICK)
        replica.start()
        publisher.wait_members(1, timeout_s=10)
        for mode in (
            torch.inference_mode(),
            torch.autocast("cpu", torch.bfloat16),
            torch.enable_grad(),
        ):
            model(torch.ones(40)).sum().backward()
            with torch.no_grad():
                model.weight += 0.25
                model.bias -= 0.5
            with mode:
                update = publisher.publish()
            assert update.wait_applied(timeout_s=10).complete
            assert same_bits(by_hand(), mine)
        replica.stop()
    assert modes == {(False, False, False)}
    assert model.weight.requires_grad
    assert model.weight.grad is not None


def test_tensors_of_inference_mode_are_published() -> None:
    """A view that works under inference mode itself: what it makes is read like any other."""
    trained = weights()

    def made(tensors: Mapping[str, Tensor]) -> Tensors:
        with torch.inference_mode():
            return codes(tensors)

    source = outgoing(trained, made)
    step(trained, 1)
    source.publish(None, None)
    sealed = source.take(())
    assert sealed is not None
    assert sealed.digest == digest(codes(trained))


# ---- what it is given


def test_what_it_is_given_is_chosen_and_named() -> None:
    """include, exclude and rename pick and name what the view gets, tied tensors come once, and the
    mapping refuses to be changed; what the view names is published by that name."""
    trained = weights()
    trained["head"] = trained["embed"]
    given: list[list[str]] = []

    def upper(tensors: Mapping[str, Tensor]) -> Tensors:
        given.append(list(tensors))
        with pytest.raises(TypeError, match="change a copy"):
            tensors["more"] = torch.zeros(1)  # type: ignore[index]
        return {name.upper(): tensor for name, tensor in tensors.items()}

    source = outgoing(
        trained,
        upper,
        include=["layer.*", "embed", "head"],
        exclude=["*.bias"],
        rename=lambda name: f"model.{name}",
    )
    source.publish(None, None)
    assert given == [["model.embed", "model.layer.weight"]] * 2
    assert [spec.name for spec in source.manifest.tensors] == ["MODEL.EMBED", "MODEL.LAYER.WEIGHT"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, {"embed": torch.float16}], ids=["one", "map"])
def test_dtype_beside_a_view_is_refused(dtype: Any) -> None:
    """Codes of eight bits cast to bfloat16 would be no update at all: refused before a run is
    touched."""
    for kind in (Publisher, AsyncPublisher):
        with pytest.raises(SettingsError, match="leave dtype out and cast within the view"):
            kind(weights(), run="r", view=codes, dtype=dtype)


# ---- a view that fails


def _raises(found: Tensors) -> Any:
    raise ZeroDivisionError("no scale")


Fault = tuple[Callable[[Tensors], Any], type[Exception], str]
FAULTS: dict[str, Fault] = {
    "raises": (_raises, ZeroDivisionError, "no scale"),
    "less": (
        lambda found: {name: found[name] for name in found if name != "steps"},
        ManifestMismatch,
        "'steps' is missing",
    ),
    "more": (lambda found: found | {"new": torch.ones(1)}, ManifestMismatch, "'new' is only"),
    "renamed": (
        lambda found: {name.replace("steps", "step"): t for name, t in found.items()},
        ManifestMismatch,
        "'steps' is missing",
    ),
    "dtype": (
        lambda found: found | {"embed": found["embed"].to(torch.int16)},
        ManifestMismatch,
        "'embed' has dtype int8 here and int16",
    ),
    "shape": (
        lambda found: found | {"embed": found["embed"].flatten()},
        ManifestMismatch,
        r"'embed' has shape \[300, 41\] here and \[12300\]",
    ),
    "meta": (
        lambda found: found | {"embed": found["embed"].to("meta")},
        UnsupportedTensor,
        "'embed': is on the meta device",
    ),
    "no tensor": (lambda found: found | {"embed": None}, UnsupportedTensor, "is a NoneType"),
    "no mapping": (lambda found: list(found.items()), SettingsError, "returned a list"),
    "nothing": (lambda found: None, SettingsError, "returned a NoneType"),
}


class Faulty:
    """codes(), with a fault for as long as there is one."""

    def __init__(self) -> None:
        self.fault: Callable[[Tensors], Any] | None = None

    def __call__(self, tensors: Mapping[str, Tensor]) -> Any:
        found = codes(tensors)
        return found if self.fault is None else self.fault(found)


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_view_that_fails_publishes_nothing(site: Site, fault: str) -> None:
    """It raises, or gives what is not what it gave before: publish() says so and makes no version,
    and the next one brings both steps in one update."""
    happens, error, says = FAULTS[fault]
    trained, view = weights(), Faulty()
    mine = copied(codes(trained))
    publisher = await site.publisher(trained, view=view)
    replica = await site.replica(mine)
    await publisher.wait_members(1, timeout_s=10)
    step(trained, 1)
    assert (await (await publisher.publish()).wait_applied(timeout_s=10)).complete
    step(trained, 2)
    view.fault = happens
    with pytest.raises(error, match=says):
        await publisher.publish()
    assert publisher.version == 1
    assert publisher._outgoing.take(()) is None
    view.fault = None
    step(trained, 3)
    update = await publisher.publish()
    assert (update.base_version, update.version) == (1, 2)
    assert (await update.wait_applied(timeout_s=10)).complete
    await eventually(lambda: replica.verified == 2)
    assert same_bits(codes(trained), mine)
    assert replica.mismatches == 0


async def test_a_run_does_not_start_on_a_view_that_fails(site: Site) -> None:
    """The view raises while the publisher is entered: so does entering, nothing is claimed, and the
    same publisher may be entered once the view works."""
    view = Faulty()
    view.fault = _raises
    publisher = AsyncPublisher(weights(), run=site.run, bus=site.url, policy=QUICK, view=view)
    with pytest.raises(ZeroDivisionError):
        await publisher.__aenter__()
    view.fault = None
    async with publisher:
        assert publisher.version == 0
        assert (await publisher.publish()).version == 1


# ---- what comes back


async def test_a_run_goes_on_from_what_the_view_made(site: Site, ear: Ear) -> None:
    """The trainer restarts with the weights that it had, and then with older ones: what the log
    holds is the view's tensors, which the worker has, and only what differs goes round."""
    trained = checkpoint(3)
    mine = copied(codes(trained))
    await published(site, 3, view=codes)
    publisher = await site.publisher(trained, view=codes, resume="must")
    replica = await site.replica(mine)
    assert await replica.wait_version(4, timeout_s=10) == publisher.version == 4
    await until_stored(publisher, 4, anchor=True)
    await publisher.close()
    trained = checkpoint(2)
    publisher = await site.publisher(trained, view=codes, resume="must")
    await publisher.wait_members(1, timeout_s=10)
    await eventually(lambda: replica.verified == publisher.version == 6)
    assert same_bits(codes(trained), mine)
    assert replica.mismatches == 0
    goes_on = [m.reason for m in ear.heard if isinstance(m, Event) and m.kind == "resume"]
    assert goes_on == ["goes on from version 3", "goes on from version 4"]


async def test_another_view_is_another_model(site: Site) -> None:
    """What the log holds was made by another view, or without one: a run that must go on from it
    does not start."""
    await published(site, 1, view=codes)
    for options in ({}, {"view": lambda tensors: codes(tensors) | {"more": torch.ones(1)}}):
        with pytest.raises(CannotResume, match="its model was another one"):
            await site.publisher(checkpoint(1), resume="must", **options)


async def test_rolling_back_gives_workers_their_old_tensors(site: Site) -> None:
    """Version 1 of three again: the view's tensors come back from the log, the trainer's own are
    left alone, and its next publish() brings the view of them. A worker that comes then has them
    from an anchor."""
    trained = weights()
    mine = copied(codes(trained))
    publisher = await site.publisher(trained, view=codes)
    replica = await site.replica(mine)
    await publisher.wait_members(1, timeout_s=10)
    for version in (1, 2, 3):
        step(trained, version)
        await publisher.publish()
        await until_stored(publisher, version)
    back = await publisher.rollback(1)
    assert (await back.wait_applied(timeout_s=10)).complete
    assert same_bits(codes(checkpoint(1)), mine)
    assert same_bits(checkpoint(3), trained)
    update = await publisher.publish()
    assert update.version == 5
    assert (await update.wait_applied(timeout_s=10)).complete
    late = zeroed(mine)
    newcomer = await site.replica(late, "w1")
    await newcomer.wait_version(5, timeout_s=10)
    await eventually(lambda: replica.verified == newcomer.verified == 5)
    assert same_bits(codes(trained), mine)
    assert same_bits(mine, late)
    assert (replica.mismatches, newcomer.mismatches) == (0, 0)


# ---- any view


#: From one tensor to those that are published for it, by the ends of their names.
WAYS: dict[str, Callable[[Tensor], Tensors]] = {
    "same": lambda tensor: {"": tensor},
    "part": lambda tensor: {"": tensor[::2]},
    "turned": lambda tensor: {"": tensor.t()},
    "halves": lambda tensor: {".0": tensor[: len(tensor) // 2], ".1": tensor[len(tensor) // 2 :]},
    "copied": lambda tensor: {"": tensor, ".copy": tensor.clone()},
    "fp8": lambda tensor: {"": tensor.to(torch.float8_e4m3fn)},
    "repeated": lambda tensor: {"": tensor[:1].expand(5, -1)},
    "summed": lambda tensor: {"": tensor.sum(), ".rows": tensor.sum(1)},
    "int8": lambda tensor: {
        name.replace("t", "", 1): made for name, made in codes({"t": tensor}).items()
    },
}
MATRIX = st.tuples(
    st.sampled_from(sorted(WAYS)),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(1, 40),
    st.integers(1, 40),
)


@given(
    matrices=st.lists(MATRIX, min_size=1, max_size=4),
    calls=st.lists(st.sampled_from(["publish", "fail", "take"]), min_size=1, max_size=8),
    share=st.sampled_from([0.0, 0.01, 1.0]),
)
def test_any_view_is_published_to_the_bit(
    matrices: list[tuple[str, torch.dtype, int, int]], calls: list[str], share: float
) -> None:
    """Casts, slices, transposed, expanded and quantised tensors, of calls that fail in between and
    patches that wait and merge: whatever is taken leads to the bits of the last call that worked,
    under its digest."""
    random = torch.Generator().manual_seed(len(matrices))
    trained = {
        f"m{at}": torch.randn(rows, columns, generator=random).to(dtype)
        for at, (_, dtype, rows, columns) in enumerate(matrices)
    }
    fails = False

    def view(tensors: Mapping[str, Tensor]) -> Tensors:
        found: Tensors = {}
        for (name, tensor), (way, *_) in zip(tensors.items(), matrices, strict=True):
            found |= {name + end: made for end, made in WAYS[way](tensor).items()}
        if fails:
            raise ZeroDivisionError
        return found

    source = outgoing(trained, view)
    expected = copied(view(trained))
    mine = {name: tensor.contiguous().clone() for name, tensor in expected.items()}
    version = 0
    for number, call in enumerate([*calls, "publish", "take"]):
        step(trained, number, share)
        if call == "publish":
            version += 1
            assert source.publish(None, None).version == version
            expected = copied(view(trained))
        elif call == "fail":
            fails = True
            with pytest.raises(ZeroDivisionError):
                source.publish(None, None)
            fails = False
            assert source.version == version
        elif (sealed := source.take(())) is not None:
            payload = source.payload(sealed.version)
            assert payload is not None
            apply(Patch.from_buffer(payload), mine)
            assert sealed.version == version
            assert sealed.digest == digest(mine) == source.digest
            assert same_bits(expected, mine)


def test_what_it_makes_is_let_go_of() -> None:
    """The publisher holds one copy of what was published: nothing that a call made outlives it,
    not even while its patch waits."""
    made: list[weakref.ref[np.ndarray[Any, Any]]] = []

    def view(tensors: Mapping[str, Tensor]) -> Tensors:
        array = (tensors["embed"].float() * 2).numpy().copy()
        made.append(weakref.ref(array))
        return {"double": torch.from_numpy(array)}

    trained = weights()
    source = outgoing(trained, view)
    for seed in range(3):
        step(trained, seed, share=0.9)
        assert source.publish(None, None).changed
    gc.collect()
    assert [reference() for reference in made] == [None] * 4
    assert source.take(()) is not None
