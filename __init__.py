"""sparsecast: lossless sparse weight sync for online RL.

The trainer publishes after each optimizer step, workers follow, every version on every worker is
proven bit-exact. Names are imported on first use, so that a command line without tensors does not
wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .messages.errors import (
    BusError,
    BusUnavailable,
    CannotResume,
    Closed,
    CorruptPatch,
    EngineError,
    Fenced,
    GenerationFailed,
    InvalidName,
    LocalProtocolError,
    LogError,
    LogFull,
    LogHole,
    ManifestMismatch,
    NameInUse,
    PatchError,
    PayloadTooLarge,
    PermissionDenied,
    ProtocolError,
    PublisherBusy,
    RemoteProtocolError,
    ReplicaLagging,
    ReplicaRefused,
    ReplicaTorn,
    RunBusy,
    SequenceConflict,
    SettingsError,
    SparsecastError,
    StreamFull,
    StreamMissing,
    UnsupportedTensor,
    WaitTimeout,
    WindowAborted,
    WindowError,
    WindowTimeout,
    WindowUnavailable,
    WorkerDied,
    WrongBase,
)
from .messages.layout import Layout, Padding, Part, require_whole

if TYPE_CHECKING:
    from .pipeline.bus.broker import Broker
    from .pipeline.core.policy import Policy
    from .pipeline.delta import Patch, apply, diff, digest, merge
    from .pipeline.log.memory import MemoryLog
    from .workers.contributor import Contributor
    from .workers.engine import Engine
    from .workers.layouts import config_manifest, engine_layout, layout_of
    from .workers.publisher import AsyncPublisher, Publisher, Report
    from .workers.replica import Replica
    from .workers.rollouts import AsyncRollouts, Rollouts
    from .workers.shard import Shard

__version__ = "0.1.0"

_HOMES = {
    "Broker": ".pipeline.bus.broker",
    "Policy": ".pipeline.core.policy",
    "Patch": ".pipeline.delta",
    "apply": ".pipeline.delta",
    "diff": ".pipeline.delta",
    "digest": ".pipeline.delta",
    "merge": ".pipeline.delta",
    "MemoryLog": ".pipeline.log.memory",
    "Engine": ".workers.engine",
    "config_manifest": ".workers.layouts",
    "engine_layout": ".workers.layouts",
    "layout_of": ".workers.layouts",
    "AsyncPublisher": ".workers.publisher",
    "Contributor": ".workers.contributor",
    "Publisher": ".workers.publisher",
    "Report": ".workers.publisher",
    "Replica": ".workers.replica",
    "AsyncRollouts": ".workers.rollouts",
    "Rollouts": ".workers.rollouts",
    "Shard": ".workers.shard",
}

__all__ = [
    "AsyncPublisher",
    "AsyncRollouts",
    "Broker",
    "BusError",
    "BusUnavailable",
    "CannotResume",
    "Closed",
    "Contributor",
    "CorruptPatch",
    "Engine",
    "EngineError",
    "Fenced",
    "GenerationFailed",
    "InvalidName",
    "Layout",
    "LocalProtocolError",
    "LogError",
    "LogFull",
    "LogHole",
    "ManifestMismatch",
    "MemoryLog",
    "NameInUse",
    "Padding",
    "Part",
    "Patch",
    "PatchError",
    "PayloadTooLarge",
    "PermissionDenied",
    "Policy",
    "ProtocolError",
    "Publisher",
    "PublisherBusy",
    "RemoteProtocolError",
    "Replica",
    "ReplicaLagging",
    "ReplicaRefused",
    "ReplicaTorn",
    "Report",
    "Rollouts",
    "RunBusy",
    "SequenceConflict",
    "SettingsError",
    "Shard",
    "SparsecastError",
    "StreamFull",
    "StreamMissing",
    "UnsupportedTensor",
    "WaitTimeout",
    "WindowAborted",
    "WindowError",
    "WindowTimeout",
    "WindowUnavailable",
    "WorkerDied",
    "WrongBase",
    "apply",
    "config_manifest",
    "diff",
    "digest",
    "engine_layout",
    "layout_of",
    "merge",
    "require_whole",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(home, __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
