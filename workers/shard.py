"""The face of a worker's other ranks: a Shard keeps its part of the weights with the first rank."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..messages import codec
from ..messages.control import WindowKind
from ..messages.errors import Closed, SettingsError
from ..messages.layout import Layout
from ..messages.ranks import Fellow, Order
from ..pipeline.core.policy import Policy
from ..pipeline.log.base import unheard
from .driver import Ports
from .engine import Engine
from .following import Following
from .orders import decode_what
from .rank import Rank
from .tiers import DEFAULT_LOG, LogSetting


class Shard(Rank):
    """One of the other ranks of a worker whose weights are spread over several processes.

    `name` is the worker's, whose first rank runs `Replica(layout=…, ranks=…)`; `rank` is from 1 on,
    `layout` says which parts of the published tensors `model` holds here. It does what the first
    rank orders: receives in the same windows, applies when that applies, and proves its share. It
    has no readers of its own: the first rank's guard is that of the whole engine. `log` is the
    trainer's. A first rank that is unheard for Policy.silence_s may be followed by another life of
    it; then the weights are proven anew.
    """

    def __init__(
        self,
        model: torch.nn.Module | Mapping[str, torch.Tensor] | Engine,
        *,
        run: str,
        bus: str,
        name: str,
        rank: int,
        layout: Layout,
        device: str | None = None,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        rename: Callable[[str], str] | Mapping[str, str] | None = None,
        windows: Sequence[WindowKind] | None = None,
        log: LogSetting = DEFAULT_LOG,
        policy: Policy | None = None,
        ports: Callable[[], Coroutine[Any, Any, Ports]] | None = None,
    ) -> None:
        super().__init__(
            model,
            run=run,
            bus=bus,
            name=name,
            device=device,
            layout=layout,
            include=include,
            exclude=exclude,
            rename=rename,
            windows=windows,
            log=log,
            policy=policy,
            ports=ports,
        )
        if rank < 1:
            raise SettingsError(
                f"rank {rank} of worker {name!r}: its first rank, 0, is a Replica; Shards follow"
            )
        self.rank = rank
        self._following: Following | None = None

    async def _start(self, life: contextlib.AsyncExitStack) -> None:
        await self._reach(life)
        self._following = Following(
            ports=self._ports,
            outbox=self._outbox,
            run=self.run,
            name=self.name,
            rank=self.rank,
            policy=self.policy,
            perform=self._perform,
            introduce=self._introduce,
            let_go=self._let_go,
            deserted=self._windows.abort_all,  # the others' ends may wait for ours
        )
        await self._following.start()
        life.push_async_callback(self._following.stop)

    @property
    def version(self) -> int | None:
        """The version that this part of the weights holds; None before the first proof."""
        return self.engine.guard().version

    @property
    def status(self) -> str:
        """Where this rank stands, in words."""
        if self._life is None:
            return "not started"
        following = self._following
        if following is None or following.leader is None:
            return f"waiting for the first rank of worker {self.name!r}"
        if following.abandoned:
            away_s = following.away_s
            return f"the first rank of worker {self.name!r} is unheard for {away_s:.1f} s"
        return f"rank {self.rank} of worker {self.name!r}, at version {self.version}"

    async def wait_version(self, version: int, timeout_s: float = 30.0) -> int:
        """Wait until this part holds `version` or a newer one; WaitTimeout says why it does not.

        Closed if this does not run. That a version is here does not say that the other ranks hold
        it: the first one's replica knows.
        """
        if self._life is None:
            raise Closed(f"rank {self.rank} of worker {self.name!r} is not running")

        def reached() -> int | None:
            guard = self.engine.guard()
            held = guard.version if guard.torn is None else None
            return held if held is not None and held >= version else None

        waiting = self._changes.until(
            reached, timeout_s, what=f"version {version}", why=lambda: self.status
        )
        return await self._on_own_loop(waiting)

    # ---- what the first rank wants

    def _introduce(self, leader: str, incarnation: str) -> Fellow:
        assert self.layout is not None
        return Fellow(
            leader=leader,
            rank=self.rank,
            incarnation=incarnation,
            layout=codec.pack_layout(self.layout),
            kinds=self._kinds,
            gpu=self._ports.gpu,
        )

    async def _let_go(self) -> None:
        await self._windows.abort_all()
        await self._hands.drop(None)
        # Behind what the torch thread was at: it is whole again, or torn. Which version that is
        # has to be shown anew.
        await self._ports.run(self.engine.guard().declare, None)

    async def _perform(self, order: Order) -> Any:
        what, hands = decode_what(order), self._hands
        match order.deed:
            case "open":
                return await hands.open(replace(what, rank=what.rank + self.rank))
            case "take":
                return await hands.take(what, timeout_s=self.policy.store_s, progress=unheard)
            case deed:
                return await getattr(hands, deed)(what)
