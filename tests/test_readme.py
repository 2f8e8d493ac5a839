"""The snippets of README and docs run as written, and their links lead somewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from sparsecast import Broker

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
LAYOUTS = (ROOT / "docs/layouts.md").read_text()


def _snippet(name: str, page: str = README) -> str:
    """The Python block whose first line names this file."""
    found = re.search(rf"```python\n(# {re.escape(name)}\n.*?)```", page, re.S)
    assert found, name
    return found[1]


def test_trainer_and_worker_run_as_written(tmp_path: Path) -> None:
    """Both snippets in processes of their own, with the broker where they look for it."""
    with Broker(port=4222, store_dir=tmp_path / "store"):
        processes = []
        for name in ("trainer.py", "worker.py"):
            (tmp_path / name).write_text(_snippet(name))
            processes.append(
                subprocess.Popen(
                    [sys.executable, name],
                    cwd=tmp_path,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
        try:
            trainer, worker = (process.communicate(timeout=90)[0] for process in processes)
        finally:
            for process in processes:
                process.kill()
                process.wait(10)
    assert [process.returncode for process in processes] == [0, 0], trainer + worker
    # The worker's weights are its own: the digest tells, and the anchor replaces them.
    assert "version 3:" in trainer
    assert "applied by ['worker-0'], missing {}" in trainer
    assert "version 3 answers with (1, 512)" in worker


def test_the_example_of_layouts_prints_what_the_page_says(tmp_path: Path) -> None:
    """The page on layouts shows an example and its output: run it, and compare."""
    (tmp_path / "layouts.py").write_text(_snippet("layouts.py", LAYOUTS))
    done = subprocess.run(
        [sys.executable, "layouts.py"], cwd=tmp_path, capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 0, done.stderr
    (expected,) = re.findall(r"```text\n(.*?)```", LAYOUTS, re.S)
    assert done.stdout == expected


@pytest.mark.parametrize("page", ["README.md", "docs/protocol.md", "docs/metrics.md"])
def test_links_lead_somewhere(page: str) -> None:
    """Every relative link of a page is a file of the project."""
    path = ROOT / page
    for link in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
        assert (path.parent / link).exists(), f"{page} links to {link}"
