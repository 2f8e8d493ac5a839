"""What one seed means: the run's shape, its policy, and the faults with their times."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from sparsecast.messages.control import WindowKind
from sparsecast.pipeline.core.policy import Policy

#: Kinds of faults, with how often each is drawn.
KINDS = {
    "cut": 4,
    "stall": 3,
    "broker restarts": 2,
    "broker forgets": 2,
    "trainer killed": 2,
    "trainer frozen": 2,
    "second trainer": 3,
    "worker killed": 3,
    "worker frozen": 3,
    "worker leaves": 1,
    "worker joins": 2,
    "name taken": 1,
    "storm": 3,
    "answers lost": 3,
    "window weather": 4,
    "log refuses": 2,
    "long reader": 2,
    "engine fails": 2,
    "storage moves": 2,
    "clock jumps": 2,
}
#: What happens to a log on a disk, beside what else a seed has.
DISK_KINDS = ("disk full", "disk hangs", "disk lost", "file damaged")

ODD = [torch.int64, torch.float64, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.int16]


@dataclass(frozen=True)
class Fault:
    """One fault: when it begins, by seconds from the start, for how long, and where (0 to 1)."""

    at: float
    kind: str
    for_s: float
    where: float


@dataclass(frozen=True)
class Plan:
    """Everything that a seed decides before the run begins."""

    seed: int
    workers: int
    #: What each worker follows that evaluates, by its name; the others are for rollouts.
    evaluators: Mapping[str, str]
    updates: int
    policy: Policy
    #: Where the log is, the quickest first.
    tiers: tuple[str, ...]
    #: Publish fp32 masters as bf16.
    masters: bool
    #: Whether workers start from the trainer's first weights.
    same_start: bool
    odd: torch.dtype
    kinds: tuple[tuple[WindowKind, ...], ...]
    pause_s: float
    fault_s: float
    faults: tuple[Fault, ...]

    @classmethod
    def of(cls, seed: int) -> "Plan":
        """The plan of a seed."""
        rng = random.Random(f"plan {seed}")
        fault_s = rng.uniform(15, 50)
        kinds = rng.choices(list(KINDS), list(KINDS.values()), k=rng.randint(2, 10))
        faults = [
            Fault(rng.uniform(0.5, fault_s - 2), kind, rng.expovariate(1 / 4) + 0.1, rng.random())
            for kind in kinds
        ]
        workers = rng.randint(1, 4)
        updates = rng.randint(10, 40)
        # A lot of its own, which shifts no other.
        patience = random.Random(f"quorum {seed}")
        quorum = patience.choice(["all", "all", 1, 2])
        policy = Policy(
            quorum=quorum,
            straggler_s=None if quorum == "all" else patience.choice([None, 0.0, 0.05, 0.5]),
            window=rng.choice(["auto", "auto", "gloo"]),
            lease_s=rng.choice([3, 5, 10]),
            silence_s=rng.choice([2.0, 4.0]),
            guard_s=rng.choice([0.5, 2.0, 5.0]),
            send_s=rng.choice([1.0, 5.0]),
            open_s=rng.choice([1.0, 5.0]),
            attempts=rng.randint(1, 3),
            backoff_max_s=rng.choice([4.0, 30.0]),
            settle_s=rng.choice([2.0, 10.0]),
            store_s=rng.choice([2.0, 5.0, 60.0]),
            join_lag=rng.randint(0, 2),
            anchor_every=rng.choice([2, 5, 100]),
            staging_nbytes=rng.choice([2000, 6000, 1 << 30, 1 << 30]),
        )
        lot = random.Random(f"log {seed}")
        if lot.random() < 0.5:
            merge_every, keep_versions = lot.choice([1, 2, 2, 3]), lot.choice([1, 2, 16])
            policy = replace(policy, merge_every=merge_every, keep_versions=keep_versions)
        tiers = lot.choice([("jetstream",)] * 3 + [("directory", "jetstream"), ("directory",)])
        if "directory" in tiers:
            for kind in lot.choices(DISK_KINDS, k=lot.randint(0, 4)):
                at = lot.uniform(0.5, fault_s - 2)
                faults.append(Fault(at, kind, lot.expovariate(1 / 4) + 0.1, lot.random()))
        follows = ["latest", "every:2", "every:5", f"version:{rng.randint(0, updates)}"]
        evaluators = {f"e{n}": rng.choice(follows) for n in range(rng.choice([0, 0, 1, 2]))}
        every: tuple[WindowKind, ...] = ("gloo", "bus")
        return cls(
            seed=seed,
            workers=workers,
            evaluators=evaluators,
            updates=updates,
            policy=policy,
            tiers=tiers,
            masters=rng.random() < 0.3,
            same_start=rng.random() < 0.7,
            odd=rng.choice(ODD),
            kinds=tuple(rng.choice([every, every, every, ("bus",)]) for _ in range(workers)),
            pause_s=fault_s / updates * rng.uniform(0.3, 1.0),
            fault_s=fault_s,
            faults=tuple(sorted(faults, key=lambda fault: fault.at)),
        )

    # ---- weights

    def weights(self, rng: random.Random) -> dict[str, torch.Tensor]:
        """Random weights of the trainer's model."""
        layout = {
            "embed.weight": ((16, 17), torch.float32 if self.masters else torch.bfloat16),
            "layer.weight": ((9, 31), torch.float32),
            "layer.bias": ((7,), torch.bfloat16),
            "odd": ((33,), self.odd),
            "scale": ((), torch.float32),
        }
        found = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in layout.items()}
        change(found, rng, 1.0)
        return found

    def published(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The weights as workers are to hold them."""
        return {
            name: tensor.to(self.dtypes[name]) if name in self.dtypes else tensor
            for name, tensor in weights.items()
        }

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """What the publisher is told to publish as something else."""
        return {"embed.weight": torch.bfloat16} if self.masters else {}


def change(weights: Mapping[str, torch.Tensor], rng: random.Random, density: float) -> None:
    """Write random bits to a share of the elements."""
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    for tensor in weights.values():
        flat = tensor.view(-1)
        count = round(flat.numel() * density)
        if density > 0 and count == 0 and rng.random() < 0.5:
            count = 1
        at = torch.randperm(flat.numel(), generator=generator)[:count]
        if tensor.dtype == torch.bool:
            flat[at] = torch.randint(0, 2, (count,), generator=generator).bool()
            continue
        size = tensor.element_size()
        noise = torch.randint(0, 256, (count * size,), dtype=torch.uint8, generator=generator)
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
        flat.view(bits)[at] = noise.view(bits)
