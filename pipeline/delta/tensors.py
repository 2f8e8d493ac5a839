"""Which tensors a model has, which of them can be published, and their manifest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NoReturn

import torch
from torch import Tensor, nn

from ...messages.errors import ManifestMismatch, UnsupportedTensor
from ...messages.manifest import ITEMSIZE, Manifest, TensorSpec

#: A model, or its tensors by name.
Model = nn.Module | Mapping[str, Tensor]
Rename = Callable[[str], str] | Mapping[str, str]
Dtypes = torch.dtype | Mapping[str, torch.dtype] | None

_DTYPES = {name: getattr(torch, name) for name in ITEMSIZE if hasattr(torch, name)}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class Named(dict[str, Tensor]):
    """Tensors by name as a Lookup gave them: a dict that refuses to be changed.

    `token` is the same object for as long as the Lookup finds all of them in the same memory, with
    the same names, shapes, strides and dtypes: caches of addresses are keyed on it.
    """

    __slots__ = ("__weakref__", "manifests", "token")

    token: object
    #: Their manifests, by the dtypes asked for, as they become known.
    manifests: dict[object, Manifest]

    def _refuse(self, *args: object, **kwargs: object) -> NoReturn:
        raise TypeError("these tensors are shared with others: change a copy, dict(tensors)")

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse


# ---- manifests


def dtype_of(spec: TensorSpec) -> torch.dtype:
    """The torch dtype of a manifest entry; UnsupportedTensor if this torch lacks it."""
    found: torch.dtype | None = _DTYPES.get(spec.dtype)
    if found is None:
        raise UnsupportedTensor(spec.name, f"this torch ({torch.__version__}) has no {spec.dtype}")
    return found


def cast_to(name: str, tensor: Tensor, dtype: Dtypes) -> torch.dtype:
    """The dtype in which a tensor is published; only floating ones are cast."""
    wanted = dtype.get(name) if isinstance(dtype, Mapping) else dtype
    if wanted is None or not tensor.is_floating_point():
        return tensor.dtype
    if not wanted.is_floating_point:
        raise UnsupportedTensor(
            name, f"cannot be published as {wanted}: weights are cast to floating dtypes only"
        )
    return wanted


def manifest_of(tensors: Mapping[str, Tensor], *, dtype: Dtypes = None) -> Manifest:
    """The manifest of these tensors as they are published; UnsupportedTensor names a bad one."""
    if not isinstance(tensors, Named):
        return _manifest_of(tensors, dtype)
    asked = tuple(dtype.items()) if isinstance(dtype, Mapping) else dtype
    found = tensors.manifests.get(asked)
    if found is None:
        found = tensors.manifests[asked] = _manifest_of(tensors, dtype)
    return found


def _manifest_of(tensors: Mapping[str, Tensor], dtype: Dtypes) -> Manifest:
    if isinstance(dtype, Mapping):
        for name in dtype:
            if name not in tensors:
                raise UnsupportedTensor(name, "is in the dtype map, and no tensor is called so")
    specs = []
    for name, tensor in tensors.items():
        _require_plain(name, tensor)
        published = cast_to(name, tensor, dtype)
        spelled = _NAMES.get(published)
        if spelled is None:
            raise UnsupportedTensor(
                name, f"has dtype {published}; elements of 1, 2, 4 or 8 bytes can be published"
            )
        specs.append(TensorSpec(name, spelled, tuple(tensor.shape)))
    return Manifest(tensors=tuple(specs))


def require_manifest(
    tensors: Mapping[str, Tensor], manifest: Manifest, *, dtype: Dtypes = None
) -> None:
    """ManifestMismatch naming the first tensor that is not as the manifest says."""
    found = manifest_of(tensors, dtype=dtype)
    if found is not manifest and found.hash != manifest.hash:
        manifest.require_same(found)


def require_hash(manifest_hash: str, manifest: Manifest, what: str) -> None:
    """ManifestMismatch unless `manifest_hash` names `manifest`."""
    if manifest_hash != manifest.hash:
        raise ManifestMismatch(
            f"{what} is for manifest {manifest_hash}, the weights are {manifest.hash}: another "
            "tensor name, order, dtype or shape"
        )


# ---- choosing


def named_tensors(
    source: Model,
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    rename: Rename | None = None,
) -> dict[str, Tensor]:
    """The tensors of a model by name, as they are now: look them up anew at every use.

    A Module means its state_dict: parameters and persistent buffers, "_orig_mod." stripped from
    names; tensors that are tied (one memory) come once, under the first name. `include` and
    `exclude` are glob patterns on names, `rename` a function or a mapping applied last. The result
    shares memory with the model and is detached. UnsupportedTensor names what cannot be published:
    meta, sparse or quantised tensors, DTensors, tensors that overlap in memory, a PEFT model unless
    `include` picks adapters only.
    """
    chosen = choose(source, include=include, exclude=exclude)
    return renamed(distinct(chosen), rename)


def choose(
    source: Model,
    *,
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
) -> dict[str, object]:
    """What the patterns pick, before anything else is asked of it."""
    return pick(source, given_by(source), include=include, exclude=exclude)


def given_by(source: Model) -> dict[str, object]:
    """All that there is to pick from; of a Module what its state_dict has."""
    if isinstance(source, nn.Module):
        return {
            name.replace("_orig_mod.", ""): value
            for name, value in source.state_dict(keep_vars=True).items()
            # In this order: to ask a DTensor what it is takes microseconds.
            if not name.endswith("_extra_state") or isinstance(value, Tensor)
        }
    given: dict[str, object] = {
        name.replace("_orig_mod.", ""): value for name, value in source.items()
    }
    if len(given) != len(source):
        raise UnsupportedTensor(
            _first_repeated(name.replace("_orig_mod.", "") for name in source),
            'stands for two tensors once "_orig_mod." is stripped',
        )
    return given


def pick(
    source: Model,
    given: Mapping[str, object],
    *,
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
) -> dict[str, object]:
    """What the patterns pick of what a source has given."""
    chosen = {
        name: value
        for name, value in given.items()
        if (include is None or _matches(name, include))
        and not (exclude is not None and _matches(name, exclude))
    }
    _refuse_peft(source, given, chosen)
    return chosen


def distinct(chosen: Mapping[str, object]) -> dict[str, Tensor]:
    """What was chosen as plain tensors, tied ones once; UnsupportedTensor if one cannot be."""
    tensors: dict[str, Tensor] = {}
    seen: dict[tuple[object, ...], str] = {}
    for name, value in chosen.items():
        tensor = _require_plain(name, value)
        if tensor.numel():
            place = (
                tensor.untyped_storage().data_ptr(),
                tensor.storage_offset(),
                tensor.dtype,
                tensor.shape,
                tensor.stride(),
            )
            if seen.setdefault(place, name) != name:
                continue
        tensors[name] = tensor
    _refuse_overlaps(tensors)
    return tensors


def renamed(tensors: dict[str, Tensor], rename: Rename | None) -> dict[str, Tensor]:
    """The same under their new names; UnsupportedTensor if two would be called the same."""
    if rename is None:
        return tensors
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        new = rename.get(name, name) if isinstance(rename, Mapping) else rename(name)
        if new in found:
            raise UnsupportedTensor(name, f"is renamed to {new!r}, which another tensor is called")
        found[new] = tensor
    return found


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _first_repeated(names: Iterator[str]) -> str:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    raise LookupError("no name is repeated")


def _is_adapter(name: str) -> bool:
    return "lora_" in name or ".modules_to_save." in name


def _refuse_peft(source: object, given: Mapping[str, object], chosen: Mapping[str, object]) -> None:
    marked = [name for name in given if _is_adapter(name) or ".base_layer." in name]
    if not marked and not hasattr(source, "peft_config"):
        return
    base = next((name for name in chosen if not _is_adapter(name)), None)
    if base is not None:
        raise UnsupportedTensor(
            base,
            "belongs to a PEFT model, whose base and adapters are separate: choose the adapters "
            'with include=["*lora_*"], or publish model.merge_and_unload()',
        )


def _require_plain(name: str, value: object) -> Tensor:
    """`value` as a plain detached strided tensor over its own memory, or UnsupportedTensor."""
    if not isinstance(value, Tensor):
        raise UnsupportedTensor(name, f"is a {type(value).__name__}, not a tensor")
    if type(value) not in (Tensor, nn.Parameter):
        with torch._C.DisableTorchFunctionSubclass():
            if hasattr(type(value), "__tensor_flatten__") or (
                type(value).__torch_dispatch__ is not Tensor.__torch_dispatch__
            ):
                raise UnsupportedTensor(
                    name,
                    f"is a {type(value).__name__} without plain memory of its own: give its local "
                    "or full tensor (DTensor: to_local() or full_tensor())",
                )
            value = value.detach().as_subclass(Tensor)
    if value.device.type == "meta":
        raise UnsupportedTensor(name, "is on the meta device and has no data: materialise it first")
    if value.layout != torch.strided:
        raise UnsupportedTensor(name, f"has layout {value.layout}: make it dense with to_dense()")
    if value.is_quantized:
        raise UnsupportedTensor(name, "is quantised: give its int_repr() and scales as tensors")
    if value.is_conj() or value.is_neg():
        raise UnsupportedTensor(
            name, "is a lazy conjugate or negation: call resolve_conj() or resolve_neg() first"
        )
    return value.detach()


# ---- memory


def span_nbytes(tensor: Tensor) -> tuple[int, int]:
    """First byte of the tensor in its storage, and the byte after its last."""
    size = tensor.element_size()
    low = int(tensor.storage_offset()) * size
    reach = sum((int(n) - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return low, low + (reach + 1) * size


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements may share memory (expanded, or overlapping windows)."""
    reach = 0
    dims = zip(tensor.stride(), tensor.shape, strict=True)
    for stride, size in sorted(dim for dim in dims if dim[1] > 1):
        if stride <= reach:
            return True
        reach += (size - 1) * stride
    return False


def _refuse_overlaps(tensors: Mapping[str, Tensor]) -> None:
    storages: dict[tuple[torch.device, int], list[tuple[int, int, str]]] = {}
    for name, tensor in tensors.items():
        if tensor.numel():
            key = (tensor.device, tensor.untyped_storage().data_ptr())
            storages.setdefault(key, []).append((*span_nbytes(tensor), name))
    for spans in storages.values():
        active: list[tuple[int, int, str]] = []
        for span in sorted(spans):
            active = [other for other in active if other[1] > span[0]]
            for other in active:
                if not _interleaved(tensors[other[2]], tensors[span[2]]):
                    raise UnsupportedTensor(
                        span[2],
                        f"shares part of its memory with {other[2]!r}: publish only one of them, "
                        "or their common base",
                    )
            active.append(span)


def _interleaved(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one storage keep apart although their spans cross (say, columns).

    True if for some pitch each keeps within its own part of every row of that pitch.
    """
    pitches = {
        stride * tensor.element_size()
        for tensor in (one, other)
        for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
        if size > 1 and stride > 0
    }
    for pitch in pitches:
        parts = []
        for tensor in (one, other):
            size = tensor.element_size()
            low = tensor.storage_offset() * size % pitch
            inner = sum(
                (n - 1) * stride * size
                for n, stride in zip(tensor.shape, tensor.stride(), strict=True)
                if stride * size % pitch
            )
            parts.append((low, low + inner + size))
        (low1, high1), (low2, high2) = parts
        if max(high1, high2) <= pitch and (high1 <= low2 or high2 <= low1):
            return True
    return False
