"""The error tree: one root, facts as attributes, and a way through a pipe."""

from __future__ import annotations

import inspect
import pickle
from typing import Any

import pytest

from sparsecast.messages import errors
from sparsecast.messages.errors import SparsecastError

CLASSES = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, SparsecastError)
]


def _make(cls: type[SparsecastError]) -> SparsecastError:
    """An instance with a plausible value for each argument."""
    if not any(
        "__init__" in vars(base) for base in cls.__mro__ if issubclass(base, SparsecastError)
    ):
        return cls("what happened")
    arguments: dict[str, Any] = {}
    for name, parameter in inspect.signature(cls).parameters.items():
        kind = str(parameter.annotation)
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            return cls("what happened")
        if "Mapping" in kind:
            arguments[name] = {3: "no worker"}
        elif "float" in kind:
            arguments[name] = 1.5
        elif "int" in kind:
            arguments[name] = 7
        else:
            arguments[name] = f"<{name}>"
    return cls(**arguments)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_errors_survive_a_pipe(cls: type[SparsecastError]) -> None:
    """A child process hands its error to its parent with text and attributes whole."""
    error = _make(cls)
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is cls
    assert str(back) == str(error) != ""
    assert vars(back) == vars(error)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_errors_tell_the_facts(cls: type[SparsecastError]) -> None:
    """Every class is documented, and what it was given is in its attributes."""
    assert inspect.getdoc(cls)
    error = _make(cls)
    for name, value in vars(error).items():
        if isinstance(value, str) and value.startswith("<"):
            assert value == f"<{name}>"


def test_the_public_face_has_them_all() -> None:
    """`except sparsecast.X` works for every error that we raise."""
    import sparsecast

    for cls in CLASSES:
        assert getattr(sparsecast, cls.__name__) is cls
        assert cls.__name__ in sparsecast.__all__
