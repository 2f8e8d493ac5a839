"""An engine's rank holds just what its layout says, for every family, shared in every way."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
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

from layouts import contents
from sparsecast import config_manifest, engine_layout
from sparsecast.messages.errors import ManifestMismatch, SettingsError
from sparsecast.messages.layout import require_whole
from sparsecast.messages.manifest import Manifest, TensorSpec
from sparsecast.pipeline.delta import manifest_of, named_tensors

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


@cache
def published(family: str) -> dict[str, Tensor]:
    """What a trainer publishes of a tiny random model, in bfloat16."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family], dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()  # biases and norms too: no two elements alike
    tensors = named_tensors(model)
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


def engine(family: str, size: int, rank: int, *, fused: bool, ep: bool) -> dict[str, Tensor]:
    """What an engine's rank loads of a checkpoint: chunks of its tensors, concatenated."""
    config, tensors = FAMILIES[family], dict(published(family))
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


CASES = [
    pytest.param(family, fused, ep, size, id=f"{family}-{how}{'-ep' if ep else ''}-tp{size}")
    for family in FAMILIES
    for fused, how in ((True, "fused"), (False, "plain"))
    for ep in ((False, True) if family in EXPERTS else (False,))
    for size in (1, 2, 4, 8)
]


@pytest.mark.parametrize(("family", "fused", "ep", "size"), CASES)
def test_a_rank_holds_what_its_engine_loads(family: str, fused: bool, ep: bool, size: int) -> None:
    """Chunked, fused and stacked by hand as an engine does it, and copied as the layout says, a
    rank's tensors are the same, bit by bit; the ranks together count every element once. With
    eight query heads and two key-value heads, four and eight ranks have copies of these."""
    tensors = published(family)
    manifest = manifest_of(tensors)
    layouts = []
    for rank in range(size):
        layout = engine_layout(
            FAMILIES[family], manifest, tp_size=size, tp_rank=rank, fused=fused, ep=ep
        )
        layout.require_fit(manifest)
        layouts.append(layout)
        expected = engine(family, size, rank, fused=fused, ep=ep)
        found = contents(layout, tensors)
        assert sorted(found) == sorted(expected)
        for name, tensor in expected.items():
            assert found[name].shape == tensor.shape, name
            assert torch.equal(found[name].view(torch.int16), tensor.view(torch.int16)), name
    require_whole(layouts, manifest)


@pytest.mark.parametrize("family", [name for name in FAMILIES if not name.endswith("-singly")])
def test_the_manifest_of_a_config_is_that_of_its_model(family: str) -> None:
    """A worker that has a config only knows what the trainer publishes, ties and all."""
    assert config_manifest(FAMILIES[family]) == manifest_of(published(family))


def test_one_rank_that_fuses_nothing_and_pads_nothing_is_the_identity() -> None:
    """A single rank with the trainer's tensors needs no layout, and the layout says so."""
    manifest = config_manifest(FAMILIES["qwen3-moe"])
    plain = engine_layout(FAMILIES["qwen3-moe"], manifest, fused=False, vocabulary_multiple=1)
    assert sorted(spec.name for spec in plain.tensors) == sorted(s.name for s in manifest.tensors)
    plain.require_fit(manifest)
    assert engine_layout(
        FAMILIES["qwen3"], config_manifest(FAMILIES["qwen3"]), fused=False, vocabulary_multiple=1
    ).is_identity(config_manifest(FAMILIES["qwen3"]))


def test_local_names_are_the_engines() -> None:
    """An engine keeps its experts elsewhere: the layout names them so, and the trainer's stay."""
    config, manifest = FAMILIES["qwen3-moe"], config_manifest(FAMILIES["qwen3-moe"])
    renamed = engine_layout(
        config, manifest, rename=lambda name: name.replace(".experts.", ".experts.routed_experts.")
    )
    renamed.require_fit(manifest)
    names = {spec.name for spec in renamed.tensors}
    assert "model.layers.0.mlp.experts.routed_experts.w13_weight" in names
    with pytest.raises(SettingsError, match="two local tensors the same name"):
        engine_layout(config, manifest, rename=lambda name: "same")
    mapped = engine_layout(config, manifest, rename={"model.norm.weight": "final"})
    assert "final" in {spec.name for spec in mapped.tensors}


@pytest.mark.parametrize(
    ("family", "options", "names"),
    [
        ("llama", {"tp_size": 3}, r"embed_tokens.weight': 100 rows, padded to 128,"),
        ("llama", {"tp_size": 16}, r"q_proj.weight': 48 rows of 8 heads \(8 query, 2 key-value\)"),
        ("llama", {"tp_size": 2, "tp_rank": 2}, "no rank 2 of 2"),
        ("llama", {"tp_rank": -1}, "no rank -1 of 1"),
        ("llama", {"vocabulary_multiple": 0}, "at least 1, not 0"),
    ],
    ids=["vocabulary", "heads", "rank", "negative", "multiple"],
)
def test_what_cannot_be_shared_is_named(family: str, options: dict[str, Any], names: str) -> None:
    """Sizes that the ranks do not divide are refused with the tensor, before anything is held."""
    config = FAMILIES[family]
    with pytest.raises(SettingsError, match=names):
        engine_layout(config, config_manifest(config), **options)


def test_widths_that_ranks_do_not_divide_are_refused() -> None:
    """Eight experts or 48 rows of gate are no multiple of the ranks: the tensor is named."""
    sizes = {**SIZES, "hidden_size": 40, "num_attention_heads": 10, "num_key_value_heads": 5}
    five = {"tp_size": 5, "vocabulary_multiple": 5}
    dense = LlamaConfig(**sizes)
    with pytest.raises(SettingsError, match=r"gate_proj.weight' of shape .* 48 indices along"):
        engine_layout(dense, config_manifest(dense), **five)
    experts = MixtralConfig(**sizes, num_local_experts=8)
    for ep, names in ((True, "8 indices along dimension 0"), (False, "48 indices along")):
        with pytest.raises(SettingsError, match=names):
            engine_layout(experts, config_manifest(experts), ep=ep, **five)
    singly = [s for s in manifest_of(published("mixtral-singly")).tensors if ".experts." in s.name]
    manifest = Manifest(tensors=tuple(singly))
    with pytest.raises(SettingsError, match="8 experts cannot be shared evenly by 16"):
        engine_layout(FAMILIES["mixtral"], manifest, tp_size=16, ep=True)


def test_models_and_tensors_without_a_rule_are_refused() -> None:
    """A family that nobody described, or a tensor that none of these has, is named."""
    config = FAMILIES["llama"]
    manifest = config_manifest(config)
    other = Manifest(tensors=(*manifest.tensors, TensorSpec("model.vision.patch", "int8", (3,))))
    with pytest.raises(SettingsError, match=r"hold tensor 'model.vision.patch'"):
        engine_layout(config, other)
    with pytest.raises(SettingsError, match="a model of type 'gpt2'"):
        engine_layout(PretrainedConfig(model_type="gpt2"), manifest)


def test_a_fused_tensor_of_which_a_part_is_missing_is_refused() -> None:
    """The manifest leaves out keys: nothing would fill the rows between queries and values."""
    config = FAMILIES["qwen2"]
    kept = [s for s in config_manifest(config).tensors if "layers.1.self_attn.k_proj" not in s.name]
    with pytest.raises(ManifestMismatch, match=r"'model.layers.1.self_attn.qkv_proj.weight' is in"):
        engine_layout(config, Manifest(tensors=tuple(kept)))
