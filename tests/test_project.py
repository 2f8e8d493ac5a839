"""The project agrees with itself: packages, areas, pins, documents and builds."""

import ast
import json
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import grimp
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from .areas import ROOT, Area, covers, describe, files, is_test, load, matches, read_outcomes

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
AREAS = load()
FILES = files()
PINS = {
    canonicalize_name(name): version
    for name, version in re.findall(
        r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text("utf-8"), re.M
    )
}


def packages() -> list[str]:
    """The packages of the tree: folders with an __init__.py, by their dotted names."""
    folders = sorted(Path(f).parent for f in FILES if Path(f).name == "__init__.py")
    return [".".join(["sparsecast", *folder.parts]) for folder in folders]


def test_the_packages_listed_are_those_of_the_tree() -> None:
    """A package is added and not listed: it would be missing from every wheel."""
    listed = PYPROJECT["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(packages())


def test_no_folder_of_modules_lacks_its_init() -> None:
    """A folder beside packages holds modules and no __init__.py: wheels would leave it out."""
    folders = {Path(f).parent for f in FILES if f.endswith(".py")}
    packaged = {Path(*name.split(".")[1:]) for name in packages()}
    loose = {f for f in folders - packaged if f.parts[0] not in {"tests", "bench", "docs"}}
    assert not loose


@pytest.mark.parametrize(
    ("statement", "unwanted"),
    [
        ("import sparsecast.workers.cli", {"torch", "nats"}),
        ("from sparsecast import Publisher, Replica", {"transformers", "torch.distributed.tensor"}),
    ],
    ids=["command", "processes"],
)
def test_what_is_not_needed_is_not_imported(statement: str, unwanted: set[str]) -> None:
    """A library that few need is imported by all: each process starts seconds later."""
    program = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert unwanted & set(done.stdout.split()) == set()


@pytest.mark.parametrize("path", [f for f in FILES if is_test(f)])
def test_every_test_file_is_in_one_area(path: str) -> None:
    """A test file in no area never runs in CI; one in two runs twice."""
    homes = [a.name for a in AREAS.values() if matches(path, a.tests)]
    assert len(homes) == 1, f"{path} is in {homes or 'no area'}: see tests/areas.toml"


@pytest.mark.parametrize("area", AREAS.values(), ids=lambda a: a.name)
def test_every_area_has_its_tests_on_disk(area: Area) -> None:
    """A glob of an area matches nothing: its tests were moved, or were never written."""
    globs = [glob for glob in area.tests if not glob.startswith("!")]
    empty = [g for g in globs if not any(is_test(f) and matches(f, [g]) for f in FILES)]
    assert not empty, f"area {area.name}: no test file matches {empty}"


def test_every_file_is_in_an_area() -> None:
    """A file changes and no area depends on it: `--changed` would run nothing."""
    loose = [f for f in FILES if not any(a.depends_on(f) for a in AREAS.values())]
    assert not loose, f"in no area of tests/areas.toml: {loose}"


def test_every_source_has_an_area_that_runs_it() -> None:
    """A module is only ever linted: some area with tests of its own must depend on it as well."""
    behaviour = [a for a in AREAS.values() if a.tests and a.name != "project"]
    sources = [f for f in FILES if f.endswith(".py") and not f.startswith("tests/")]
    loose = [f for f in sources if not any(a.depends_on(f) for a in behaviour)]
    assert not loose, f"tested by no area: {loose}"


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    """For every file of the packages, the files of the packages that it imports."""
    graph = grimp.build_graph("sparsecast", cache_dir=None)
    place = {module: _file_of(module) for module in graph.modules}
    return {
        place[module]: {place[m] for m in graph.find_modules_directly_imported_by(module)}
        for module in graph.modules
    }


@pytest.mark.parametrize(
    "area",
    [a for a in AREAS.values() if a.tests and a.name != "project"],
    ids=lambda a: a.name,
)
def test_imports_stay_within_an_areas_dependencies(
    area: Area, imports: dict[str, set[str]]
) -> None:
    """An area's module imports another one, which changes and breaks it: the area must run."""
    own = [f for f in imports if area.depends_on(f)]
    tests = [f for f in FILES if f.endswith(".py") and matches(f, area.tests)]
    reached = {f for t in tests for f in _imported_by_test(t) if f in FILES}
    reached |= {f for source in own for f in imports[source]}
    missed = sorted(f for f in reached if not area.depends_on(f) and f != "__init__.py")
    assert not missed, f"area {area.name} reaches {missed}, on which it does not depend"


@pytest.mark.timeout(300)
def test_every_entry_of_every_matrix_is_bound_to_a_test(tmp_path: Path) -> None:
    """An area promises a combination that no test takes: collect the tests and compare."""
    with_matrix = [a for a in AREAS.values() if a.axes]
    paths = [f for f in FILES if is_test(f) and any(matches(f, a.tests) for a in with_matrix)]
    assert paths, "no test file of any area with a matrix is on disk"
    report = tmp_path / "outcomes"
    command = [sys.executable, "-m", "pytest", "-qq", "--collect-only", f"--outcomes={report}"]
    done = subprocess.run([*command, *paths], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    outcomes = read_outcomes(report)
    unbound = [
        f"{area.name}: {describe(entry)}"
        for area in with_matrix
        for entry in area.entries()
        if not any(
            covers(o.binding, entry) and matches(o.test.partition("::")[0], area.tests)
            for o in outcomes
        )
    ]
    assert not unbound


def test_every_test_tells_its_story() -> None:
    """A test without a docstring says what failed but not what was promised."""
    silent = [
        f"{path}::{node.name}"
        for path in FILES
        if is_test(path)
        for node in ast.walk(ast.parse((ROOT / path).read_text("utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.name.startswith("test_")
        and not ast.get_docstring(node)
    ]
    assert not silent


def requirements() -> list[str]:
    """Every requirement that pyproject.toml states, once."""
    project = PYPROJECT["project"]
    extras = project["optional-dependencies"].values()
    stated = [PYPROJECT["build-system"]["requires"], project["dependencies"], *extras]
    return sorted({requirement for group in stated for requirement in group})


@pytest.mark.parametrize("stated", requirements())
def test_pins_are_within_the_ranges(stated: str) -> None:
    """A range in pyproject.toml moves past the version that constraints.txt says was tested."""
    requirement = Requirement(stated)
    pinned = PINS.get(canonicalize_name(requirement.name))
    assert pinned is not None, f"constraints.txt does not pin {requirement.name}"
    assert requirement.specifier.contains(pinned), f"{requirement} excludes the pin {pinned}"


def test_pins_are_whole() -> None:
    """A dependency of a dependency is not pinned: tomorrow's install is not what was tested.

    torch pins its own CUDA packages; what only other platforms install is not seen here.
    """
    todo = [("sparsecast", frozenset({"dev"})), ("sparsecast", frozenset())]
    seen, loose = set(), set()
    while todo:
        name, extras = todo.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        if name != "sparsecast" and canonicalize_name(name) not in PINS:
            loose.add(name)
        for requirement in _requires(name) if name != "torch" else []:
            applies = requirement.marker is None or any(
                requirement.marker.evaluate({"extra": extra}) for extra in extras or {""}
            )
            if applies:
                extras_of = frozenset({"", *requirement.extras})
                todo.append((canonicalize_name(requirement.name), extras_of))
    assert not loose, f"constraints.txt does not pin {sorted(loose)}"


def test_no_file_names_a_machine_or_a_registry() -> None:
    """A path or a host of the place where the code was written would be wrong everywhere else."""
    paths = r"/(?:work|root|opt|home/\w+|Users/\w+|tmp/w)/"
    hosts = r"py" + r"pi\.org|python" + r"hosted\.org|download\.py" + r"torch\.org"
    pattern = re.compile(rf"(?<![\w.$}}>]){paths}|{hosts}")
    found = []
    for path in FILES:
        if path == "tests/test_project.py" or (ROOT / path).suffix in {".png", ".gif", ".svg"}:
            continue
        for number, line in enumerate((ROOT / path).read_text("utf-8").splitlines(), 1):
            if hit := pattern.search(line):
                found.append(f"{path}:{number}: {hit[0]}")
    assert not found


def test_documents_name_only_targets_that_exist() -> None:
    """A document tells a reader to type `make x`, and the Makefile has no x."""
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, re.M))
    for path in [f for f in FILES if f.endswith(".md")]:
        text = (ROOT / path).read_text("utf-8")
        named = set(re.findall(r"(?:^\$? *|`)make ([a-z]+)", text, re.M))
        assert named <= targets, f"{path} names {sorted(named - targets)}"


def test_documents_name_only_files_that_exist() -> None:
    """A document sends a reader to a file that was moved or renamed."""
    for path in [f for f in FILES if f.endswith(".md")]:
        folder = (ROOT / path).parent
        for target in re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", (ROOT / path).read_text("utf-8")):
            assert (folder / target).exists(), f"{path} links to {target}"


def test_ci_runs_the_test_command_of_the_readme() -> None:
    """CI runs what a person is told to run: the same command, and the script can be executed."""
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & stat.S_IXUSR
    commands = [line for line in script.read_text("utf-8").splitlines() if "make" in line]
    assert commands == ["exec make test"]
    assert "make test" in (ROOT / "README.md").read_text("utf-8")


def test_the_changelog_has_this_version() -> None:
    """The version moves on and the changelog does not say what is in it."""
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    version = re.escape(PYPROJECT["project"]["version"])
    assert re.search(rf"^## \[{version}\] – (unreleased|\d{{4}}-\d\d-\d\d)$", changelog, re.M)


def test_exceptions_to_the_checks_say_why() -> None:
    """A `noqa` or `type: ignore` without a reason, beside it or in the comment above, outlives
    its cause."""
    bare = []
    for path in [f for f in FILES if f.endswith(".py") and f != "tests/test_project.py"]:
        above = ""
        for number, line in enumerate((ROOT / path).read_text("utf-8").splitlines(), 1):
            hit = re.search(r"#\s*(?:noqa|type: ignore)(.*)", line)
            if hit and not ("type:" in hit[0] and path.startswith("tests/")):  # mypy reads none
                if hit[1] == "[no-untyped-call]":
                    continue  # says it all: somebody else's function has no annotations
                reasoned = re.fullmatch(r"(?:: [A-Z\d, ]+|\[[\w, -]+\])\s*[-–—:#]+ ?\w.+", hit[1])
                if not (reasoned or above.strip().startswith("# ")):
                    bare.append(f"{path}:{number}")
            above = line
    assert not bare, f"write `# noqa: CODE - why`, or the reason in a comment above: {bare}"


@pytest.mark.timeout(180)
def test_wheel_and_source_archive_hold_the_packages(tmp_path: Path) -> None:
    """A user installs from the wheel, or from a wheel built of the source archive: every module,
    the licence and the typing marker are in both, and tests and bench are not packages there."""
    tree = tmp_path / "tree"
    for path in FILES:
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, tree / path)
    archive = _build("sdist", tree, tmp_path)
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    expected = {f"sparsecast/{f}" for f in FILES if f.endswith(".py") and _is_packaged(f)}
    expected |= {"sparsecast/py.typed"}
    for source in (tree, unpacked):
        with zipfile.ZipFile(_build("wheel", source, source.parent / "out")) as wheel:
            names = {n for n in wheel.namelist() if not n.split("/")[0].endswith(".dist-info")}
            assert names == expected
            assert any(n.endswith("/licenses/LICENSE") for n in wheel.namelist())
            (entry_points,) = (n for n in wheel.namelist() if n.endswith("entry_points.txt"))
            assert b"sparsecast = sparsecast." in wheel.read(entry_points)


def _build(kind: str, source: Path, out: Path) -> Path:
    out.mkdir(exist_ok=True)
    program = (
        "import json, sys\nfrom setuptools import build_meta\n"
        f"print(json.dumps(build_meta.build_{kind}(sys.argv[1])))"
    )
    command = [sys.executable, "-c", program, str(out)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return out / json.loads(done.stdout.splitlines()[-1])


def _is_packaged(path: str) -> bool:
    return Path(path).parts[0] not in {"tests", "bench", "docs"}


def _file_of(module: str) -> str:
    parts = module.split(".")[1:]
    if (ROOT / Path(*parts) / "__init__.py").exists():
        return Path(*parts, "__init__.py").as_posix()
    return Path(*parts).with_suffix(".py").as_posix()


def _imported_by_test(path: str) -> Iterator[str]:
    for node in ast.walk(ast.parse((ROOT / path).read_text("utf-8"))):
        match node:
            case ast.ImportFrom(module=str(module), names=names, level=0):
                modules = [module, *(f"{module}.{alias.name}" for alias in names)]
            case ast.Import(names=names):
                modules = [alias.name for alias in names]
            case _:
                continue
        for module in modules:
            if module.split(".")[0] == "sparsecast":
                yield _file_of(module)
            else:
                yield f"tests/{module}.py"  # a helper of the tests, if there is such a file


def _requires(name: str) -> list[Requirement]:
    try:
        return [Requirement(r) for r in requires(name) or []]
    except PackageNotFoundError:
        pytest.fail(f"{name} is not installed: run `make test`")
