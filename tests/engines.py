"""Engines by hand: tiny models of each family, and what an engine's rank loads of a checkpoint.

Nothing here knows of layouts: chunks of a checkpoint's tensors, concatenated and stacked.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from sparsecast.pipeline.delta import named_tensors

SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 6,
}
FAMILIES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "llama-tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**{**SIZES, "head_dim": 4}),
    "qwen3": Qwen3Config(**SIZES, tie_word_embeddings=True),
    "qwen3-moe": Qwen3MoeConfig(
        **{**SIZES, "num_hidden_layers": 3}, num_experts=8, moe_intermediate_size=16,
        num_experts_per_tok=2, mlp_only_layers=[1],
    ),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=8),
}  # fmt: skip
#: The same models with their experts one by one, as their checkpoints and older transformers have.
FAMILIES |= {f"{name}-singly": FAMILIES[name] for name in ("qwen3-moe", "mixtral")}
EXPERTS = [name for name in FAMILIES if "moe" in name or "mixtral" in name]


def random_model(family: str, dtype: torch.dtype) -> nn.Module:
    """A tiny model with random weights, the same at every call."""
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(FAMILIES[family], dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()  # biases and norms too: no two elements alike
    return model


@cache
def published(family: str) -> dict[str, Tensor]:
    """What a trainer publishes of such a model, in bfloat16."""
    tensors = named_tensors(random_model(family, torch.bfloat16))
    return singly(tensors, family) if family.endswith("-singly") else tensors


def singly(tensors: Mapping[str, Tensor], family: str) -> dict[str, Tensor]:
    """Stacked experts one by one, under the names of the family's checkpoints."""
    mixtral = family.startswith("mixtral")
    gate, up, down = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    found = {}
    for name, tensor in tensors.items():
        if mixtral:
            name = name.replace(".mlp.", ".block_sparse_moe.")
        if name.endswith(".experts.gate_up_proj"):
            for e, both in enumerate(tensor):
                path = name.replace("gate_up_proj", str(e))
                found[f"{path}.{gate}.weight"], found[f"{path}.{up}.weight"] = both.chunk(2)
        elif name.endswith(".experts.down_proj"):
            for e, one in enumerate(tensor):
                found[f"{name.replace('down_proj', str(e))}.{down}.weight"] = one
        else:
            found[name] = tensor
    return found


def loaded(
    family: str, tensors: Mapping[str, Tensor], size: int, rank: int, *, fused: bool, ep: bool
) -> dict[str, Tensor]:
    """What an engine's rank loads of a checkpoint with these tensors."""
    config = FAMILIES[family]
    held: dict[str, Tensor] = {}

    def rows(tensor: Tensor) -> Tensor:
        return tensor.chunk(size)[rank]

    def columns(tensor: Tensor) -> Tensor:
        return tensor.chunk(size, -1)[rank]

    def keys(tensor: Tensor) -> Tensor:
        heads = config.num_key_value_heads
        return rows(tensor) if heads >= size else tensor.chunk(heads)[rank * heads // size]

    def gate_up(both: Tensor) -> Tensor:  # [experts, gate and up, hidden]
        if ep:
            return rows(both)
        return torch.cat([half.chunk(size, 1)[rank] for half in both.chunk(2, 1)], 1)

    def stacked(path: str, name: str) -> Tensor:
        return torch.stack([tensors[f"{path}.{e}.{name}.weight"] for e in range(8)])

    for name in tensors:
        prefix, _, kind = name.rpartition(".")
        path = prefix.rpartition(".")[0]
        if ".experts." in name:
            continue
        if "embed_tokens" in name or "lm_head" in name:
            held[name] = rows(pad(tensors[name], (0, 0, 0, 28)))  # 100 rows, padded to 128
        elif "q_proj" in name:
            parts = [cut(tensors[f"{path}.{p}.{kind}"]) for p, cut in
                     (("q_proj", rows), ("k_proj", keys), ("v_proj", keys))]  # fmt: skip
            if fused:
                held[f"{path}.qkv_proj.{kind}"] = torch.cat(parts)
            else:
                for p, part in zip("qkv", parts, strict=True):
                    held[f"{path}.{p}_proj.{kind}"] = part
        elif "gate_proj" in name:
            parts = [rows(tensors[f"{path}.{p}_proj.{kind}"]) for p in ("gate", "up")]
            if fused:
                held[f"{path}.gate_up_proj.{kind}"] = torch.cat(parts)
            else:
                held[name], held[name.replace("gate", "up")] = parts
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            held[name] = columns(tensors[name])
        elif not any(p in name for p in ("k_proj", "v_proj", "up_proj")):
            held[name] = tensors[name]
    for name in tensors:
        path, _, last = name.rpartition(".")
        if last == "gate_up_proj":
            down = tensors[f"{path}.down_proj"]
            names = ("w13_weight", "w2_weight") if fused else ("gate_up_proj", "down_proj")
            held[f"{path}.{names[0]}"] = gate_up(tensors[name])
            held[f"{path}.{names[1]}"] = rows(down) if ep else columns(down)
        elif ".experts." in name and not last.endswith("_proj"):
            path = path.split(".experts.")[0] + ".experts"
            gate, up, down_ = ("w1", "w3", "w2") if "mixtral" in family else (
                "gate_proj", "up_proj", "down_proj")  # fmt: skip
            if fused:
                both = torch.cat([stacked(path, gate), stacked(path, up)], 1)
                held[f"{path}.w13_weight"] = gate_up(both)
                down = stacked(path, down_)
                held[f"{path}.w2_weight"] = rows(down) if ep else columns(down)
            elif ep:
                expert = int(name.split(".")[-3])
                if expert in torch.arange(8).chunk(size)[rank]:
                    held[name] = tensors[name]
            else:
                held[name] = columns(tensors[name]) if down_ in name else rows(tensors[name])
    if fused and family.startswith("mixtral"):
        held = {n.replace(".mlp.", ".block_sparse_moe."): t for n, t in held.items()}
    return held
