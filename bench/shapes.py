"""The tensors of Qwen2.5-0.5B, cut to a size, and what an optimizer step does to them.

Hidden 896, intermediate 4864, 14 heads and 2 key-value heads of 64, biases on q, k and v, 24
layers, vocabulary 151,936 with tied embeddings: 290 tensors, 494 M elements, all bf16.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

HIDDEN = 896
INTERMEDIATE = 4864
KEY_VALUE = 2 * 64
LAYERS = 24
VOCABULARY = 151_936

Tensors = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Cut:
    """How much of the model is there: whole layers, and rows of the embedding."""

    layers: int
    rows: int

    @classmethod
    def of_elements(cls, elements: int) -> Cut:
        """As many whole layers as fit, the rest as rows of the embedding."""
        layers = min(elements // _numel_of_layer(), LAYERS)
        rest = elements - layers * _numel_of_layer() - HIDDEN
        return cls(layers, max(min(rest // HIDDEN, VOCABULARY), 0))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape, in the order of the model's state_dict."""
        found: dict[str, tuple[int, ...]] = {}
        if self.rows:
            found["model.embed_tokens.weight"] = (self.rows, HIDDEN)
        for layer in range(self.layers):
            for name, shape in _LAYER.items():
                found[f"model.layers.{layer}.{name}"] = shape
        found["model.norm.weight"] = (HIDDEN,)
        return found

    @property
    def numel(self) -> int:
        """Elements of all tensors."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def describe(self) -> str:
        """One sentence about what was cut."""
        embedding = (
            "the embedding left out"
            if not self.rows
            else f"the embedding cut to {self.rows:,} of {VOCABULARY:,} rows"
            if self.rows < VOCABULARY
            else "the whole embedding"
        )
        return (
            f"Qwen2.5-0.5B, bf16: {self.layers} of {LAYERS} layers, {embedding}: "
            f"{len(self.shapes)} tensors, {self.numel:,} elements, {2 * self.numel / 1e6:.1f} MB"
        )


_LAYER: dict[str, tuple[int, ...]] = {
    "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
    "self_attn.q_proj.bias": (HIDDEN,),
    "self_attn.k_proj.weight": (KEY_VALUE, HIDDEN),
    "self_attn.k_proj.bias": (KEY_VALUE,),
    "self_attn.v_proj.weight": (KEY_VALUE, HIDDEN),
    "self_attn.v_proj.bias": (KEY_VALUE,),
    "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
    "mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
    "input_layernorm.weight": (HIDDEN,),
    "post_attention_layernorm.weight": (HIDDEN,),
}


def _numel_of_layer() -> int:
    return sum(math.prod(shape) for shape in _LAYER.values())


def make_weights(cut: Cut, seed: int) -> Tensors:
    """The weights at the start: the same in every process."""
    random = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=random).mul_(0.02).to(torch.bfloat16)
        for name, shape in cut.shapes.items()
    }


def train_step(tensors: Tensors, density: float, random: torch.Generator) -> None:
    """Move about this share of the elements by one unit in the last place, in place.

    Drawn with replacement, as many as leave `density` distinct ones to expect.
    """
    share = -math.log1p(-min(density, 1 - 1e-9))
    for tensor in tensors.values():
        bits = tensor.view(torch.int16).view(-1)
        drawn = max(round(share * bits.numel()), 1)
        at = torch.randint(bits.numel(), (drawn,), generator=random)
        bits.index_copy_(0, at, bits.index_select(0, at) ^ 1)
