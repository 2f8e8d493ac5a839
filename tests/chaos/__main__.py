"""Break a run of real processes for as long as you like: `python -m tests.chaos --minutes 10`.

    --seed S        the faults and their order; the timing is the machine's
    --pace-s P      between two publishes; not given: another one for every site
    --window KIND   gloo or bus; not given: another one for every site

Every few dozen faults begin with new processes. Prints what it did; exit status 0 only if nobody
was ever wrong and all was well after each fault. Everything that it starts dies with it. With
SPARSECAST_CHAOS_LOG=1 the processes log to stderr.
"""

import argparse
import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import uvloop

from .faults import episode
from .site import SHORT, Site

#: Episodes with the same processes' site.
EPISODES = 25


async def soak(minutes: float, seed: int, pace_s: float | None, window: str | None) -> int:
    """The exit status."""
    lot = random.Random(seed)
    end = time.monotonic() + 60 * minutes
    episodes = faults = 0
    slowest_s = longest_publish_s = 0.0
    events: Counter[str] = Counter()
    failed = ""
    while time.monotonic() < end and not failed:
        pace = pace_s or lot.choice((0.02, 0.1, 0.3))
        kind = window or lot.choice(("gloo", "bus"))
        print(f"-- a new site: {kind} windows, {pace:g} s between two publishes", flush=True)
        policy = replace(SHORT, window=kind)
        try:
            async with Site(policy=policy, pace_s=pace, note=say) as site:
                await site.start()
                for _ in range(EPISODES):
                    if time.monotonic() > end:
                        break
                    faults += await episode(site, lot)
                    episodes += 1
                    slowest_s = max(slowest_s, site.settled_s)
                longest_publish_s = max(longest_publish_s, site.longest_publish_s)
                events += site.events
        except Exception:
            failed = traceback.format_exc()
    print(f"{faults} faults in {episodes} episodes, seed {seed}")
    print("events:", ", ".join(f"{kind} {count}" for kind, count in sorted(events.items())))
    print(
        f"slowest return to the head {slowest_s:.2f} s, longest publish() {longest_publish_s:.3f} s"
    )
    print(f"FAILED\n{failed}" if failed else "nobody was ever wrong, and all was well after each")
    return 1 if failed else 0


def say(line: str) -> None:
    print(line, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the arguments choose; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos")
    parser.add_argument("--minutes", type=float, default=5.0, help="how long")
    parser.add_argument("--seed", type=int, default=0, help="which faults")
    parser.add_argument("--pace-s", type=float, help="between two publishes")
    parser.add_argument("--window", choices=("gloo", "bus"), help="the road of the updates")
    options = parser.parse_args(argv)
    return uvloop.run(soak(options.minutes, options.seed, options.pace_s, options.window))


if __name__ == "__main__":
    sys.exit(main())
