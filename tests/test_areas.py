"""tests/areas.py: what a manifest says, and what is refused in it."""

from pathlib import Path

import pytest

from .areas import AreasError, files, load, matches


@pytest.mark.parametrize(
    ("globs", "path", "expected"),
    [
        ("a/*.py", "a/b.py", True),
        ("a/*.py", "a/b/c.py", False),
        ("a/**/t_*.py", "a/t_x.py", True),
        ("a/**/t_*.py", "a/b/c/t_x.py", True),
        ("a/**/t_*.py", "a/b/c/x.py", False),
        ("a/**", "a/b/c", True),
        ("a/**", "ab/c", False),
        ("a.py", "axpy", False),
        ("**/*.py", "x.py", True),
        ("a/*.py !a/b*.py", "a/c.py", True),
        ("a/*.py !a/b*.py", "a/b1.py", False),
        ("!a/b*.py a/*.py", "a/b1.py", False),
        ("!a/b*.py", "a/c.py", False),
    ],
)
def test_globs_name_what_they_say(globs: str, path: str, expected: bool) -> None:
    """A star stays within a folder, two stars cross folders, a dot is a dot, a ! leaves out."""
    assert matches(path, globs.split()) is expected


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('[area.a]\nabout = "x"', "neither tests nor commands"),
        ('[area.a]\nabout = "x"\ntests = ["t"]\nneeds = "tpu"', "'tpu'"),
        ('[area.a]\nabout = "x"\ntests = "t"', "list of strings"),
        ('[area.a]\nabout = "x"\ntests = ["t"]\nuses = ["b"]', "uses 'b', which is no area"),
        ('[area.a]\nabout = "x"\ntests = ["t"]\nquiet = "no"', "quiet is 'no'"),
        ('[area.a]\ntests = ["t"]', "about"),
        ('[area.a]\nabout = "x"\ntests = ["t"]\nsource = ["s"]', r"unknown keys \['source'\]"),
        ("everywhere = []\nelsewhere = []", "elsewhere"),
    ],
)
def test_a_wrong_manifest_is_refused_by_name(tmp_path: Path, text: str, told: str) -> None:
    """Someone mistypes a key of areas.toml; the error names it instead of running less."""
    manifest = tmp_path / "areas.toml"
    manifest.write_text(text)
    with pytest.raises(AreasError, match=told):
        load(manifest)


def test_an_area_depends_on_what_the_areas_it_uses_depend_on(tmp_path: Path) -> None:
    """c uses b, b uses a: a change of a's sources, or of what counts everywhere, calls for c; what
    a leaves out is left out there only."""
    manifest = tmp_path / "areas.toml"
    manifest.write_text(
        'everywhere = ["pins"]\n'
        '[area.a]\nabout = "x"\ntests = ["ta"]\nsources = ["a/**", "!a/b"]\n'
        '[area.b]\nabout = "x"\ntests = ["tb"]\nsources = ["b/**"]\nuses = ["a"]\n'
        '[area.c]\nabout = "x"\ntests = ["tc"]\nsources = ["a/b"]\nuses = ["b"]\n'
    )
    paths = ["pins", "a/a", "a/b", "b/b", "ta", "tb", "tc"]
    chosen = {n: [p for p in paths if a.depends_on(p)] for n, a in load(manifest).items()}
    assert chosen == {
        "a": ["pins", "a/a", "ta"],
        "b": ["pins", "a/a", "b/b", "tb"],
        "c": ["pins", "a/a", "a/b", "b/b", "tc"],
    }


def test_what_tools_leave_behind_is_no_file_of_the_project(tmp_path: Path) -> None:
    """A virtual environment, caches and build products lie about; only the rest counts."""
    for name in (
        "a.py",
        ".ci/run",
        ".gitignore",
        ".venv/lib/x.py",
        ".git/config",
        "b/__pycache__/a.pyc",
        "build/lib/x.py",
        "s.egg-info/PKG-INFO",
        "tests/test_a.py",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert files(tmp_path) == [".ci/run", ".gitignore", "a.py", "tests/test_a.py"]
