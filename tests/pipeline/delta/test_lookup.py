"""Looking a model's tensors up again: the same while nothing moved, and every move is noticed."""

import gc
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from threading import Thread
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sparsecast.messages.errors import ManifestMismatch, UnsupportedTensor
from sparsecast.pipeline.delta import Lookup, Shadow, apply, diff, manifest_of, named_tensors
from sparsecast.pipeline.delta import lookup as lookup_module
from sparsecast.pipeline.delta.tensors import require_manifest


class Tiny(nn.Module):
    """Tied embedding and head, a buffer that is kept, one that is not, an empty one, a None."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.norm = nn.LayerNorm(4)
        self.body = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False))
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.tensor(3))
        self.register_buffer("none", None)
        self.register_buffer("empty", torch.zeros(0, 4))
        self.register_buffer("cache", torch.zeros(9), persistent=False)


def facts(tensors: Mapping[str, Tensor]) -> list[object]:
    """All that tells a tensor's place and form, in order."""
    return [
        (name, t.data_ptr(), t.shape, t.stride(), t.dtype, t.device) for name, t in tensors.items()
    ]


def require_same(lookup: Lookup, source: nn.Module | Mapping[str, Tensor], **how: Any) -> None:
    """What the lookup finds is what named_tensors() finds."""
    found, expected = lookup.tensors(), named_tensors(source, **how)
    assert facts(found) == facts(expected)
    assert manifest_of(found) == manifest_of(expected)


def test_while_nothing_moves_it_is_the_same_object() -> None:
    """Steps of an optimizer, gradients and freezing move nothing; one dict serves all rounds."""
    model = Tiny()
    lookup = Lookup(model)
    first = lookup.tensors()
    assert (lookup.generation, lookup.tensors() is first) == (1, True)
    optimizer = torch.optim.AdamW(model.parameters())
    model.body(torch.ones(4)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    model.norm.weight.requires_grad_(False)
    model.eval()
    assert lookup.tensors() is first
    assert lookup.generation == 1
    token = first.token
    del first
    gc.collect()
    assert lookup.tensors().token is token
    require_same(lookup, model)


def replace(module: nn.Module, name: str) -> None:
    setattr(module, name, nn.Parameter(getattr(module, name).detach().clone()))


def reorder(model: Tiny) -> None:
    weight = model.norm.weight
    del model.norm.weight
    model.norm.weight = weight


def exchange_dict(model: Tiny) -> None:
    own: Any = model.norm
    own._parameters = {name: nn.Parameter(p.detach() + 1) for name, p in own._parameters.items()}


def move_set(model: Tiny) -> None:
    with torch.no_grad():
        model.norm.bias.set_(torch.full((4,), 5.0))  # type: ignore[call-overload]


def move_data(tensor: Tensor, value: Tensor) -> None:
    tensor.data = value


def grow(model: Tiny) -> None:
    model.norm.bias.untyped_storage().resize_(1 << 20)


def turn(model: Tiny) -> None:
    weight: Any = model.body[0].weight
    weight.data = weight.data.t()


def swap_child(model: Tiny) -> None:
    model.body[0] = nn.Linear(4, 4)


def tie(model: Tiny) -> None:
    model.body[1].weight = model.body[0].weight


def untie_by_data(model: Tiny) -> None:
    model.head.weight = nn.Parameter(model.embed.weight.data)
    model.head.weight.data = model.head.weight.data.clone()


MOVES: dict[str, Callable[[Tiny], object]] = {
    "data": lambda m: move_data(m.norm.bias, torch.full((4,), 5.0)),
    "data-of-a-tied-one": lambda m: move_data(m.embed.weight, torch.ones(6, 4)),
    "data-reshaped": lambda m: move_data(m.embed.weight, m.embed.weight.data.view(4, 6)),
    "data-turned": turn,
    "data-another-dtype": lambda m: move_data(m.steps, m.steps.data.view(torch.float64)),
    "data-offset": lambda m: move_data(m.norm.bias, torch.zeros(9)[5:]),
    "set_": move_set,
    "storage-grown": grow,
    "storage-freed": lambda m: m.norm.bias.untyped_storage().resize_(0),
    "resize_": lambda m: m.steps.resize_(2),
    "to": lambda m: m.to(torch.bfloat16),
    "half": lambda m: m.body.half(),
    "share_memory": lambda m: m.share_memory(),
    "parameter-replaced": lambda m: replace(m.norm, "weight"),
    "buffer-replaced": lambda m: m._buffers.update(steps=torch.tensor(4)),
    "empty-buffer-of-another-shape": lambda m: m._buffers.update(empty=torch.zeros(4, 0)),
    "none-becomes-a-buffer": lambda m: m._buffers.update(none=torch.tensor(4)),
    "buffer-becomes-none": lambda m: m._buffers.update(steps=None),
    "parameter-becomes-none": lambda m: m.norm.register_parameter("bias", None),
    "none-becomes-a-bias": lambda m: setattr(m.body[1], "bias", nn.Parameter(torch.ones(4))),
    "parameter-added": lambda m: m.register_parameter("extra", nn.Parameter(torch.ones(2))),
    "parameter-removed": lambda m: m.norm.__delattr__("bias"),
    "buffer-added": lambda m: m.body[0].register_buffer("scale", torch.ones(1)),
    "buffer-removed": lambda m: m.__delattr__("steps"),
    "module-added": lambda m: m.body.append(nn.Linear(4, 2)),
    "module-removed": lambda m: m.body.__delitem__(1),
    "module-replaced": swap_child,
    "module-becomes-none": lambda m: m._modules.update(norm=None),
    "reordered": reorder,
    "dict-exchanged": exchange_dict,
    "tied": tie,
    "untied": lambda m: replace(m.head, "weight"),
    "untied-by-data": untie_by_data,
    "buffer-made-persistent": lambda m: m.register_buffer("cache", m.cache),
    "buffer-made-not-persistent": lambda m: m.register_buffer("steps", m.steps, persistent=False),
    "assigned": lambda m: m.load_state_dict(
        {name: value.clone() for name, value in m.state_dict().items()}, assign=True
    ),
    "hook": lambda m: m.norm.register_state_dict_post_hook(
        lambda module, state, prefix, _: state.__delitem__("norm.bias")
    ),
    "state_dict-of-its-own": lambda m: setattr(
        m, "state_dict", lambda **_: {"only": m.norm.weight.detach()}
    ),
}  # fmt: skip


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES.keys())
@pytest.mark.parametrize("held", [True, False], ids=["held", "let-go"])
def test_every_move_is_noticed(move: Callable[[Tiny], object], held: bool) -> None:
    """The engine moves weights between two rounds, in each way it may: the next look-up finds what
    a thorough one finds, in a new dict of a new generation, and then settles again."""
    torch.manual_seed(0)
    model = Tiny()
    lookup = Lookup(model)
    before: Any = lookup.tensors()
    token, generation = before.token, lookup.generation
    kept = before if held else None
    del before
    move(model)
    require_same(lookup, model)
    now = lookup.tensors()
    assert now is not kept
    assert now.token is not token
    assert lookup.generation == generation + 1
    assert lookup.tensors().token is now.token
    assert lookup.generation == generation + 1


def test_a_replaced_object_over_the_same_memory() -> None:
    """A parameter object gives way to another over the same storage: the new object comes, so
    that its later moves are seen, and caches of addresses stay good."""
    model = Tiny()
    lookup = Lookup(model)
    first = lookup.tensors()
    model.norm.bias = nn.Parameter(model.norm.bias.data)
    second = lookup.tensors()
    assert second is not first
    assert second.token is first.token
    assert second["norm.bias"] is model.norm.bias
    assert lookup.generation == 1


def test_an_empty_tensor_on_another_device() -> None:
    """Nothing has no address: its device is asked for."""
    state = {"w": torch.ones(2), "none": torch.zeros(0)}
    lookup = Lookup(state)
    lookup.tensors()
    state["none"] = torch.zeros(0, device="meta")
    with pytest.raises(UnsupportedTensor, match="meta"):
        lookup.tensors()


def test_what_cannot_be_published_is_refused_when_it_comes() -> None:
    """A tensor turns sparse, a list or a meta tensor later on: named, and forgotten once mended."""
    state: dict[str, Any] = {"w": torch.ones(2), "v": torch.ones(3)}
    lookup = Lookup(state)
    good = lookup.tensors()
    for bad in (torch.eye(3).to_sparse(), [1.0], torch.zeros(3, device="meta"), None):
        was, state["v"] = state["v"], bad
        with pytest.raises(UnsupportedTensor, match="'v'"):
            lookup.tensors()
        state["v"] = was
    assert lookup.tensors() is good


@pytest.mark.parametrize(
    "move",
    [
        lambda s: s.update(b=torch.zeros(3)),
        lambda s: s.update(c=torch.zeros(3)),
        lambda s: s.pop("a"),
        lambda s: s.update(a=s.pop("a")),
        lambda s: s.update(b=s["a"]),
        lambda s: move_data(s["a"], torch.zeros(3)),
    ],
    ids=["replaced", "added", "removed", "reordered", "tied", "data"],
)
def test_moves_in_a_mapping(move: Callable[[dict[str, Tensor]], object]) -> None:
    """The same of a mapping, whose owner replaces tensors at will."""
    state = {"a": torch.ones(3), "b": torch.ones(3)}
    lookup = Lookup(state)
    before = lookup.tensors()
    move(state)
    require_same(lookup, state)
    assert lookup.tensors().token is not before.token


class Fresh(Mapping[str, Tensor]):
    """A mapping that makes its tensor objects anew at every access, over one memory."""

    def __init__(self) -> None:
        self.memory = torch.ones(4)

    def __getitem__(self, name: str) -> Tensor:
        return self.memory[:2] if name == "low" else self.memory[2:]

    def __iter__(self) -> Iterator[str]:
        return iter(("low", "high"))

    def __len__(self) -> int:
        return 2


def test_a_mapping_of_fresh_views() -> None:
    """New objects over memory that stays: the generation stays, too; then the memory moves."""
    state = Fresh()
    lookup = Lookup(state)
    token = lookup.tensors().token
    assert lookup.tensors().token is token
    state.memory = torch.zeros(4)
    assert lookup.tensors()["high"].tolist() == [0.0, 0.0]
    assert lookup.generation == 2


class Stateful(Tiny):
    """Extra state beside the tensors: what torch calls cannot be walked round."""

    def get_extra_state(self) -> object:
        return {"not": "a tensor"}

    def set_extra_state(self, state: object) -> None:
        assert state


class Marked(Tensor):
    """A subclass with plain memory."""


def test_what_cannot_be_followed_is_looked_up_thoroughly() -> None:
    """Extra state, hooks and subclasses: still right, and still the same generation and token."""
    for model in (Stateful(), Tiny(), Tiny()):
        if type(model) is Tiny:
            model.norm.register_state_dict_post_hook(lambda *_: None)
        lookup = Lookup(model)
        first = lookup.tensors()
        assert lookup.tensors() is first
        model.norm.bias.data = torch.ones(4)
        require_same(lookup, model)
        assert lookup.generation == 2
    state = {"w": torch.zeros(3).as_subclass(Marked)}
    lookup = Lookup(state)
    token = lookup.tensors().token
    require_same(lookup, state)
    assert lookup.tensors().token is token
    state["w"] = torch.ones(3).as_subclass(Marked)
    require_same(lookup, state)
    assert lookup.generation == 2


def _as_float(module: nn.Module, state: dict[str, Any], *_: object) -> None:
    state["norm.bias"] = state["norm.bias"].double()


@pytest.mark.parametrize("change", ["nothing", "moved", "renamed", "another"])
def test_a_state_dict_with_hooks_is_called_and_no_more(change: str) -> None:
    """A model's hooks, as FSDP has them: each look-up calls state_dict() and sees whether anything
    has moved; only then it looks thoroughly. A hook that makes new tensors costs that each time."""
    model, called, thorough = Tiny(), [], []
    model.norm.register_state_dict_pre_hook(lambda *_: called.append(1))
    if change == "another":
        model.norm.register_state_dict_post_hook(_as_float)
    lookup = Lookup(model)
    lookup.tensors()
    before = len(called)
    if change == "moved":
        model.norm.bias.data = torch.ones(4)
    if change == "renamed":
        model.extra = nn.Parameter(torch.ones(2))
    real = lookup_module.distinct
    with mock.patch.object(
        lookup_module, "distinct", lambda chosen: thorough.append(1) or real(chosen)
    ):
        found = lookup.tensors()
        assert bool(thorough) == (change != "nothing")
    assert len(called) == before + 1
    assert list(found) == list(named_tensors(model))
    if change != "another":
        require_same(lookup, model)


class Sharded:
    """A tensor that is spread over ranks, of which this one has some."""

    def __init__(self, part: Tensor) -> None:
        self.part = part


def _here(values: Sequence[Any]) -> list[Any]:
    return [value.part if isinstance(value, Sharded) else value for value in values]


def test_what_is_here_of_tensors_that_are_spread() -> None:
    """The parts are followed as plain tensors are; a part that is exchanged is noticed."""
    state = {"a": Sharded(torch.zeros(3)), "b": torch.zeros(2), "c": Sharded(torch.zeros(0, 4))}
    lookup = Lookup(state, local=_here)  # type: ignore[arg-type]
    first = lookup.tensors()
    assert facts(first) == facts({"a": state["a"].part, "b": state["b"], "c": state["c"].part})  # type: ignore[attr-defined]
    assert lookup.tensors() is first
    state["a"].part = torch.ones(3)  # type: ignore[attr-defined]
    assert lookup.tensors()["a"].sum() == 3
    assert lookup.generation == 2


def test_only_some_of_what_is_found() -> None:
    """What another rank publishes is left out, and may move; the rest is followed. Who keeps them
    is asked again when anything has moved, and may refuse."""
    model, names = Tiny(), []

    def keep(found: dict[str, Tensor]) -> dict[str, Tensor]:
        names.append(list(found))
        if len(found) > len(names[0]):
            raise UnsupportedTensor("head.weight", "has come")
        return {name: found[name] for name in found if name in ("norm.bias", "steps")}

    lookup = Lookup(model, keep=keep)
    assert list(lookup.tensors()) == ["steps", "norm.bias"]
    assert list(lookup.tensors()) == ["steps", "norm.bias"]
    assert len(names) == 1
    model.norm.bias.data = torch.ones(4)
    assert lookup.tensors()["norm.bias"].sum() == 4
    model.head.weight = nn.Parameter(torch.ones(6, 4))  # tied no more
    with pytest.raises(UnsupportedTensor, match="has come"):
        lookup.tensors()


def test_choosing_renaming_and_what_is_not_chosen() -> None:
    """include, exclude and rename as named_tensors() has them; what they leave out may move."""
    model = Tiny()
    how: dict[str, Any] = {"exclude": ["norm.*"], "rename": {"steps": "count"}}
    lookup = Lookup(model, **how)
    first = lookup.tensors()
    assert list(first) == list(named_tensors(model, **how))
    model.norm.bias.data = torch.ones(4)
    model.cache = torch.ones(9)
    assert lookup.tensors() is first
    whole = torch.compile(model, backend="eager")
    assert list(Lookup(whole, **how).tensors()) == list(first)


def test_a_peft_model_is_seen_when_it_becomes_one() -> None:
    """Adapters are put into a model that is being published: refused from then on."""
    model = Tiny()
    lookup = Lookup(model)
    lookup.tensors()
    model.peft_config = {}  # type: ignore[assignment]
    with pytest.raises(UnsupportedTensor, match="PEFT"):
        lookup.tensors()


def test_storage_that_the_model_lets_go_of_is_freed() -> None:
    """Offloading through .data or by replacing tensors of a mapping gives memory back at once: a
    lookup holds none."""
    memory = [np.zeros(4, np.float32), np.zeros(5, np.float32)]
    model, state = Tiny(), {"w": torch.from_numpy(memory[1])}
    model.norm.bias.data = torch.from_numpy(memory[0])
    lookups = [Lookup(model), Lookup(state)]
    for lookup in lookups:
        lookup.tensors()
        lookup.tensors()
    alive = [weakref.ref(array) for array in memory]
    del memory
    model.norm.bias.data = torch.zeros(4)
    state["w"] = torch.zeros(5)
    gc.collect()
    assert [ref() for ref in alive] == [None, None]
    child = weakref.ref(model.body[0])
    model.body[0] = nn.Linear(4, 4)
    lookups[0].forget()
    gc.collect()
    assert child() is None
    require_same(lookups[0], model)


def test_manifests_are_computed_once() -> None:
    """While nothing moves, the manifest of one published dtype is one object, and other tensors
    are still refused by it."""
    model = Tiny()
    lookup = Lookup(model, dtype=torch.bfloat16)
    tensors = lookup.tensors()
    assert lookup.manifest is lookup.manifest
    assert lookup.manifest == manifest_of(named_tensors(model), dtype=torch.bfloat16)
    assert manifest_of(tensors) is manifest_of(tensors)
    assert manifest_of(tensors) == manifest_of(named_tensors(model))
    by_name = {"norm.bias": torch.float16}
    assert manifest_of(tensors, dtype=by_name) == manifest_of(dict(tensors), dtype=by_name)
    require_manifest(tensors, lookup.manifest, dtype=torch.bfloat16)
    with pytest.raises(ManifestMismatch, match="'empty'"):
        require_manifest(tensors, lookup.manifest)
    model.to(torch.bfloat16)
    assert manifest_of(lookup.tensors()) == manifest_of(named_tensors(model))


def test_the_tensors_found_cannot_be_changed() -> None:
    """What is given to many is not changed by one: not the dict, that is."""
    tensors: Any = Lookup({"w": torch.ones(2)}).tensors()
    for change in (
        lambda: tensors.update(w=torch.zeros(2)),
        lambda: tensors.pop("w"),
        lambda: tensors.__setitem__("w", torch.zeros(2)),
        lambda: tensors.__delitem__("w"),
        lambda: tensors.clear(),
        lambda: tensors.setdefault("v", torch.zeros(2)),
    ):
        with pytest.raises(TypeError, match="shared"):
            change()
    assert list(tensors) == ["w"]


def test_updates_go_through_what_it_finds() -> None:
    """Parameters that require gradients are diffed from and patched into like any tensor."""
    torch.manual_seed(1)
    trainer, worker = Tiny(), Tiny()
    worker.load_state_dict(trainer.state_dict())
    theirs, ours = Lookup(trainer), Lookup(worker)
    shadow = Shadow(theirs.tensors())
    version = ours.tensors()["norm.bias"]._version
    with torch.no_grad():
        trainer.norm.bias.add_(1)
        trainer.embed.weight[0] = 7
    found = shadow.diff(theirs.tensors(), base_version=0, version=1)
    apply(found.patch, ours.tensors(), version=0)
    assert worker.norm.bias.tolist() == trainer.norm.bias.tolist()
    assert worker.head.weight[0].tolist() == [7.0] * 4
    assert worker.norm.bias.requires_grad
    assert worker.norm.bias._version >= version
    assert diff(theirs.tensors(), ours.tensors(), base_version=0, version=1).changed == 0


def test_threads_share_a_lookup() -> None:
    """The publisher's thread and another look up while weights move: each gets a whole state."""
    model = Tiny()
    lookup = Lookup(model)
    expected = list(named_tensors(model))
    failures: list[BaseException] = []

    def look() -> None:
        try:
            for _ in range(200):
                assert list(lookup.tensors()) == expected
        except BaseException as exc:
            failures.append(exc)

    threads = [Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(50):
        model.norm.bias.data = torch.zeros(4)
    for thread in threads:
        thread.join(timeout=30)
    assert not failures
    assert not any(thread.is_alive() for thread in threads)
    require_same(lookup, model)


# ---- random modules, random moves


@st.composite
def modules(draw: st.DrawFn, depth: int = 2) -> nn.Module:
    """Modules of modules with parameters and buffers, some None, tied, empty or not persistent."""
    made: list[nn.Parameter] = []

    def build(level: int) -> nn.Module:
        module = nn.Module()
        for at in range(draw(st.integers(0, 3))):
            kind = draw(st.sampled_from(["new", "new", "tied", "none", "buffer", "cache"]))
            value = torch.zeros(draw(st.sampled_from([(), (0,), (2,), (2, 3)])))
            if kind in ("buffer", "cache"):
                module.register_buffer(f"b{at}", value, persistent=kind == "buffer")
            elif kind == "none":
                module.register_parameter(f"p{at}", None)
            else:
                parameter = nn.Parameter(value)
                if kind == "tied" and made:
                    parameter = draw(st.sampled_from(made))
                module.register_parameter(f"p{at}", parameter)
                made.append(parameter)
        if level:
            for at in range(draw(st.integers(0, 2))):
                module.add_module(f"m{at}", build(level - 1))
        return module

    return build(depth)


@settings(max_examples=150, deadline=None)
@given(modules(), st.data())
def test_random_modules_and_moves(module: nn.Module, data: st.DataObject) -> None:
    """Whatever the module and whatever happens to it, what is found is what named_tensors() finds,
    and while nothing happens the same object comes back."""
    lookup = Lookup(module)
    for _ in range(data.draw(st.integers(1, 5))):
        require_same(lookup, module)
        before = lookup.tensors()
        assert lookup.tensors() is before
        where = data.draw(st.sampled_from(list(module.modules())))
        own: Any = where
        held: dict[str, Any] = data.draw(
            st.sampled_from([own._parameters, own._buffers, own._modules])
        )
        move = data.draw(st.sampled_from(["pop", "add", "data", "none", "reorder"]))
        names = list(held)
        if move == "add":
            where.register_parameter(
                f"x{data.draw(st.integers(0, 3))}", nn.Parameter(torch.ones(1))
            )
        elif names:
            name = data.draw(st.sampled_from(names))
            value = held[name]
            if move == "pop":
                del held[name]
            elif move == "reorder":
                held[name] = held.pop(name)
            elif move == "none":
                held[name] = None
            elif isinstance(value, Tensor):
                value.data = torch.ones(data.draw(st.integers(0, 3)))
    require_same(lookup, module)
