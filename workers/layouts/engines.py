"""The layout of a rank of an inference engine, from a Hugging Face config.

Names, shapes and shares are those of vLLM and SGLang. The source, in vllm/model_executor/layers:
QKVParallelLinear, MergedColumnParallelLinear and RowParallelLinear in linear.py,
VocabParallelEmbedding in vocab_parallel_embedding.py, FusedMoE (w13_weight, w2_weight) and
determine_expert_map in fused_moe/layer.py; beside it, the packed_modules_mapping of each family in
models/.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec
import torch

from ...messages.errors import SettingsError
from ...messages.layout import Layout, Padding, Part
from ...messages.manifest import Manifest, TensorSpec
from ...pipeline.delta.tensors import Rename

#: What config.model_type may be.
FAMILIES = frozenset({"llama", "qwen2", "qwen3", "qwen3_moe", "mixtral"})

_EXPERT = re.compile(r"(.+\.experts)\.(\d+)")
#: The matrices of an expert of Mixtral by the names of the other families.
_MIXTRAL = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def config_manifest(config: Any, *, dtype: torch.dtype = torch.bfloat16) -> Manifest:
    """The manifest of a causal LM as transformers builds it from a config, all in one dtype.

    Tied tensors come once, under the first name. The model is made on the meta device: no memory.
    """
    from transformers import AutoModelForCausalLM  # takes a second to import: not for every worker

    with torch.device("meta"):
        build: Any = AutoModelForCausalLM.from_config
        model: torch.nn.Module = build(config, dtype=dtype)
    first: dict[int, TensorSpec] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        spec = TensorSpec(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        first.setdefault(id(tensor), spec)
    return Manifest(tensors=tuple(first.values()))


def engine_layout(
    config: Any,
    manifest: Manifest,
    *,
    tp_size: int = 1,
    tp_rank: int = 0,
    fused: bool = True,
    ep: bool = False,
    vocabulary_multiple: int = 64,
    rename: Rename | None = None,
) -> Layout:
    """What rank `tp_rank` of `tp_size` holds of a model: Llama, Qwen2, Qwen3, Qwen3-MoE, Mixtral.

    `config` is the transformers config, `manifest` what the trainer publishes, under the names of
    transformers (config_manifest() gives it); experts may be published one by one or stacked.

    - q, k, v, gate and up are cut by rows, o and down by columns; biases go with the rows, else
      whole to all. Where there are more ranks than key-value heads, neighbours hold the same head.
    - Embedding and head are padded to a multiple of `vocabulary_multiple` rows, then cut by rows.
    - Norms and routers, and copies of key-value heads, are held by several and counted by the
      first.
    - Each expert is cut as gate, up and down are; with `ep`, each rank has whole experts instead,
      the first ones on the first rank.
    - `fused`: as engines hold it, q, k, v as rows of self_attn.qkv_proj, gate and up of
      mlp.gate_up_proj, experts stacked into experts.w13_weight [experts, gate and up, hidden] and
      experts.w2_weight [experts, hidden, down]; those of Mixtral lie in block_sparse_moe. Else
      every tensor keeps its name.

    `rename`, a function or a mapping, is applied to local names last: where an engine has them
    elsewhere (newer vLLM: experts.routed_experts.w13_weight), or under a prefix.

    SettingsError names a tensor that cannot be shared evenly or has no rule here.
    """
    if config.model_type not in FAMILIES:
        raise SettingsError(
            f"no rule says how engines hold a model of type {config.model_type!r}: "
            f"known are {', '.join(sorted(FAMILIES))}; build its Layout from Parts"
        )
    if not 0 <= tp_rank < tp_size:
        raise SettingsError(f"there is no rank {tp_rank} of {tp_size}: ranks count from 0")
    if vocabulary_multiple < 1:
        raise SettingsError(f"vocabulary_multiple is at least 1, not {vocabulary_multiple}")
    rank = _Rank(config, tp_size, tp_rank, fused, ep, vocabulary_multiple)
    for spec in manifest.tensors:
        rank.place(spec)
    layout = rank.layout(rename)
    layout.require_fit(manifest)
    return layout


class _Rank:
    """What one rank holds, as far as it has been placed."""

    def __init__(
        self, config: Any, tp_size: int, tp_rank: int, fused: bool, ep: bool, multiple: int
    ) -> None:
        self._size, self._rank = tp_size, tp_rank
        self._fused, self._ep, self._multiple = fused, ep, multiple
        self._heads = int(config.num_attention_heads)
        self._kv_heads = int(getattr(config, "num_key_value_heads", None) or self._heads)
        self._mixtral = config.model_type == "mixtral"
        experts: Any = getattr(config, "num_local_experts", None)
        self._experts = int(experts or getattr(config, "num_experts", None) or 0)
        self._parts: list[Part] = []
        self._padding: list[Padding] = []
        #: Of each local tensor: its dtype, and one past the last index that is held so far.
        self._local: dict[str, tuple[str, tuple[int, ...]]] = {}

    def layout(self, rename: Rename | None) -> Layout:
        """All of it, its local tensors under their last names."""

        def named(local: str) -> str:
            if rename is None:
                return local
            return rename.get(local, local) if isinstance(rename, Mapping) else rename(local)

        names = {local: named(local) for local in self._local}
        if len(set(names.values())) < len(names):
            raise SettingsError("`rename` gives two local tensors the same name")
        replace = msgspec.structs.replace
        return Layout(
            tensors=tuple(TensorSpec(names[n], *rest) for n, rest in self._local.items()),
            parts=tuple(replace(part, local=names[part.local]) for part in self._parts),
            padding=tuple(replace(pad, local=names[pad.local]) for pad in self._padding),
        )

    def place(self, spec: TensorSpec) -> None:
        """Hold this rank's share of a published tensor."""
        path, _, leaf = spec.name.rpartition(".")
        module = leaf
        if leaf in ("weight", "bias"):
            path, _, module = path.rpartition(".")
        expert = _EXPERT.fullmatch(path)
        match _MIXTRAL.get(module, module):
            case ("gate_proj" | "up_proj" | "down_proj") as matrix if expert:
                self._place_expert(spec, expert[1], int(expert[2]), matrix)
            case ("gate_up_proj" | "down_proj") as matrix if path.endswith(".experts"):
                self._place_experts(spec, path, matrix)
            case "q_proj" | "k_proj" | "v_proj":
                self._place_heads(spec, f"{path}.qkv_proj.{leaf}", module)
            case "gate_proj" | "up_proj":
                rows = self._share(spec, 0)
                local = f"{path}.gate_up_proj.{leaf}" if self._fused else spec.name
                after = len(rows) if self._fused and module == "up_proj" else 0
                self._hold(spec, local, {0: rows}, to={0: after})
            case "o_proj" | "down_proj" if leaf == "weight":
                self._hold(spec, spec.name, {1: self._share(spec, 1)})
            case "embed_tokens" | "lm_head":
                self._place_vocabulary(spec)
            case "o_proj" | "down_proj" | "gate":
                self._hold(spec, spec.name, {}, counted=self._rank == 0)
            case _ if module.endswith("norm"):
                self._hold(spec, spec.name, {}, counted=self._rank == 0)
            case _:
                raise SettingsError(
                    f"no rule says how engines hold tensor {spec.name!r}: leave it out of the "
                    "manifest, or build the Layout from Parts"
                )

    def _place_heads(self, spec: TensorSpec, fused: str, module: str) -> None:
        queries, keys, size = self._heads, self._kv_heads, self._size
        heads = queries if module == "q_proj" else keys
        even = queries % size == 0 and (keys % size == 0 or size % keys == 0)
        if not even or spec.shape[0] % heads:
            raise SettingsError(
                f"tensor {spec.name!r}: {spec.shape[0]} rows of {heads} heads ({queries} query, "
                f"{keys} key-value) cannot be shared evenly by {size} ranks"
            )
        height = spec.shape[0] // heads
        copies, each = max(1, size // heads), max(1, heads // size)
        first = self._rank // copies * each
        rows = range(first * height, (first + each) * height)
        before = {"q_proj": 0, "k_proj": queries // size}
        before["v_proj"] = before["k_proj"] + max(1, keys // size)
        local, after = (fused, before[module] * height) if self._fused else (spec.name, 0)
        self._hold(spec, local, {0: rows}, to={0: after}, counted=self._rank % copies == 0)

    def _place_vocabulary(self, spec: TensorSpec) -> None:
        size = spec.shape[0]
        padded = -(-size // self._multiple) * self._multiple
        if padded % self._size:
            raise SettingsError(
                f"tensor {spec.name!r}: {size} rows, padded to {padded}, cannot be shared evenly "
                f"by {self._size} ranks; give another vocabulary_multiple"
            )
        each = padded // self._size
        rows = range(size)[self._rank * each : (self._rank + 1) * each]
        self._hold(spec, spec.name, {0: rows})
        if len(rows) < each:
            rest = spec.shape[1:]
            self._pad(spec.name, (len(rows), *(0 for _ in rest)), (each - len(rows), *rest))

    def _place_expert(self, spec: TensorSpec, path: str, number: int, matrix: str) -> None:
        mine, cuts = range(self._experts), {}
        if self._ep:
            mine = self._share(spec, None, mine)
            if number not in mine:
                return
        else:
            dim = 1 if matrix == "down_proj" else 0
            cuts = {dim: self._share(spec, dim)}
        if not self._fused:
            self._hold(spec, spec.name, cuts)
            return
        after = len(cuts.get(0, range(spec.shape[0]))) if matrix == "up_proj" else 0
        local = f"{path}.w2_weight" if matrix == "down_proj" else f"{path}.w13_weight"
        self._hold(spec, local, cuts, to={0: after}, slot=number - mine.start)

    def _place_experts(self, spec: TensorSpec, path: str, matrix: str) -> None:
        cuts = {0: self._share(spec, 0)} if self._ep else {}
        if matrix == "down_proj":
            if not self._ep:
                cuts[2] = self._share(spec, 2)
            self._hold(spec, f"{path}.w2_weight" if self._fused else spec.name, cuts)
            return
        height, odd = divmod(spec.shape[1], 2)
        if odd:
            raise SettingsError(f"tensor {spec.name!r}: {spec.shape[1]} rows are not gate and up")
        for rows in range(height), range(height, 2 * height):
            share = rows if self._ep else self._share(spec, 1, rows)
            local = f"{path}.w13_weight" if self._fused else spec.name
            self._hold(spec, local, {**cuts, 1: share}, to={1: len(share) if rows.start else 0})

    def _share(self, spec: TensorSpec, dim: int | None, of: range | None = None) -> range:
        """This rank's part of the indices along a dimension (None: of the experts)."""
        of = range(spec.shape[dim or 0]) if of is None else of
        if len(of) % self._size:
            what = "experts" if dim is None else f"indices along dimension {dim}"
            raise SettingsError(
                f"tensor {spec.name!r} of shape {list(spec.shape)}: {len(of)} {what} cannot be "
                f"shared evenly by {self._size} ranks"
            )
        each = len(of) // self._size
        return of[self._rank * each : (self._rank + 1) * each]

    def _hold(
        self,
        spec: TensorSpec,
        local: str,
        cuts: Mapping[int, range],
        *,
        to: Mapping[int, int] | None = None,
        slot: int | None = None,
        counted: bool = True,
    ) -> None:
        """Hold what `cuts` leave of a tensor, from `to` on in each dimension, in a stack's slot."""
        kept = [cuts.get(dim, range(size)) for dim, size in enumerate(spec.shape)]
        at = [(to or {}).get(dim, 0) for dim in range(len(kept))]
        stack = [] if slot is None else [slot]
        part = Part(
            tensor=spec.name,
            begin=tuple(k.start for k in kept),
            shape=tuple(len(k) for k in kept),
            local=self._name(local),
            at=(*stack, *at),
            axes=tuple(range(len(stack), len(stack) + len(kept))),
            counted=counted,
        )
        self._parts.append(part)
        self._grow(part, spec.dtype)

    def _pad(self, local: str, at: tuple[int, ...], shape: tuple[int, ...]) -> None:
        pad = Padding(local=self._name(local), at=at, shape=shape)
        self._padding.append(pad)
        self._grow(pad, self._local[pad.local][0])

    def _grow(self, holder: Part | Padding, dtype: str) -> None:
        _, end = self._local.get(holder.local, (dtype, holder.local_box.end))
        grown = tuple(max(pair) for pair in zip(end, holder.local_box.end, strict=True))
        self._local[holder.local] = dtype, grown

    def _name(self, local: str) -> str:
        # Transformers renamed it to mlp; engines have not.
        fused = self._fused and self._mixtral
        return local.replace(".mlp.", ".block_sparse_moe.") if fused else local
