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
    """As it is said to an AsyncPublisher or a Contributor.

    SettingsError if both `view` and `dtype` say in which dtypes tensors are published.
    """

    model: Model
    """A Module, or a mapping of names to tensors."""
    _: KW_ONLY
    include: Sequence[str] | None = None
    """Patterns of the names that are meant; None: all."""
    exclude: Sequence[str] | None = None
    """Patterns of names that are not."""
    rename: Callable[[str], str] | Mapping[str, str] | None = None
    """From a name in the model to the one that is published."""
    dtype: torch.dtype | Mapping[str, torch.dtype] | None = None
    """As what floating tensors are published, all or by name."""
    view: View | None = None
    """What this makes of the tensors is published in their place."""
    layout: Layout | None = None
    """Of one rank among several: what its plain tensors are of the published ones."""

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
        """For the same again and again, and their manifest as it is published."""
        return Lookup(self.model, self.include, self.exclude, self.rename, self.dtype)
