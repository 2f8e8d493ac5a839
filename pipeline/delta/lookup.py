"""Finding a model's tensors again at every round, for the price of seeing that nothing moved."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, compress
from operator import attrgetter, is_
from typing import Any, cast

from torch import Tensor, nn

from ...messages.manifest import Manifest
from .tensors import Dtypes, Model, Named, Rename, distinct, given_by, manifest_of, pick, renamed

_PLAIN = frozenset((Tensor, nn.Parameter))
_dtype = attrgetter("dtype")
_OVERRIDABLE = ("state_dict", "_save_to_state_dict", "get_extra_state")


class _Facts:
    """Where chosen tensors lie and how: pointers, shapes, strides, dtypes, in their order."""

    __slots__ = ("_contiguous", "_dtypes", "_empty", "_pointers", "_shapes", "_strided")

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._pointers = list(map(Tensor.data_ptr, tensors))
        self._shapes = list(map(Tensor.size, tensors))
        self._dtypes = list(map(_dtype, tensors))
        # Shapes tell the strides of contiguous tensors, but for dimensions of one, which are idle.
        self._contiguous = list(map(Tensor.is_contiguous, tensors))
        self._strided = [
            (at, t.stride()) for at, t in enumerate(tensors) if not self._contiguous[at]
        ]
        # A pointer tells the device, but for tensors that have no memory.
        self._empty = [(at, t.device) for at, t in enumerate(tensors) if not self._pointers[at]]

    def hold(self, tensors: Sequence[Tensor]) -> bool:
        """Whether they are still true of these tensors."""
        return (
            list(map(Tensor.data_ptr, tensors)) == self._pointers
            and list(map(Tensor.size, tensors)) == self._shapes
            and list(map(_dtype, tensors)) == self._dtypes
            and list(map(Tensor.is_contiguous, tensors)) == self._contiguous
            and all(tensors[at].stride() == stride for at, stride in self._strided)
            and all(tensors[at].device == device for at, device in self._empty)
        )


class _ModulePath:
    """The way to the chosen tensors of a module through the dicts of its submodules.

    What state_dict() would walk is walked once; later every dict is only seen to be as it was.
    """

    def __init__(self, root: nn.Module, chosen: Mapping[str, object]) -> None:
        self._root = root
        dicts: list[dict[str, Any]] = []
        sets: list[set[str]] = []
        hooks: list[dict[int, Any]] = []
        # Beside the tensors, what may turn into something else in its place: the dicts that are
        # not empty, modules, and None.
        rest: list[tuple[dict[str, Any], str]] = []
        self.usable = "state_dict" not in root.__dict__
        for module in root.modules():
            kind = type(module)
            self.usable &= all(getattr(kind, n) is getattr(nn.Module, n) for n in _OVERRIDABLE)
            own = cast("Any", module)
            dicts += [own._parameters, own._buffers, own._modules]
            held = ("_parameters", "_buffers", "_modules")
            rest += [(module.__dict__, name) for name in held if getattr(own, name)]
            sets.append(own._non_persistent_buffers_set)
            hooks += [own._state_dict_hooks, own._state_dict_pre_hooks]
        places = {name.replace("_orig_mod.", ""): place for name, place in _walk(root, "")}
        found = {name: places[name] for name in chosen if name in places}
        self.usable &= not any(hooks) and all(
            name in found and found[name][0][found[name][1]] is value
            for name, value in chosen.items()
        )
        rest += [
            (place, key)
            for place in dicts
            for key, value in place.items()
            if value is None or isinstance(value, nn.Module)
        ]
        self._tensors = len(found)
        together = [*found.values(), *rest]
        self._owners = [owner for owner, _ in together]
        self._keys = [key for _, key in together]
        self._rest = [owner[key] for owner, key in rest]
        sized = [*dicts, *sets]
        self._empty = [*[each for each in sized if not each], *hooks]
        self._filled = [each for each in sized if each]
        self._sizes = list(map(len, self._filled))
        self._several = [each for each in dicts if len(each) > 1]
        self._order = list(chain.from_iterable(self._several))
        self._sets = [(each, frozenset(each)) for each in sets if each]
        self._peft = hasattr(root, "peft_config")

    def follow(self) -> list[Tensor] | None:
        """The tensors that are there now, or None if the way has changed."""
        if any(self._empty) or list(map(len, self._filled)) != self._sizes:
            return None
        try:
            found = list(map(dict.__getitem__, self._owners, self._keys))
        except KeyError:
            return None
        same = (
            all(map(is_, found[self._tensors :], self._rest))
            and list(chain.from_iterable(self._several)) == self._order
            and all(now == before for now, before in self._sets)
            and "state_dict" not in self._root.__dict__
            and hasattr(self._root, "peft_config") == self._peft
        )
        return found[: self._tensors] if same else None


def _walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, tuple[dict[str, Any], str]]]:
    own = cast("Any", module)
    for key, parameter in own._parameters.items():
        if parameter is not None:
            yield prefix + key, (own._parameters, key)
    for key, buffer in own._buffers.items():
        if buffer is not None and key not in own._non_persistent_buffers_set:
            yield prefix + key, (own._buffers, key)
    for key, child in own._modules.items():
        if child is not None:
            yield from _walk(child, prefix + key + ".")


class _StatePath:
    """The way to the chosen tensors of a module whose state_dict() does more than to walk."""

    def __init__(
        self, root: nn.Module, given: Mapping[str, object], chosen: Mapping[str, object]
    ) -> None:
        self._names = list(given)
        self._chosen = list(chosen)
        self._root = root
        self._peft = hasattr(root, "peft_config")

    def follow(self, given: Mapping[str, Any]) -> list[Any] | None:
        """Of what its state_dict has now the tensors, or None if the names have changed."""
        if list(given) != self._names or hasattr(self._root, "peft_config") != self._peft:
            return None
        return [given[name] for name in self._chosen]


class _MappingPath:
    """The way to the chosen tensors of a mapping."""

    def __init__(self, source: Mapping[str, Tensor], chosen: Mapping[str, object]) -> None:
        self._source = source
        self._names = list(source)
        self._chosen = [name.replace("_orig_mod.", "") in chosen for name in self._names]

    def follow(self) -> list[Tensor] | None:
        """The tensors that are there now, or None if the names have changed."""
        if list(self._source) != self._names:
            return None
        return list(compress(self._source.values(), self._chosen))


_Path = _ModulePath | _StatePath | _MappingPath


class _Found:
    """What one thorough look-up found."""

    __slots__ = ("facts", "ids", "kept", "manifests", "names", "path", "token")

    def __init__(
        self, path: _Path | None, facts: _Facts, kept: Sequence[bool],
        names: Sequence[str],
    ) -> None:  # fmt: skip
        self.path = path
        self.facts = facts
        self.kept = kept
        self.names = names
        self.ids: list[int] = []
        self.token = object()
        self.manifests: dict[object, Manifest] = {}


class Lookup:
    """named_tensors() of one source, again and again; for any thread.

    `local` makes plain tensors of what it is given, say of DTensors what this rank has. `keep` is
    asked, whenever anything has moved, which of the tensors found are meant, in their order;
    what it raises is raised.

    The tensors themselves come, not detached ones, so that what is remembered keeps no storage
    alive that the model lets go of (offloading); modules, where they are replaced, are let go of
    at the next call or by forget().

    Noticed at every call: parameters and buffers replaced, added, removed, reordered, tied or
    untied, or set to None; submodules likewise; buffers made persistent or not; `.data`, set_(),
    resize_(), to(), storages resized or moved: whatever changes a chosen tensor's pointer, shape,
    strides, dtype or, without memory, device; state-dict hooks; a state_dict of the model's own.
    With those last, as with classes that override state_dict or have extra state, every call costs
    a state_dict(); with tensors that are no plain Tensor or Parameter what named_tensors() costs.

    Not noticed, until something else is or forget() is called: state_dict patched into a class or
    into an instance below the root; an empty dict of parameters, buffers or submodules exchanged
    for another object and then filled; a `rename` function that changes its mind; memory freed and
    given out again at the same address, for the same shape and dtype (which is then simply used).
    """

    def __init__(
        self,
        source: Model,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        rename: Rename | None = None,
        dtype: Dtypes = None,
        *,
        local: Callable[[Sequence[Any]], list[Any]] = list,
        keep: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,
    ) -> None:
        self._source = source
        self._include = include
        self._exclude = exclude
        self._rename = rename
        self._dtype = dtype
        self._local = local
        self._keep = keep
        self._lock = threading.Lock()
        self._found: _Found | None = None
        self._given: weakref.ref[Named] | None = None
        self._generation = 0

    @property
    def generation(self) -> int:
        """Grows when tensors() finds that anything is elsewhere or otherwise than before."""
        return self._generation

    @property
    def manifest(self) -> Manifest:
        """The manifest of the tensors as they are now, published as `dtype`."""
        return manifest_of(self.tensors(), dtype=self._dtype)

    def tensors(self) -> Named:
        """The tensors by name as they are now; not to be changed, and looked up anew at every use.

        While nothing has moved and the last result is still held by somebody, it is that very
        object. UnsupportedTensor as from named_tensors().
        """
        with self._lock:
            found, given = self._found, None
            if found is not None and found.path is not None:
                if isinstance(found.path, _StatePath):
                    # Called once, whatever comes of it: it may be one that all ranks call together.
                    given = given_by(self._source)
                    now = found.path.follow(given)
                else:
                    now = found.path.follow()
                if now is not None and (same := self._again(found, self._local(now))) is not None:
                    return same
                del now
            return self._afresh(given_by(self._source) if given is None else given)

    def forget(self) -> None:
        """Let go of all that is remembered: the next call looks thoroughly."""
        with self._lock:
            if self._found is not None:
                self._found.path = None

    def _again(self, found: _Found, now: list[Tensor]) -> Named | None:
        ids = list(map(id, now))
        given = None if self._given is None else self._given()
        # Ids say something only while the tensors that had them are held.
        same = given is not None and ids == found.ids
        if not same and not _PLAIN.issuperset(map(type, now)):
            return None
        try:
            if not found.facts.hold(now):
                return None
        except RuntimeError:  # a tensor without plain memory: the thorough look-up names it
            return None
        if same:
            return given
        found.ids = ids
        return self._give(found, compress(now, found.kept))

    def _afresh(self, given: Mapping[str, object]) -> Named:
        chosen = pick(self._source, given, include=self._include, exclude=self._exclude)
        held = dict(zip(chosen, self._local(list(chosen.values())), strict=True))
        plain = self._keep(distinct(held))
        names = list(renamed(plain, self._rename))
        own = _PLAIN.issuperset(map(type, held.values()))
        values = list(held.values()) if own else list(plain.values())
        path: _Path | None = None
        if own and isinstance(self._source, nn.Module):
            path = _ModulePath(self._source, chosen)
            if not path.usable:
                path = _StatePath(self._source, given, chosen)
        elif own:
            path = _MappingPath(cast("Mapping[str, Tensor]", self._source), chosen)
        kept = [name in plain for name in chosen] if own else [True] * len(plain)
        before = self._found
        if before is not None and (before.names, before.kept) == (names, kept):
            same = self._again(before, values)
            if same is not None:
                before.path = path
                return same
        found = _Found(path, _Facts(values), kept, names)
        found.ids = list(map(id, values))
        self._found = found
        self._generation += 1
        return self._give(found, compress(values, kept))

    def _give(self, found: _Found, kept: Iterator[Tensor]) -> Named:
        given = Named(zip(found.names, kept, strict=True))
        given.token, given.manifests = found.token, found.manifests
        self._given = weakref.ref(given)
        return given
