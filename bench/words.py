"""What the benches take from their command lines alike, and how a signal ends them."""

from __future__ import annotations

import argparse


def count(text: str) -> int:
    """A whole number from 1 on."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return value


def rising(text: str) -> tuple[int, ...]:
    """Whole numbers from 1 on, from small to large."""
    found = tuple(count(word) for word in text.split(","))
    if list(found) != sorted(set(found)):
        raise argparse.ArgumentTypeError(f"from small to large, each once, not {text}")
    return found


def several(text: str) -> int:
    """Workers of which one fails: from 2 on."""
    value = int(text)
    if value < 2:
        raise argparse.ArgumentTypeError(f"with {text} nobody survives: at least 2")
    return value


def positive(text: str) -> float:
    """A finite number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def share(text: str) -> float:
    """A share of the elements: above 0 and at most 1."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"shares are above 0 and at most 1, not {text}")
    return value


def terminated(number: int, frame: object) -> None:
    """A handler of SIGTERM: ends as Ctrl-C does, so that processes and files are removed."""
    raise KeyboardInterrupt
