"""The data path of one update: diff, encode, check, apply, merge, digest."""

from .apply import apply, apply_checked
from .check import Checked, check
from .diff import Diffed, Shadow, diff
from .digest import checksum, digest, partial, partial_at
from .layout import Encoding, Section
from .lookup import Lookup
from .merge import merge
from .patch import Patch
from .payload import Payload, ready, warm
from .tensors import manifest_of, named_tensors

__all__ = [
    "Checked",
    "Diffed",
    "Encoding",
    "Lookup",
    "Patch",
    "Payload",
    "Section",
    "Shadow",
    "apply",
    "apply_checked",
    "check",
    "checksum",
    "diff",
    "digest",
    "manifest_of",
    "merge",
    "named_tensors",
    "partial",
    "partial_at",
    "ready",
    "warm",
]
