"""Every deadline and bound of the protocol, in one frozen object."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """Deadlines in seconds, sizes in bytes. The defaults suit one machine or one rack."""

    window: Literal["auto", "nccl", "gloo", "bus"] = "auto"
    """Which kind of window to open; "auto" takes the best that every member offers."""

    routing: Literal["auto", "broadcast", "all-to-all"] = "auto"
    """What ranks receive that hold parts of the weights: "broadcast" sends every patch whole to
    all, "all-to-all" to each what it holds; "auto" takes what keeps the busiest link shorter busy,
    by a quarter at least, and by NCCL always the first."""

    lease_s: int = 10
    """How long the run stays held after its trainer has died. Whole seconds."""

    heartbeat_s: float = 0.5
    """How often trainer and members say that they live."""

    silence_s: float = 4.0
    """A member unheard for so long is put out of the membership."""

    gather_s: float = 60.0
    """How long the first rank of a worker waits for the others when it starts."""

    ready_s: float = 2.0
    """From asking for commitments until whoever has not committed is left out."""

    quorum: int | Literal["all"] = "all"
    """How many members have to hold an update for it to count as done: wait_applied() waits for so
    many unless told otherwise."""

    straggler_s: float | None = None
    """Once a quorum has committed to a round, how long the others are waited for before they are
    put out of the window; 0: not at all. None: until ready_s is over. The window that follows is
    opened without them: give more than the slowest sound member takes, and than the trainer's own
    event loop may stall."""

    commit_s: float = 5.0
    """How long a member keeps a commitment open. More than ready_s: by as much as a publish() may
    take for its round to go at once."""

    open_s: float = 5.0
    """From go until a window is open on every rank."""

    send_s: float = 5.0
    """From go until a payload is staged on every member, beside `send_rate`."""

    send_rate: float = 50e6
    """Bytes a second that the slowest link is trusted with: adds nbytes / send_rate to send_s."""

    guard_s: float = 5.0
    """How long an apply waits for readers before the member counts as lagging."""

    verify_after_s: float = 0.03
    """From an apply until the digest of it begins, unless the next patch comes earlier: members
    that share the host finish their round first, and waiting readers go first."""

    settle_s: float = 10.0
    """From the last receipt until a round's metrics are told, whoever has not verified."""

    probe_s: float = 1.0
    """How long the holder of a name has to answer when a newcomer wants it."""

    attempts: int = 3
    """How often a round, or the opening of a window, is tried before the log alone carries it."""

    backoff_s: float = 1.0
    """How long a member that was put out of a window stays out; doubles each time."""

    backoff_max_s: float = 30.0
    """The longest that a member stays out of windows."""

    retry_s: float = 0.25
    """Between two tries of something that failed on the bus or in the log."""

    bus_s: float = 5.0
    """The deadline of one exchange with the broker."""

    store_s: float = 60.0
    """The deadline of one entry's way into or out of the log."""

    resume_s: float = 600.0
    """How long a trainer may take to make an old state again from the log, when it resumes a run or
    rolls it back."""

    tell_s: float = 1.0
    """A worker's catch-up from the log that lasts longer is told by events, at most one in so long
    and one at its end."""

    tell_nbytes: int = 64 << 20
    """One that takes more bytes is told from its beginning."""

    join_lag: int = 1
    """A member at most so many versions behind the head may enter a window; a little further behind
    if the log does not bring it nearer, since updates follow each other faster."""

    anchor_every: int = 100
    """Versions between two anchors in the log."""

    merge_every: int = 8
    """The log gets a merged patch beside the patches of every so many versions, another one beside
    those of every so many squared, and so on up to anchor_every: fewer bytes and entries for who is
    far behind. 1: none."""

    keep_versions: int = 16
    """The log leads to each of so many newest versions exactly; of older ones, down to its newest
    two anchors, only to where a merged patch ends."""

    keep_nbytes: int | None = None
    """The log drops more than that, down to its newest anchor and what follows it, while it holds
    more bytes than this."""

    quota_nbytes: int | None = None
    """How many bytes the run's log may take in each of its tiers; the broker refuses more. Where
    they are used up the log keeps less, down to one anchor and what follows it, and takes the next
    one earlier. At least 2.1 times the published weights and 128 KiB: an anchor stays until the
    next is there. None: as many as there is room for."""

    staging_nbytes: int = 1 << 30
    """How many bytes of patches a member holds before it leaves rounds to the log."""

    staging_device_nbytes: int = 1 << 30
    """How many of them it holds in device memory; the rest stage in host memory."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int | float):
                continue
            may_be_0 = field.name in ("join_lag", "straggler_s")
            if value < 0 or (value == 0 and not may_be_0):
                bound = "at least 0" if may_be_0 else "above 0"
                raise ValueError(f"Policy.{field.name} must be {bound}, not {value}")
        if self.commit_s <= self.ready_s:
            raise ValueError(
                f"Policy.commit_s ({self.commit_s}) must be above ready_s ({self.ready_s}): "
                "a commitment has to outlive the wait for the others"
            )
        if self.quorum != "all" and not isinstance(self.quorum, int):
            raise ValueError(f"Policy.quorum must be 'all' or a number, not {self.quorum!r}")
        if self.straggler_s is not None and self.quorum == "all":
            raise ValueError(
                f"Policy.straggler_s ({self.straggler_s}) needs a quorum: of all members nobody is "
                "left to be put out"
            )
        if self.silence_s <= 2 * self.heartbeat_s:
            raise ValueError(
                f"Policy.silence_s ({self.silence_s}) must be above two heartbeats "
                f"(heartbeat_s is {self.heartbeat_s})"
            )

    def send_deadline_s(self, nbytes: int) -> float:
        """From go until a payload of `nbytes` must be staged everywhere."""
        return self.send_s + nbytes / self.send_rate
