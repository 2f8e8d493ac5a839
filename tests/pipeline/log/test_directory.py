"""The directory tier beyond the contract: deaths, broken disks, damaged files, disks that hang."""

import asyncio
import errno
import os
import random
import signal
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from logs import ToyPayloads, entry, pieces
from sparsecast.messages.control import LogEntry
from sparsecast.messages.errors import InvalidName, LogError, LogHole
from sparsecast.pipeline.log import directory as module
from sparsecast.pipeline.log.directory import DirectoryLog
from spawn import Context, Processes

S = 10.0


def open_log(root: Path, told: list[str] | None = None) -> DirectoryLog:
    """A view of the log of `run` below this directory."""
    tell = told.append if told is not None else lambda reason: None
    return DirectoryLog(root, "run", ToyPayloads(), tell=tell)


def payload_of(version: int, nbytes: int = 3_000_000) -> bytes:
    """The same bytes for a version in every process."""
    return random.Random(version).randbytes(nbytes + version)


def entry_of(version: int, nbytes: int = 3_000_000) -> LogEntry:
    """Every third one is an anchor."""
    base = None if version % 3 == 0 else version - 1
    return entry(base, version, payload_of(version, nbytes))


async def require_whole(root: Path) -> list[int]:
    """Whatever a fresh reader sees is whole, and nothing is damaged; the versions."""
    told: list[str] = []
    log = open_log(root, told)
    found = await log.entries(timeout_s=S)
    for one in found:
        assert await log.load(one, timeout_s=S) == payload_of(one.version)
    assert told == []
    return [one.version for one in found]


def left_over(root: Path) -> list[str]:
    """The names of temporary files."""
    return [name for name in os.listdir(root / "run") if name.endswith(".tmp")]


# ---- deaths


async def store_for_ever(context: Context, root: str) -> None:
    """Store one version after the other, until someone kills this process."""
    log = open_log(Path(root))
    for version in range(10_000):
        await log.store(entry_of(version), payload_of(version), timeout_s=S)
        context.mark(f"stored {version}")


@pytest.mark.timeout(120)
def test_a_writer_is_killed_again_and_again(tmp_path: Path) -> None:
    """SIGKILL at any moment of a store, six times over: readers see whole entries only, all that
    were told to be stored are there, and the next writer sweeps what the dead one left."""
    lottery = random.Random(1)
    for _ in range(6):
        with Processes(1, store_for_ever, str(tmp_path), timeout_s=30) as processes:
            processes.wait("stored 4", rank=0)
            threading.Event().wait(lottery.random() * 0.05)
            processes.kill(0)
        versions = asyncio.run(require_whole(tmp_path))
        assert versions[:5] == [0, 1, 2, 3, 4]
        assert versions == list(range(len(versions)))
        asyncio.run(open_log(tmp_path).store(entry_of(0), payload_of(0), timeout_s=S))
        assert left_over(tmp_path) == []


async def die_within(context: Context, root: str, step: str) -> None:
    """Store two entries, and die at this step of the third one."""

    def die(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    log = open_log(Path(root))
    for version in range(2):
        await log.store(entry_of(version), payload_of(version), timeout_s=S)
    match step:
        case "within the tensors":
            write, calls = module.write, []

            def write_some(file: Any, one: Any, view: Any, anatomy: Any, go_on: Any) -> None:
                def count() -> None:
                    calls.append(1)
                    if len(calls) == 2:
                        file.flush()
                        die()

                write(file, one, view, anatomy, count)

            module.write = write_some
        case "before the file is synced":
            os.fsync = die
        case "before it has its name":
            Path.replace = die  # type: ignore[method-assign]
        case "before the directory is synced":
            module._sync = die
    await log.store(entry_of(2, 20_000_000), payload_of(2, 20_000_000), timeout_s=S)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "step",
    [
        "within the tensors", "before the file is synced", "before it has its name",
        "before the directory is synced",
    ],
)  # fmt: skip
def test_a_death_at_any_step_leaves_nothing_half(tmp_path: Path, step: str) -> None:
    """The writer dies at each step of a store: the entry is there, whole, or not at all; a
    successor stores it, and nothing else is left in the directory."""
    with (
        Processes(1, die_within, str(tmp_path), step, timeout_s=30) as processes,
        pytest.raises(AssertionError, match="SIGKILL"),
    ):
        processes.results()
    told: list[str] = []
    log = open_log(tmp_path, told)
    found = asyncio.run(log.entries(timeout_s=S))
    renamed = step == "before the directory is synced"
    assert [one.version for one in found] == ([0, 1, 2] if renamed else [0, 1])
    assert bool(left_over(tmp_path)) != renamed
    third, payload = entry_of(2, 20_000_000), payload_of(2, 20_000_000)
    successor = open_log(tmp_path, told)
    asyncio.run(successor.store(third, payload, timeout_s=S))
    assert asyncio.run(successor.load(third, timeout_s=S)) == payload
    assert sorted(os.listdir(tmp_path / "run")) == [
        "1-anchor-0.safetensors", "1-patch-1.safetensors", "1-patch-2.safetensors"
    ]  # fmt: skip
    assert told == []


async def test_roots_sweep_what_is_their_own(tmp_path: Path) -> None:
    """A trainer of three roots died amid its pieces, and its successor has two, one of which writes
    just now: the other one sweeps what nobody can be at, and a trainer of one root the rest."""
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("old.0", "old.1", "old.2", "alone"):
        (folder / f".{name}.abcd{module.TEMPORARY}").touch()
    await open_log(tmp_path).store(pieces(0, 1, [b"abc", b"de"])[0], b"abc", timeout_s=S)
    assert left_over(tmp_path) == [f".old.1.abcd{module.TEMPORARY}"]
    await open_log(tmp_path).store(entry(0, 1, b"abc"), b"abc", timeout_s=S)
    assert left_over(tmp_path) == []
    assert {one.name for one in await open_log(tmp_path).entries(timeout_s=S)} == {
        "1-patch-1", "1-patch-1.0"
    }  # fmt: skip


# ---- broken disks


@pytest.mark.parametrize(
    ("number", "hint"),
    [
        (errno.ENOSPC, "free some space, or keep less"),
        (errno.EROFS, "mount it writable"),
        (errno.EACCES, "give this user the right to it"),
        (errno.EIO, "Input/output error"),
    ],
    ids=["full", "read-only", "forbidden", "broken"],
)
@pytest.mark.parametrize("step", ["open", "write", "fsync", "rename", "directory"])
async def test_a_disk_that_refuses_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, number: int, hint: str
) -> None:
    """The disk refuses at each step of a store: LogError with the file or directory and what to do,
    no temporary file; once it works again, the same entry is stored."""
    log = open_log(tmp_path)
    await log.store(entry_of(0), payload_of(0), timeout_s=S)

    def refuse(*arguments: Any, **_: Any) -> None:
        raise OSError(number, os.strerror(number), str(tmp_path / "run" / "x"))

    with monkeypatch.context() as broken:
        match step:
            case "open":
                real: Callable[..., Any] = Path.open

                def open_(path: Path, mode: str = "r", *rest: Any, **more: Any) -> Any:
                    return refuse() if mode == "wb" else real(path, mode, *rest, **more)

                broken.setattr(Path, "open", open_)
            case "write":
                broken.setattr(module, "write", refuse)
            case "fsync":
                broken.setattr(os, "fsync", refuse)
            case "rename":
                broken.setattr(Path, "replace", refuse)
            case "directory":
                broken.setattr(module, "_sync", refuse)
        with pytest.raises(LogError, match=hint) as caught:
            await log.store(entry_of(1), payload_of(1), timeout_s=S)
        assert "log entry '1-patch-1'" in str(caught.value)
        assert str(tmp_path / "run") in str(caught.value)
    assert left_over(tmp_path) == []
    assert await require_whole(tmp_path) == ([0, 1] if step == "directory" else [0])
    await log.store(entry_of(1), payload_of(1), timeout_s=S)
    assert await require_whole(tmp_path) == [0, 1]


async def test_a_directory_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    """The shared disk is not mounted: every call is a LogError that says what to do, and no
    directory appears in its place. It comes, goes and comes back: so do the entries."""
    root = tmp_path / "disk"
    log = open_log(root)
    first = entry_of(0)
    for _ in range(2):
        for call in (
            log.store(first, payload_of(0), timeout_s=S),
            log.entries(timeout_s=S),
            log.load(first, timeout_s=S),
            log.prune([first], timeout_s=S),
        ):
            with pytest.raises(
                LogError, match=rf"is the disk mounted\?.*mkdir -p {root}"
            ) as caught:
                await call
            assert not isinstance(caught.value, LogHole)
        assert not root.exists()
        os.mkdir(root)
        await log.store(first, payload_of(0), timeout_s=S)
        assert await require_whole(root) == [0]
        os.unlink(root / "run" / "1-anchor-0.safetensors")
        os.rmdir(root / "run")
        assert await log.entries(timeout_s=S) == []
        os.rmdir(root)


async def test_a_read_that_hung_tells_nothing_after_its_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk gives half of an entry and hangs; it goes on after the deadline, on its thread: who
    has turned to another tier by then hears nothing of it."""
    log, mended, told = open_log(tmp_path), threading.Event(), []
    await log.store(entry_of(1), payload_of(1), timeout_s=S)

    def half(file: object, opened: object, go_on: object, progress: Callable[[int], None]) -> None:
        progress(10)
        mended.wait(S)
        progress(20)

    monkeypatch.setattr(module, "read_payload", half)
    with pytest.raises(LogError, match="is slow, or hangs"):
        await log.load(entry_of(1), timeout_s=0.2, progress=told.append)
    assert told == [10]
    mended.set()
    await asyncio.sleep(0.2)
    assert told == [10]


async def test_a_disk_that_hangs_costs_a_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fsync does not return: the store ends at its deadline, and so does the next one, without a
    second thread behind it; reading goes on. The disk wakes up: what nobody waits for any more
    leaves nothing, and storing works."""
    log = open_log(tmp_path)
    await log.store(entry_of(0), payload_of(0), timeout_s=S)
    hangs, sync = threading.Event(), os.fsync

    def fsync(descriptor: int) -> None:
        hangs.wait(S)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    loop = asyncio.get_running_loop()
    for version in (1, 2, 1):
        began = loop.time()
        with pytest.raises(LogError, match=r"within 0\.2 s: the disk of .* is slow, or hangs"):
            await log.store(entry_of(version), payload_of(version), timeout_s=0.2)
        assert loop.time() - began < 1.0
    writers = [t for t in threading.enumerate() if t.name == "sparsecast-log-write"]
    assert len(writers) == 1
    [found] = await log.entries(timeout_s=S)
    assert await log.load(found, timeout_s=S) == payload_of(0)
    hangs.set()
    await log.store(entry_of(2), payload_of(2), timeout_s=S)
    assert await require_whole(tmp_path) == [0, 2]
    assert left_over(tmp_path) == []


# ---- damage


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    anchor=st.booleans(),
    place=st.floats(0, 1, exclude_max=True),
    bit=st.integers(0, 7),
    cut=st.booleans(),
)
async def test_no_damage_shows_up_as_an_entry(
    tmp_path: Path, anchor: bool, place: float, bit: int, cut: bool
) -> None:
    """Any bit of a file flips, or it ends anywhere: the entry is not listed or as it was, loading
    it gives the bytes that were stored or an error that names the file, and another entry is not
    touched by that. Stored again it is whole."""
    payload = payload_of(7, 300)
    stored = entry(None if anchor else 6, 7, payload)
    log = open_log(tmp_path)
    await log.store(stored, payload, timeout_s=S)
    path = tmp_path / "run" / f"{stored.name}.safetensors"
    data = bytearray(path.read_bytes())
    at = int(place * len(data))
    if cut:
        del data[at:]
    else:
        data[at] ^= 1 << bit
    path.write_bytes(data)
    told: list[str] = []
    for view in (log, open_log(tmp_path, told)):
        listed = await view.entries(timeout_s=S)
        assert listed in ([], [stored])
        with pytest.raises(LogError, match=path.name) as caught:
            await view.load(stored, timeout_s=S)
        assert "remove it, or bring it back from a copy" in str(caught.value)
        assert await view.entries(timeout_s=S) == []
        if listed == []:
            assert view is log or len(told) == 1
    await log.store(stored, payload, timeout_s=S)
    assert await open_log(tmp_path).load(stored, timeout_s=S) == payload
    await log.prune([stored], timeout_s=S)


async def test_foreign_files_are_passed_over(tmp_path: Path) -> None:
    """A checkpoint of somebody else's, a renamed entry, an empty file, a directory of notes: told
    once each if they look like entries, and the entries are listed."""
    told: list[str] = []
    log = open_log(tmp_path, told)
    await log.store(entry_of(0), payload_of(0), timeout_s=S)
    folder = tmp_path / "run"
    whole = (folder / "1-anchor-0.safetensors").read_bytes()
    for name, data in (
        ("copy.safetensors", whole),
        ("empty.safetensors", b""),
        ("model.safetensors", (2).to_bytes(8, "little") + b"{}"),
        ("huge.safetensors", b"\xff" * 100),
        ("notes.txt", b"hello"),
    ):
        (folder / name).write_bytes(data)
    for _ in range(2):
        assert await log.entries(timeout_s=S) == [entry_of(0)]
    assert sorted(reason.split("/")[-1].split(" is")[0] for reason in told) == [
        "copy.safetensors", "empty.safetensors", "huge.safetensors", "model.safetensors"
    ]  # fmt: skip
    assert any("it is the file of entry '1-anchor-0'" in reason for reason in told)


async def test_an_entry_keeps_all_that_it_says(tmp_path: Path) -> None:
    """A step with a loss that is no number, which JSON cannot write: another process reads the
    entry with its tags, and loads it."""
    tags = {"loss": float("nan"), "peak": float("inf"), "note": "é\n", "seed": 2**63, "ok": True}
    stored = msgspec.structs.replace(entry_of(1), tags=tags, writer="w")
    await open_log(tmp_path).store(stored, payload_of(1), timeout_s=S)
    other = open_log(tmp_path)
    [found] = await other.entries(timeout_s=S)
    assert repr(found) == repr(stored)
    assert await other.load(found, timeout_s=S) == payload_of(1)


async def test_names_are_tokens(tmp_path: Path) -> None:
    """A run or an entry called like a way out of the directory is refused."""
    with pytest.raises(InvalidName):
        DirectoryLog(tmp_path, "../other", ToyPayloads())
    payload = b"x"
    bad = LogEntry(
        name="../x", epoch=1, base_version=0, version=1, nbytes=1, checksum=zlib.crc32(payload),
        digest=0, manifest_hash="m", chunks=0,
    )  # fmt: skip
    for call in (open_log(tmp_path).store(bad, payload, timeout_s=S),
                 open_log(tmp_path).load(bad, timeout_s=S)):  # fmt: skip
        with pytest.raises(InvalidName):
            await call
