"""Subjects: one token a name, everything of a run under one prefix."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from sparsecast.messages.errors import InvalidName
from sparsecast.messages.subjects import Subjects, check_token, sender


@given(name=st.from_regex(r"\A[A-Za-z0-9_-]{1,64}\Z"))
def test_good_names_pass(name: str) -> None:
    """Letters, digits, dashes and underscores make one token."""
    assume(name != "trainer")
    assert check_token("worker", name) == name
    subjects = Subjects(name)
    assert sender(subjects.worker_control(name)) == name
    assert sender(subjects.metrics(name)) == name


@pytest.mark.parametrize("name", ["", "a.b", "a b", "*", ">", "a\n", "ü", "x" * 65, "a/b"])
def test_names_that_would_escape_their_token_are_refused(name: str) -> None:
    """A wildcard or a dot in a name would speak for others."""
    with pytest.raises(InvalidName, match="names have 1 to 64"):
        check_token("worker", name)
    with pytest.raises(InvalidName):
        Subjects(name)


@pytest.mark.parametrize("name", ["a.b", "a.", ".1", "a.1.2", "../1", "a.1/2", "a.-1", "x" * 65])
def test_a_piece_of_a_log_entry_has_its_root_behind_a_dot(name: str) -> None:
    """A number is all that may stand there: nothing speaks for another entry, or leaves a
    directory."""
    subjects = Subjects("r")
    assert subjects.log_entry("1-patch-2.13") == "sparsecast.r.log.index.1-patch-2.13"
    for of in (subjects.log_entry, subjects.log_chunks):
        with pytest.raises(InvalidName, match="log entry"):
            of(name)


def test_no_worker_is_called_as_the_trainer_is() -> None:
    """Its metrics would be taken for the trainer's; a run may well have that name."""
    with pytest.raises(InvalidName, match="what the trainer is called"):
        check_token("worker", "trainer")
    assert Subjects("trainer").run == "trainer"


def test_everything_is_under_the_run() -> None:
    """One prefix is all that a server's permissions need."""
    subjects = Subjects("r")
    values = [value for value in vars(subjects).values() if isinstance(value, str)]
    values += [subjects.window(1, 2), subjects.generate("w"), subjects.log_chunks("1-a-2")]
    dotted = [value for value in values if "." in value]
    assert len(dotted) > 10
    assert all(value.startswith("sparsecast.r") for value in dotted)
