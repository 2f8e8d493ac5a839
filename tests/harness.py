"""pytest's side of tests/run.py: GPU gates, and a line for every test that was collected or run.

`@pytest.mark.gpu(2)` skips a test by name on a machine with fewer GPUs; under --require-gpu it
fails instead. `--outcomes FILE` appends one JSON line a test as it happens, so that a run which
dies half-way has still said what passed.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the two options."""
    group = parser.getgroup("sparsecast")
    group.addoption("--require-gpu", action="store_true", help="a missing GPU is a failure")
    group.addoption("--outcomes", type=Path, metavar="FILE", help="append one JSON line a test")


@pytest.hookimpl(tryfirst=True)
def pytest_collect_directory(path: Path, parent: pytest.Collector) -> pytest.Dir | None:
    """Collect the root as a folder and not as a package, which pytest would import by the name of
    the checkout's folder: a second time, or not at all (sparsecast-0.1.0, my-clone)."""
    return pytest.Dir.from_parent(parent, path=path) if path == parent.config.rootpath else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Write down every test with the values it is bound to."""
    for item in items:
        _record(config, item.nodeid, binding_of(item), "collected")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip or fail a test whose GPUs are missing."""
    for mark in item.iter_markers("gpu"):
        needed = mark.args[0] if mark.args else 1
        present = _gpus()
        if present < needed:
            reason = f"needs {needed} NVIDIA GPU(s), {present} here"
            if item.config.getoption("--require-gpu"):
                pytest.fail(reason, pytrace=False)
            pytest.skip(reason)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Write down what became of a test: once, at the phase that decides."""
    report = yield
    decided = report.when == "call" or (report.when == "setup" and not report.passed)
    if decided or report.failed:
        reason = report.longrepr[2] if report.skipped and report.longrepr else ""
        _record(item.config, item.nodeid, binding_of(item), report.outcome, str(reason))
    return report


def binding_of(item: pytest.Item) -> dict[str, str]:
    """The matrix values that a test is bound to.

    Parameters count by their names (window="gloo"; a dtype by its name, torch.bfloat16 as
    bfloat16); `@pytest.mark.matrix(window="gloo")` adds what is not a parameter, and prevails.
    """
    binding = {}
    callspec = getattr(item, "callspec", None)
    for axis, value in (callspec.params if callspec else {}).items():
        text = getattr(value, "__name__", None) or str(value)
        binding[axis] = text.removeprefix("torch.")
    for mark in reversed(list(item.iter_markers("matrix"))):
        binding |= {axis: str(value) for axis, value in mark.kwargs.items()}
    return binding


def _record(
    config: pytest.Config, test: str, binding: dict[str, str], result: str, reason: str = ""
) -> None:
    if (path := config.getoption("--outcomes")) is not None:
        line = {"test": test, "binding": binding, "result": result, "reason": reason}
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _gpus() -> int:
    import torch  # late: half of the suite needs no torch

    return int(torch.cuda.device_count())
