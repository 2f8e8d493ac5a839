"""Play simulated runs, seed by seed: `python -m tests.simulate --seeds 1000`.

    --seeds N --start S     play seeds S … S + N - 1 and count what happened
    --seed S --trace        replay one, event by event
    --minutes M             stop after M minutes

The exit status is 0 only if no rule was broken; a seed that failed is named with its command.
"""

import argparse
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from types import FrameType

from .simulation.loop import Hung
from .simulation.world import simulate

#: A seed that takes longer has a callback that does not return; most take a quarter of a second.
SEED_S = 60.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the arguments choose; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulate")
    parser.add_argument("--seeds", type=int, default=100, help="how many seeds")
    parser.add_argument("--start", type=int, default=0, help="the first of them")
    parser.add_argument("--seed", type=int, help="only this one")
    parser.add_argument("--trace", action="store_true", help="show every event")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after so many")
    parser.add_argument("--keep-going", action="store_true", help="do not stop at 10 failures")
    options = parser.parse_args(argv)
    seeds = (
        [options.seed]
        if options.seed is not None
        else range(options.start, options.start + options.seeds)
    )
    totals: Counter[str] = Counter()
    faults: Counter[str] = Counter()
    rounds: Counter[str] = Counter()
    failed: list[int] = []
    slowest = 0.0
    signal.signal(signal.SIGALRM, _hung)
    began = time.perf_counter()
    for seed in seeds:
        if time.perf_counter() - began > options.minutes * 60:
            break
        signal.setitimer(signal.ITIMER_REAL, SEED_S)
        result = simulate(seed, trace=options.trace)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for line in result.trace:
            print(line)
        faults.update(result.faults)
        rounds.update(result.rounds)
        totals.update(
            seeds=1,
            updates=result.published,
            applied=result.applied,
            early=result.early,
            reads=result.reads,
            resyncs=result.resyncs,
            epochs=result.epochs,
            steps=result.steps,
            virtual_s=round(result.virtual_s),
        )
        slowest = max(slowest, result.converged_s)
        if result.violations:
            failed.append(seed)
            print(f"seed {seed} FAILED (python -m tests.simulate --seed {seed} --trace)")
            for violation in result.violations[:5]:
                print(f"    {violation}")
            sys.stdout.flush()
            if len(failed) >= 10 and not options.keep_going:
                break
    wall_s = time.perf_counter() - began
    for name, counted in (("", totals), ("rounds by", rounds), ("faults:", faults)):
        print(name, ", ".join(f"{key} {value}" for key, value in sorted(counted.items())))
    print(f"slowest convergence {slowest:.1f} s after the faults")
    print(f"{totals['seeds']} seeds in {wall_s:.1f} s ({totals['seeds'] / wall_s:.2f} a second)")
    print(f"{len(failed)} failed: {failed}" if failed else "every rule was kept")
    return 1 if failed else 0


def _hung(number: int, frame: FrameType | None) -> None:
    stack = "".join(traceback.format_stack(frame, limit=12))
    raise Hung(f"a seed takes more than {SEED_S:g} s, inside of\n{stack}")


if __name__ == "__main__":
    sys.exit(main())
