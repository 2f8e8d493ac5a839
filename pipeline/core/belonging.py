"""A replica's belonging to the run: whom it obeys, whether it is in, and its signs of life."""

from __future__ import annotations

from ...messages.control import Join, Role, Sender, TrainerMessage, WindowKind
from .announced import Announced
from .commands import Report
from .policy import Policy


class Belonging:
    """Claim → prove → join → heartbeats: where this replica is on that way."""

    def __init__(
        self,
        *,
        me: Sender,
        kinds: tuple[WindowKind, ...],
        device: str,
        host: str,
        pid: int,
        gpus: tuple[str, ...],
        layouts: tuple[bytes, ...],
        held_nbytes: tuple[int, ...],
        policy: Policy,
        announced: Announced,
        started: float,
        role: Role,
        follow: str,
    ) -> None:
        self.joined = False
        #: When the trainer of the claim was last heard.
        self.heard: float | None = None
        #: When the next sign of life is due: a heartbeat, or Join until the trainer says Welcome.
        self.beat_at = started
        self._me = me
        self._kinds = kinds
        self._device = device
        self._host = host
        self._pid = pid
        self._gpus = gpus
        self._layouts = layouts
        self._held_nbytes = held_nbytes
        self._role = role
        self._follow = follow
        self._policy = policy
        self._announced = announced

    def claimed(self, now: float) -> None:
        """A new epoch: its trainer does not know us yet."""
        self.heard = now
        self.joined = False

    def obeys(self, message: TrainerMessage, now: float) -> bool:
        """Whether the message is of the trainer that has the run; then it is a sign of its life."""
        claim = self._announced.claim
        if claim is None or message.sender != claim.sender:
            return False
        self.heard = now
        return True

    def beats(self, now: float) -> bool:
        """Whether a sign of life is due; the next one is, a heartbeat later."""
        if now < self.beat_at:
            return False
        self.beat_at = now + self._policy.heartbeat_s
        return True

    def join(self, manifest_hash: str, version: int | None) -> Report:
        """Ask to be in, with this model and these weights."""
        claim = self._announced.claim
        return Report(
            Join(
                sender=self._me,
                epoch=self._announced.epoch,
                manifest_hash=manifest_hash,
                offers=self._kinds,
                device=self._device,
                host=self._host,
                pid=self._pid,
                version=version,
                trainer=claim.sender.incarnation if claim is not None else "",
                gpus=self._gpus,
                layouts=self._layouts,
                held_nbytes=self._held_nbytes,
                role=self._role,
                follow=self._follow,
            )
        )
