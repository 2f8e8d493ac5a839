"""Language models of the benches, from a config, and how an optimizer step changes their bits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

#: What Qwen2Config is told. 0.5b and 7b are Qwen2.5's.
CONFIGS: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "0.5b": {
        "vocab_size": 151_936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "7b": {
        "vocab_size": 152_064,
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
}


def make_model(name: str, device: torch.device, seed: int) -> nn.Module:
    """A Qwen2 of this size, bf16, on `device`: the same bits in every process of one machine."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(**CONFIGS[name], use_cache=False)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model: nn.Module = Qwen2ForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.eval().requires_grad_(False)
    fill(dict(model.named_parameters()), seed)
    return model


def describe(model: nn.Module) -> str:
    """One sentence about its size."""
    found = [p for _, p in model.named_parameters()]
    numel = sum(p.numel() for p in found)
    nbytes = sum(p.nbytes for p in found)
    return f"{len(found)} tensors, {numel:,} elements, bf16, {nbytes / 1e6:,.1f} MB"


def empty(shapes: Mapping[str, tuple[int, ...]], device: torch.device) -> dict[str, Tensor]:
    """Tensors of these shapes, bf16."""
    return {
        name: torch.empty(shape, dtype=torch.bfloat16, device=device)
        for name, shape in shapes.items()
    }


@torch.no_grad()
def fill(tensors: Mapping[str, Tensor], seed: int) -> None:
    """Normal weights of deviation 0.02, norms of one, drawn on the tensors' device."""
    random: torch.Generator | None = None
    for name, tensor in tensors.items():
        random = random or torch.Generator(tensor.device).manual_seed(seed)
        if name.endswith("norm.weight"):
            tensor.fill_(1)
        else:
            tensor.normal_(0, 0.02, generator=random)


@torch.no_grad()
def change(tensors: Mapping[str, Tensor], density: float, random: torch.Generator) -> None:
    """Move about this share of the elements by one unit in the last place, in place.

    Drawn with replacement, as many as leave `density` distinct ones to expect. `random` is of the
    tensors' device.
    """
    share = -math.log1p(-min(density, 1 - 1e-9))
    for tensor in tensors.values():
        bits = tensor.view(torch.int16).view(-1)
        drawn = max(round(share * bits.numel()), 1)
        at = torch.randint(bits.numel(), (drawn,), generator=random, device=tensor.device)
        bits.index_copy_(0, at, bits.index_select(0, at) ^ 1)
