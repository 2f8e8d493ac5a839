"""Run a bench as a person does, but in this process: for what it refuses before it starts any."""

import contextlib
import io
import runpy
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "bench"


def refusal(program: str, *words: str) -> str:
    """What a bench says to these flags, which it must end for with status 2."""
    told = io.StringIO()
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(FOLDER)  # its modules know each other by bare names
        patched.setattr(sys, "argv", [f"bench/{program}", *words])
        with (
            contextlib.redirect_stdout(told),
            contextlib.redirect_stderr(told),
            pytest.raises(SystemExit) as ended,
        ):
            runpy.run_path(str(FOLDER / program), run_name="__main__")
    assert ended.value.code == 2, told.getvalue()
    return told.getvalue()
