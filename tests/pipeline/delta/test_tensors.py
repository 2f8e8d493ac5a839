"""Which tensors a model has, and which cannot be published."""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sparsecast.messages.errors import UnsupportedTensor
from sparsecast.pipeline.delta import apply, diff, manifest_of, named_tensors
from sparsecast.pipeline.delta.bits import bits, unsigned


class Tiny(nn.Module):
    """An embedding tied to the head, a buffer that is kept and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.tensor(3))
        self.register_buffer("cache", torch.zeros(9), persistent=False)

    def get_extra_state(self) -> object:
        return {"not": "a tensor"}

    def set_extra_state(self, state: object) -> None:
        assert state


def test_a_module_is_its_state_dict() -> None:
    """Parameters and persistent buffers, tied ones once, extra state left out, memory shared."""
    model = Tiny()
    tensors = named_tensors(model)
    assert list(tensors) == ["steps", "embed.weight", "norm.weight", "norm.bias"]
    assert not any(tensor.requires_grad for tensor in tensors.values())
    tensors["embed.weight"][0, 0] = 42
    assert model.head.weight[0, 0] == 42


def test_names_of_compiled_modules() -> None:
    """What torch.compile puts into names goes, so that compiled and plain models agree."""
    model = Tiny()
    plain = manifest_of(named_tensors(model))
    whole = torch.compile(model, backend="eager")
    assert manifest_of(named_tensors(whole)) == plain
    model.norm = torch.compile(model.norm, backend="eager")  # type: ignore[assignment]
    assert manifest_of(named_tensors(model)) == plain
    state = {"_orig_mod.w": torch.zeros(1), "w": torch.ones(1)}
    with pytest.raises(UnsupportedTensor, match="two tensors"):
        named_tensors(state)


def test_tensors_are_looked_up_anew() -> None:
    """The engine replaces a storage between two rounds: the next look-up finds the new one."""
    model = Tiny()
    before = named_tensors(model)["norm.bias"]
    model.norm.bias.data = torch.full((4,), 5.0)
    assert named_tensors(model)["norm.bias"].tolist() == [5.0] * 4
    assert before.tolist() == [0.0] * 4


def test_choosing_and_renaming() -> None:
    """include and exclude are globs; rename is a function or a mapping; a clash is named."""
    model = Tiny()
    assert list(named_tensors(model, include=["norm.*", "head.*"])) == [
        "norm.weight",
        "norm.bias",
        "head.weight",
    ]
    assert list(named_tensors(model, exclude=["*.weight"])) == ["steps", "norm.bias"]
    assert "model.norm.bias" in named_tensors(model, rename=lambda name: f"model.{name}")
    assert "shift" in named_tensors(model, rename={"norm.bias": "shift"})
    with pytest.raises(UnsupportedTensor, match="another tensor"):
        named_tensors(model, rename={"norm.bias": "norm.weight"})


def test_a_peft_model_is_refused_unless_adapters_are_chosen() -> None:
    """Base and adapters apart are no weights that inference runs: the error says what to do."""
    state = {
        "q.base_layer.weight": torch.zeros(2, 2),
        "q.lora_A.default.weight": torch.zeros(2, 2),
        "norm.weight": torch.zeros(2),
    }
    with pytest.raises(UnsupportedTensor, match=r"'q.base_layer.weight'.*merge_and_unload"):
        named_tensors(state)
    assert list(named_tensors(state, include=["*lora_*"])) == ["q.lora_A.default.weight"]
    model = Tiny()
    model.peft_config = {}  # type: ignore[assignment]
    with pytest.raises(UnsupportedTensor, match="PEFT"):
        named_tensors(model)


class Wrapped(Tensor):
    """A tensor without memory of its own, as DTensor is."""

    @staticmethod
    def __new__(cls) -> "Wrapped":
        return torch.Tensor._make_wrapper_subclass(cls, (3,))  # type: ignore[attr-defined,no-any-return]

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        raise AssertionError(f"{func} reached a wrapper")


def quantised() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.quint8)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        pytest.param(lambda: torch.empty(3, device="meta"), "meta device", id="meta"),
        pytest.param(lambda: torch.eye(3).to_sparse(), "to_dense", id="sparse"),
        pytest.param(quantised, "quantised", id="quantised"),
        pytest.param(Wrapped, "Wrapped without plain memory", id="wrapper"),
        pytest.param(lambda: torch.zeros(3, dtype=torch.cfloat).conj(), "resolve_conj", id="conj"),
        pytest.param(lambda: [1.0], "is a list", id="list"),
    ],
)
def test_tensors_without_plain_memory_are_refused_by_name(
    make: Callable[[], Tensor], match: str
) -> None:
    """Whatever has no strided memory of its own is refused with its name and the fix."""
    with pytest.raises(UnsupportedTensor, match=match) as caught:
        named_tensors({"good": torch.zeros(1), "bad": make()})
    assert caught.value.name == "bad"
    with pytest.raises(UnsupportedTensor, match=match):
        manifest_of({"bad": make()})


def test_a_dtype_of_16_bytes_is_refused() -> None:
    """complex128 has no place in the format."""
    with pytest.raises(UnsupportedTensor, match="complex128"):
        manifest_of({"w": torch.zeros(3, dtype=torch.complex128)})


class Loaded(nn.Parameter):
    """A parameter class of an engine, with plain memory: taken as it is."""


def test_parameter_classes_of_engines_are_plain() -> None:
    """vLLM's parameters are subclasses over ordinary memory: diffed and patched."""
    held = {"w": Loaded(torch.zeros(9))}
    new = {"w": torch.ones(9)}
    apply(diff(held, new, base_version=0, version=1), named_tensors(held))
    apply(diff(held, new, base_version=0, version=1), held)
    assert held["w"].tolist() == [1.0] * 9


def test_tensors_that_overlap_are_refused_by_both_names() -> None:
    """Two parameters over partly the same memory would be patched twice; identical ones are tied,
    columns and halves of one matrix are apart."""
    memory = torch.zeros(10, 6)
    with pytest.raises(UnsupportedTensor, match="'low'") as caught:
        named_tensors({"low": memory[:6], "high": memory[5:]})
    assert caught.value.name == "high"
    with pytest.raises(UnsupportedTensor, match="shares part"):
        named_tensors({"left": memory[:, :4], "right": memory[:, 3:]})
    with pytest.raises(UnsupportedTensor, match="shares part"):
        named_tensors({"whole": memory, "turned": memory.t()})
    assert len(named_tensors({"left": memory[:, :3], "right": memory[:, 3:]})) == 2
    assert len(named_tensors({"up": memory[:5], "down": memory[5:]})) == 2
    assert len(named_tensors({"one": memory, "two": memory.view(10, 6)})) == 1
    complex_memory = torch.zeros(4, dtype=torch.cfloat)
    assert len(named_tensors({"re": complex_memory.real, "im": complex_memory.imag})) == 2
    assert len(named_tensors({"a": torch.zeros(0), "b": torch.zeros(0)})) == 2


def test_bits_are_read_as_they_are() -> None:
    """Bit views of every width share memory and lose nothing."""
    nan = torch.tensor([0x7F800001, -1], dtype=torch.int32).view(torch.float32)
    assert bits(nan).tolist() == [0x7F800001, -1]
    assert unsigned(bits(nan)).to(torch.int64).tolist() == [0x7F800001, 0xFFFFFFFF]
    half = torch.tensor([-0.0], dtype=torch.bfloat16)
    assert unsigned(bits(half)).to(torch.int64).tolist() == [0x8000]
    bits(half).zero_()
    assert half.signbit().tolist() == [False]
