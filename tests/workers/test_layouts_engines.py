"""An engine's rank holds just what its layout says, for every family, shared in every way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, MixtralConfig, PretrainedConfig

from engines import EXPERTS, FAMILIES, SIZES, loaded, published
from layouts import contents
from sparsecast import config_manifest, engine_layout
from sparsecast.messages.errors import ManifestMismatch, SettingsError
from sparsecast.messages.layout import require_whole
from sparsecast.messages.manifest import Manifest, TensorSpec
from sparsecast.pipeline.delta import manifest_of

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
        expected = loaded(family, tensors, size, rank, fused=fused, ep=ep)
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
