"""What one rank of a trainer holds of the model that several publish together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import torch

from ..messages.errors import UnsupportedTensor
from ..messages.layout import Layout
from ..messages.manifest import Manifest
from ..pipeline.delta import Lookup, manifest_of
from ..pipeline.delta.tensors import Model, choose, renamed
from .choice import Choice
from .layouts import here, layout_of, local_tensors
from .streams import own
from .views import called


@dataclass(frozen=True, slots=True)
class Share:
    """What one rank of a trainer of several publishes: the local tensors of roots[root], of the
    tensors of a manifest. `local` gives them as they are now, and `weights` what a view makes them
    of: the same without one."""

    root: int
    roots: tuple[Layout, ...]
    manifest: Manifest
    local: Callable[[], Mapping[str, torch.Tensor]]
    weights: Callable[[], Mapping[str, torch.Tensor]]

    @property
    def layout(self) -> Layout:
        """Of this rank."""
        return self.roots[self.root]

    def tensors(self) -> Mapping[str, torch.Tensor]:
        """What this rank publishes, as it is now (UnsupportedTensor)."""
        found = self.local()
        names = [spec.name for spec in self.layout.tensors]
        if list(found) == names:
            return found
        for name in names:
            if name not in found:
                raise UnsupportedTensor(name, "is not there any more")
        return {name: found[name] for name in names}


class Parted:
    """The local tensors of a model, and which parts of the published ones they are.

    The choice's `layout` says it, of the tensors as they are or as they are published; None:
    DTensors say it by their placements, and what is plain is whole on every rank. With a `view`
    what that makes of them is meant instead: it is given DTensors as they are, and may return such.
    """

    def __init__(self, choice: Choice) -> None:
        self.choice = choice
        self._chosen: dict[str, Any] = {"include": choice.include, "exclude": choice.exclude}
        #: The local tensors when their layout was made.
        self._before: Manifest | None = None

    def weights(self) -> dict[str, torch.Tensor]:
        """The model's local tensors, as they are now (UnsupportedTensor)."""
        return local_tensors(self.choice.model, **self._chosen)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What is published of them, as it is now, not cast (UnsupportedTensor, and what the view
        raises; ManifestMismatch if that gives others than before). What a view gives is to be read
        in the order of this thread's streams."""
        if self.choice.view is None:
            return self.weights()
        found = local_tensors(self._viewed())
        self._require_as_before(found)
        own(*found.values())
        return found

    def share(self, root: int, roots: tuple[Layout, ...], manifest: Manifest) -> Share:
        """What this rank publishes of a manifest, where each rank has the tensors of its root."""
        if self.choice.view is not None:
            return Share(root, roots, manifest, self.tensors, self.weights)
        names = {spec.name for spec in roots[root].tensors}

        def keep(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            before = () if self._before is None else self._before.tensors
            if found.keys() - {spec.name for spec in before}:
                self._require_as_before(found)
            return {name: tensor for name, tensor in found.items() if name in names}

        choice = self.choice
        lookup = Lookup(choice.model, **self._chosen, dtype=choice.dtype, local=here, keep=keep)
        return Share(root, roots, manifest, lookup.tensors, lookup.tensors)

    def layout(self) -> Layout:
        """What these are of the published tensors, in the dtypes that are published.

        UnsupportedTensor, ManifestMismatch: the layout is not of these tensors.
        """
        choice = self.choice
        if choice.view is None:
            return self._laid_out(choice.model, rename=choice.rename, **self._chosen)
        return self._laid_out(self._viewed())

    def _laid_out(self, source: Model, *, rename: Any = None, **chosen: Any) -> Layout:
        held = local_tensors(source, **chosen)
        self._before = manifest_of(held)
        local = manifest_of(held, dtype=self.choice.dtype)
        given = self.choice.layout
        if given is None:
            found = layout_of(source, rename=rename, **chosen)
            return msgspec.structs.replace(found, tensors=local.tensors)
        if given.local == self._before:
            return msgspec.structs.replace(given, tensors=local.tensors)
        local.require_same(given.local, here="in the model", there="in the layout")
        return given

    def _require_as_before(self, found: Mapping[str, torch.Tensor]) -> None:
        """ManifestMismatch if these are others than when the layout was made: what comes, or is
        tied no more, would be published by no rank."""
        if self._before is not None and list(found) != [s.name for s in self._before.tensors]:
            before, now = "at the start", "now"
            self._before.require_same(manifest_of(found), here=before, there=now)

    def _viewed(self) -> Mapping[str, torch.Tensor]:
        """What the view makes of the model's tensors, tied ones once, as it gives it."""
        choice = self.choice
        assert choice.view is not None
        chosen: dict[str, Any] = choose(choice.model, **self._chosen)
        with torch.no_grad():
            given = {name: chosen[name].detach() for name in local_tensors(chosen)}
        return called(choice.view, renamed(given, choice.rename))
