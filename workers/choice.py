"""What a trainer publishes of its model: which tensors, by which names, as which dtypes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass

import torch

from ..messages.errors import SettingsError
from ..messages.layout import Layout
from ..pipeline.delta import Lookup, named_tensors
from ..pipeline.delta.tensors import Model
from .views import View


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """As it is said to an AsyncPublisher or a Contributor, which see.

    SettingsError if both `view` and `dtype` say in which dtypes tensors are published.
    """

    model: Model
    _: KW_ONLY
    include: Sequence[str] | None = None
    exclude: Sequence[str] | None = None
    rename: Callable[[str], str] | Mapping[str, str] | None = None
    dtype: torch.dtype | Mapping[str, torch.dtype] | None = None
    #: What this makes of the tensors is published in their place.
    view: View | None = None
    #: Of one rank among several: what its plain tensors are of the published ones.
    layout: Layout | None = None

    def __post_init__(self) -> None:
        if self.view is not None and self.dtype is not None:
            raise SettingsError(
                "view and dtype were both given: a view's tensors are published in the dtypes that "
                "they have, so leave dtype out and cast within the view"
            )

    def tensors(self) -> dict[str, torch.Tensor]:
        """The model's own that are chosen, by their names, as they are now (UnsupportedTensor)."""
        return named_tensors(
            self.model, include=self.include, exclude=self.exclude, rename=self.rename
        )

    def lookup(self) -> Lookup:
        """The same again and again."""
        return Lookup(self.model, self.include, self.exclude, self.rename, self.dtype)
