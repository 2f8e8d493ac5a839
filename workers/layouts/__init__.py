"""What builds the layout of a rank: its tensors as they are, or an engine's way of sharing them."""

from .engines import config_manifest, engine_layout
from .tensors import here, layout_of, local_tensors

__all__ = ["config_manifest", "engine_layout", "here", "layout_of", "local_tensors"]
