"""Words for a trace: what happened, without what differs between two runs of one seed."""

import dataclasses
import re
from typing import Any

import msgspec

from .disk import MARK

#: Facts of this machine and this process, or measured by the real clock.
LEFT_OUT = {
    "pid",
    "host",
    "diff_us",
    "encode_us",
    "manifest",
    "manifest_hash",
    "device",
    "heartbeat_s",
    "dense_nbytes",
    "numel",
}
#: A process and its machine, in the words of an error.
HERE = re.compile(r"\(pid \d+ on [^)]*\)")
#: Where the simulated disk is on the real one.
DISK = re.compile(rf"/[^ ]*/{MARK}[^/]*")


def describe(thing: Any) -> str:
    """One line for an event, a command or a message."""
    if dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        names = [field.name for field in dataclasses.fields(thing)]
    elif isinstance(thing, msgspec.Struct):
        kind = type(thing).__name__
        if kind == "Sender":
            return f"{thing.name}/{thing.incarnation[:4]}"  # type: ignore[attr-defined]
        if kind == "Stamp":
            return "{}.{}.{} v{}".format(*msgspec.structs.astuple(thing))
        names = list(thing.__struct_fields__)
    elif isinstance(thing, tuple | list):
        return f"({', '.join(describe(item) for item in thing)})"
    elif isinstance(thing, dict):
        return f"{{{', '.join(f'{key}: {describe(value)}' for key, value in thing.items())}}}"
    elif isinstance(thing, float):
        return f"{thing:.4f}"
    elif isinstance(thing, BaseException):
        return _here(f"{type(thing).__name__}: {thing}")
    else:
        return _here(str(thing))
    shown = []
    for name in names:
        value = getattr(thing, name)
        if name in LEFT_OUT or value is None or value is False or value == ():
            continue
        shown.append(f"{name}={describe(value)}" if name != "message" else describe(value))
    return f"{type(thing).__name__}({', '.join(shown)})"


def _here(text: str) -> str:
    return DISK.sub("", HERE.sub("(pid)", text))
