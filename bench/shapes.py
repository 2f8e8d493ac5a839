"""The tensors of Qwen2.5-0.5B and -7B, whole or cut to a size, and what a step does to them.

0.5B: hidden 896, intermediate 4864, 2 key-value heads of 64, 24 layers, vocabulary 151,936 with
tied embeddings: 290 tensors, 494 M elements. 7B: hidden 3584, intermediate 18944, 4 key-value
heads of 128, 28 layers, vocabulary 152,064, untied: 339 tensors, 7.6 G elements. Biases on q, k
and v; all bf16.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]

#: Up to this share single elements are drawn; beyond it a coin is thrown for each.
_DRAW_UP_TO = 0.02
_CHUNK = 1 << 26


@dataclass(frozen=True, slots=True)
class Model:
    """A Qwen2 architecture, by its sizes."""

    name: str
    hidden: int
    intermediate: int
    key_value: int
    layers: int
    vocabulary: int
    tied: bool

    @property
    def layer(self) -> Shapes:
        """The tensors of one layer, in the order of the state_dict."""
        hidden, narrow, wide = self.hidden, self.key_value, self.intermediate
        return {
            "self_attn.q_proj.weight": (hidden, hidden),
            "self_attn.q_proj.bias": (hidden,),
            "self_attn.k_proj.weight": (narrow, hidden),
            "self_attn.k_proj.bias": (narrow,),
            "self_attn.v_proj.weight": (narrow, hidden),
            "self_attn.v_proj.bias": (narrow,),
            "self_attn.o_proj.weight": (hidden, hidden),
            "mlp.gate_proj.weight": (wide, hidden),
            "mlp.up_proj.weight": (wide, hidden),
            "mlp.down_proj.weight": (hidden, wide),
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
        }


QWEN_05B = Model("Qwen2.5-0.5B", 896, 4864, 128, 24, 151_936, True)
QWEN_7B = Model("Qwen2.5-7B", 3584, 18_944, 512, 28, 152_064, False)
#: No model of anybody's: enough of each kind of tensor for a try within a second.
TINY = Model("tiny", 64, 160, 32, 2, 1500, False)
MODELS = {"0.5b": QWEN_05B, "7b": QWEN_7B, "tiny": TINY}


@dataclass(frozen=True, slots=True)
class Cut:
    """How much of a model is there: whole layers, and rows of the embedding (and the head)."""

    layers: int
    rows: int
    model: Model = QWEN_05B

    @classmethod
    def of_elements(cls, elements: int, model: Model = QWEN_05B) -> Cut:
        """As many whole layers as fit, the rest as rows of the embedding."""
        of_layer = _numel(model.layer)
        layers = min(elements // of_layer, model.layers)
        rest = elements - layers * of_layer - model.hidden
        row = model.hidden if model.tied else 2 * model.hidden
        return cls(layers, max(min(rest // row, model.vocabulary), 0), model)

    @classmethod
    def whole(cls, model: Model) -> Cut:
        """All of it."""
        return cls(model.layers, model.vocabulary, model)

    @property
    def shapes(self) -> Shapes:
        """Every tensor's shape, in the order of the model's state_dict."""
        found: Shapes = {}
        ends = (self.rows, self.model.hidden)
        if self.rows:
            found["model.embed_tokens.weight"] = ends
        for layer in range(self.layers):
            for name, shape in self.model.layer.items():
                found[f"model.layers.{layer}.{name}"] = shape
        found["model.norm.weight"] = (self.model.hidden,)
        if self.rows and not self.model.tied:
            found["lm_head.weight"] = ends
        return found

    @property
    def numel(self) -> int:
        """Elements of all tensors."""
        return _numel(self.shapes)

    def describe(self) -> str:
        """One sentence about what was cut."""
        model = self.model
        size = (
            f"{len(self.shapes)} tensors, {self.numel:,} elements, {2 * self.numel / 1e6:,.1f} MB"
        )
        if self == Cut.whole(model):
            return f"{model.name}, bf16, whole: {size}"
        embedding = (
            "the embedding left out"
            if not self.rows
            else f"the embedding cut to {self.rows:,} of {model.vocabulary:,} rows"
            if self.rows < model.vocabulary
            else "the whole embedding"
        )
        return f"{model.name}, bf16: {self.layers} of {model.layers} layers, {embedding}: {size}"


def _numel(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def make_weights(cut: Cut, seed: int, device: torch.device | str = "cpu") -> Tensors:
    """The weights at the start: the same in every process, on devices of one kind."""
    random = torch.Generator(device).manual_seed(seed)
    if torch.device(device).type == "cpu":
        return {
            name: torch.randn(shape, generator=random).mul_(0.02).to(torch.bfloat16)
            for name, shape in cut.shapes.items()
        }
    return {
        name: torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(
            0.0, 0.02, generator=random
        )
        for name, shape in cut.shapes.items()
    }


def train_step(tensors: Tensors, density: float, random: torch.Generator) -> None:
    """Move about this share of all elements by one unit in the last place, in place.

    On the device of the tensors and of `random`. The elements are drawn over all tensors alike:
    a few thousand in half a milliard leave most of the small tensors alone. Few are drawn with
    replacement, as many as leave `density` distinct ones to expect.
    """
    flat = [tensor.view(torch.int16).view(-1) for tensor in tensors.values()]
    device = flat[0].device
    if density > _DRAW_UP_TO:
        for bits in flat:
            for start in range(0, bits.numel(), _CHUNK):
                part = bits[start : start + _CHUNK]
                coin = torch.rand(part.numel(), device=device, generator=random)
                part.bitwise_xor_((coin < density).to(torch.int16))
        return
    numel = sum(bits.numel() for bits in flat)
    drawn = max(round(-math.log1p(-density) * numel), 1)
    at = torch.randint(numel, (drawn,), device=device, generator=random).sort().values
    ends = torch.tensor([bits.numel() for bits in flat], device=device).cumsum(0)
    stops = torch.searchsorted(at, ends).tolist()
    first = start = 0
    for bits, stop in zip(flat, stops, strict=True):
        if stop > first:
            here = at[first:stop] - start
            bits.index_copy_(0, here, bits.index_select(0, here) ^ 1)
        first, start = stop, start + bits.numel()
