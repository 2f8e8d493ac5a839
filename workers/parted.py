"""What one rank of a trainer holds of the model that several publish together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import torch

from ..messages.layout import Layout
from ..pipeline.delta import manifest_of
from .layouts import layout_of, local_tensors
from .outgoing import Source


class Parted:
    """The local tensors of a model, and which parts of the published ones they are.

    `layout` says it, of the tensors as they are or as they are published; None: DTensors say it by
    their placements, and what is plain is whole on every rank. `dtype` casts what is published, as
    in a Publisher.
    """

    def __init__(
        self,
        model: Source,
        *,
        dtype: torch.dtype | Mapping[str, torch.dtype] | None,
        include: Sequence[str] | None,
        exclude: Sequence[str] | None,
        rename: Callable[[str], str] | Mapping[str, str] | None,
        layout: Layout | None,
    ) -> None:
        self.model = model
        self.dtype = dtype
        self._choice: dict[str, Any] = {"include": include, "exclude": exclude}
        self._rename = rename
        self._layout = layout

    def tensors(self) -> dict[str, torch.Tensor]:
        """The local tensors, as they are now, not cast (UnsupportedTensor)."""
        return local_tensors(self.model, **self._choice)

    def layout(self) -> Layout:
        """What they are of the published tensors, in the dtypes that are published.

        UnsupportedTensor, ManifestMismatch: the layout is not of these tensors.
        """
        held = self.tensors()
        local = manifest_of(held, dtype=self.dtype)
        if self._layout is None:
            found = layout_of(self.model, rename=self._rename, **self._choice)
            return msgspec.structs.replace(found, tensors=local.tensors)
        if self._layout.local == manifest_of(held):
            return msgspec.structs.replace(self._layout, tensors=local.tensors)
        local.require_same(self._layout.local, here="in the model", there="in the layout")
        return self._layout
