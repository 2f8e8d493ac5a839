"""The areas of the test suite, as tests/areas.toml declares them.

Read by tests/run.py, which runs areas, and by tests/test_project.py, which checks that the file
and the tree tell the same story. Standard library only: it is read before anything is known to
work.
"""

import itertools
import json
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MANIFEST = ROOT / "tests" / "areas.toml"

Entry = Mapping[str, str]
"""One point of an area's matrix: axis to value, {"window": "gloo", "dtype": "bfloat16"}."""


class AreasError(Exception):
    """tests/areas.toml says something that cannot be: the message names the area and the key."""


@dataclass(frozen=True, kw_only=True)
class Area:
    """One area: what runs it, what it depends on, what it needs."""

    name: str
    about: str
    """What is promised when the area passes, in one line."""
    tests: tuple[str, ...] = ()
    """Globs of test files, `!` before those to leave out; a file belongs to exactly one area."""
    sources: tuple[str, ...] = ()
    """Globs of the files whose change calls for this area, `!` before those to leave out."""
    uses: tuple[str, ...] = ()
    """Areas whose sources this area depends on as well, and so on in turn."""
    inherited: tuple[tuple[str, ...], ...] = ()
    """The sources of those areas and what counts everywhere, one tuple of globs each."""
    commands: tuple[tuple[str, ...], ...] = ()
    """Programs of the virtual environment that must end with 0; each counts as one test."""
    quiet: bool = False
    """It keeps no real time (no sockets, no deadlines), so other areas may run beside it."""
    gpus: int = 0
    """GPUs needed; without them the area is skipped by name, or fails under --require-gpu."""
    axes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The matrix: every combination of these values is run by at least one test."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Environment variables set for the area's processes."""
    timeout_s: float = 600.0
    """The area's processes are killed after this long."""

    def depends_on(self, path: str) -> bool:
        """Whether a change of this file calls for the area."""
        return any(matches(path, globs) for globs in (self.tests, self.sources, *self.inherited))

    def entries(self) -> list[Entry]:
        """Every entry of the matrix; none for an area without one."""
        if not self.axes:
            return []
        names = list(self.axes)
        points = itertools.product(*self.axes.values())
        return [dict(zip(names, point, strict=True)) for point in points]


def load(path: Path = MANIFEST) -> dict[str, Area]:
    """Read and check the areas, in the order of the file."""
    with path.open("rb") as file:
        document = tomllib.load(file)
    everywhere = tuple(document.pop("everywhere", ()))
    tables = document.pop("area", {})
    if document:
        raise AreasError(f"{path.name}: unknown top-level keys {sorted(document)}")
    areas = {name: _parse(name, table) for name, table in tables.items()}
    for area in areas.values():
        for used in area.uses:
            if used not in areas:
                raise AreasError(f"area {area.name!r} uses {used!r}, which is no area")
    return {
        name: replace(area, inherited=(everywhere, *_inherited(areas, area)))
        for name, area in areas.items()
    }


def files(root: Path = ROOT) -> list[str]:
    """Every file of the project, as paths from the root, without what tools leave behind.

    Walks rather than asks git: a source archive has no repository.
    """
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(
            f
            for f in folders
            if f == ".ci"
            or not (f.startswith(".") or f in {"build", "__pycache__"} or f.endswith(".egg-info"))
        )
        found += [(Path(folder) / n).relative_to(root).as_posix() for n in names]
    return sorted(f for f in found if f != ".git")  # a worktree's .git is a file


def is_test(path: str) -> bool:
    """Whether pytest would collect this file."""
    return re.fullmatch(r"tests/(.*/)?test_[^/]*\.py", path) is not None


def matches(path: str, globs: Iterable[str]) -> bool:
    """Whether one of the globs names the path and none with a leading `!` does.

    `*` stays in a folder, `**` crosses them.
    """
    named = False
    for glob in globs:
        if _pattern(glob.removeprefix("!")).fullmatch(path):
            if glob.startswith("!"):
                return False
            named = True
    return named


def describe(entry: Entry) -> str:
    """An entry as people write it: window=gloo dtype=bfloat16."""
    return " ".join(f"{axis}={value}" for axis, value in entry.items())


def covers(binding: Entry, entry: Entry) -> bool:
    """Whether a test bound to `binding` runs `entry`: it agrees on every axis."""
    return all(binding.get(axis) == value for axis, value in entry.items())


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one collected test: a line of the file that tests/harness.py writes."""

    test: str
    """pytest's node id."""
    binding: Entry
    """The values that the test is bound to: its parameters and its matrix markers."""
    result: str = "collected"
    """collected, passed, failed or skipped."""
    reason: str = ""
    """Why it was skipped."""


def read_outcomes(path: Path) -> list[Outcome]:
    """The outcomes in a file; a last line that was cut short by a crash is left out."""
    outcomes = []
    for line in path.read_text("utf-8").splitlines(keepends=True) if path.exists() else []:
        if line.endswith("\n"):
            outcomes.append(Outcome(**json.loads(line)))
    return outcomes


@cache
def _pattern(glob: str) -> re.Pattern[str]:
    parts = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*"}
    tokens = re.split(r"(\*\*/|\*\*|\*)", glob)
    return re.compile("".join(parts.get(t, re.escape(t)) for t in tokens))


def _parse(name: str, table: dict[str, object]) -> Area:
    known = {"about", "tests", "sources", "uses", "commands"}
    known |= {"quiet", "needs", "matrix", "env", "timeout_s"}
    if unknown := sorted(table.keys() - known):
        raise AreasError(f"area {name!r} has unknown keys {unknown}; known: {sorted(known)}")
    needs = str(table.get("needs", "cpu"))
    if (needed := re.fullmatch(r"cpu|gpu:([1-9])", needs)) is None:
        raise AreasError(f'area {name!r} needs {needs!r}: say "cpu" or "gpu:N"')
    if (quiet := table.get("quiet", False)) not in (True, False):
        raise AreasError(f"area {name!r}: quiet is {quiet!r}: say true or false")
    try:
        area = Area(
            name=name,
            about=str(table["about"]),
            tests=_words(table, "tests"),
            sources=_words(table, "sources"),
            uses=_words(table, "uses"),
            commands=tuple(tuple(str(c).split()) for c in _words(table, "commands")),
            quiet=bool(quiet),
            gpus=int(needed[1] or 0),
            axes={axis: tuple(values) for axis, values in dict(table.get("matrix", {})).items()},
            env=dict(table.get("env", {})),
            timeout_s=float(str(table.get("timeout_s", Area.timeout_s))),
        )
    except (KeyError, TypeError, ValueError) as exc:
        raise AreasError(f"area {name!r}: {exc!r}") from exc
    if not (area.tests or area.commands):
        raise AreasError(f"area {name!r} has neither tests nor commands")
    return area


def _words(table: dict[str, object], key: str) -> tuple[str, ...]:
    value = table.get(key, [])
    if not isinstance(value, list):
        raise TypeError(f"{key} is a list of strings")
    return tuple(map(str, value))


def _inherited(areas: Mapping[str, Area], area: Area) -> list[tuple[str, ...]]:
    seen, todo = [], list(area.uses)
    while todo:
        if (current := todo.pop(0)) not in seen:
            seen.append(current)
            todo += areas[current].uses
    return [areas[name].sources for name in seen]
