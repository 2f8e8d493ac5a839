"""`sparsecast log` on the logs of real runs: what it prints, what it exits with, what it leaves."""

import json
import os
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import safetensors.torch
from typer.testing import CliRunner

import commands
from commands import Done
from runs import QUICK, Site, eventually, same_bits, step, until_stored, weights
from sparsecast.messages.control import LogEntry
from sparsecast.pipeline.bus.broker import Broker
from sparsecast.pipeline.log import files
from sparsecast.pipeline.log.directory import DirectoryLog
from sparsecast.workers.audit import Checked, Made, Verdict
from sparsecast.workers.cli import app
from sparsecast.workers.entries import PatchPayloads
from sparsecast.workers.logview import EntryView, Listing, Pruned

#: Where a patch has its base version (docs/patch-format.md).
BASE_VERSION_AT = 32
#: An anchor every two versions, and nothing pruned by the trainer.
POLICY = replace(QUICK, anchor_every=2, keep_versions=1000)


async def sparsecast(*arguments: str) -> Done:
    """Run a command of `sparsecast log`."""
    return await commands.sparsecast("log", *arguments)


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings from outside, no live broker, and lines that are not wrapped."""
    commands.no_settings(tmp_path, monkeypatch)


class Past:
    """A run that has ended: six versions, in a directory and in JetStream."""

    def __init__(self, site: Site, folder: Path) -> None:
        self.site = site
        self.folder = folder
        self.log = f"dir:{folder},jetstream"
        self.files = folder / site.run
        #: The weights of each version.
        self.states: list[dict[str, Any]] = []

    async def publish(self, versions: int = 6) -> None:
        """Live the run; each version is in the log before the next one is made."""
        trained = weights()
        publisher = await self.site.publisher(trained, log=self.log, policy=POLICY)
        self.states.append({name: tensor.clone() for name, tensor in trained.items()})
        await until_stored(publisher, 0, anchor=True)
        for version in range(1, versions + 1):
            step(trained, version)
            await publisher.publish(step=version * 10)
            self.states.append({name: tensor.clone() for name, tensor in trained.items()})
            await until_stored(publisher, version, anchor=version % 2 == 0)
        await publisher.close()

    async def publish_merged(self) -> None:
        """Live a run of six versions with an anchor at its start alone, merged by twos."""
        policy = replace(QUICK, merge_every=2, keep_versions=1000)
        trained = weights()
        publisher = await self.site.publisher(trained, log=self.log, policy=policy)
        for version in range(7):
            if version:
                step(trained, version)
                await publisher.publish()
            self.states.append({name: tensor.clone() for name, tensor in trained.items()})
            await until_stored(publisher, version, anchor=version == 0)

        async def merged() -> bool:
            entries = await publisher._ports.log.entries(timeout_s=5)
            return sum(entry.merged > 0 for entry in entries) == 4

        await eventually(merged)
        await publisher.close()

    async def __call__(self, *arguments: str, log: str | None = None) -> Done:
        """A command on this run."""
        return await sparsecast(
            *arguments, "--run", self.site.run, "--bus", self.site.url, "--log", log or self.log,
        )  # fmt: skip

    def file(self, kind: str) -> Path:
        """The file of an entry."""
        [found] = self.files.glob(f"1-{kind}-*.safetensors")
        return found


@pytest.fixture
async def merged(site: Site, tmp_path: Path) -> Past:
    """A run of the past with merged patches."""
    folder = tmp_path / "log"
    folder.mkdir()
    past = Past(site, folder)
    await past.publish_merged()
    return past


@pytest.fixture
async def past(site: Site, tmp_path: Path) -> Past:
    """A run of the past."""
    folder = tmp_path / "log"
    folder.mkdir()
    past = Past(site, folder)
    await past.publish()
    return past


async def test_a_log_is_listed_shown_and_proven(past: Past) -> None:
    """The run has ended; every entry is in both tiers, and every version is made again: in JSON
    with the documented keys, in words for people, with exit code 0."""
    done = await past("ls", "--json")
    assert done.returncode == 0, done.stderr
    found = msgspec.json.decode(done.stdout, type=Listing)
    assert found.head == 6
    assert len(found.entries) == 10
    assert all(len(entry.tiers) == 2 for entry in found.entries)
    assert found.way
    shown = await past("show", "4", "--json")
    entries = msgspec.json.decode(shown.stdout, type=list[EntryView])
    assert [(e.base_version, e.version, e.step) for e in entries] == [(3, 4, 40), (None, 4, None)]
    verified = await past("verify", "--json")
    assert verified.returncode == 0, verified.stdout
    verdict = msgspec.json.decode(verified.stdout, type=Verdict)
    assert verdict.ok
    assert (verdict.anchor, verdict.head, verdict.unbroken) == (6, 6, True)
    assert len(verdict.entries) == 20
    assert [made.version for made in verdict.versions if made.ok] == [0, 1, 2, 2, 3, 4, 4, 5, 6, 6]
    for command, says in ((("ls",), "1-anchor-0"), (("show", "5"), "1-patch-4-5"),
                          (("verify",), "ok: run")):  # fmt: skip
        told = await past(*command)
        assert told.returncode == 0, told.stderr
        assert says in told.stdout


async def test_merged_patches_are_listed_and_proven(merged: Past, tmp_path: Path) -> None:
    """Entries that overlap: ls tells which were merged, and takes them on its way; verify proves
    each entry's digest, those of merged ones in the place of what they cover; export gives every
    version's bits; a merged patch that leaves an element out is found, at its version."""
    done = await merged("ls", "--json")
    assert done.returncode == 0, done.stderr
    found = msgspec.json.decode(done.stdout, type=Listing)
    spans = [(e.base_version, e.version) for e in found.entries if e.merged]
    assert spans == [(0, 2), (2, 4), (0, 4), (4, 6)]
    assert [name.rsplit("-", 1)[0] for name in found.way] == [
        "1-anchor-0", "1-merged-0-4", "1-merged-4-6"
    ]  # fmt: skip
    done = await merged("verify", "--json")
    assert done.returncode == 0, done.stdout
    verdict = msgspec.json.decode(done.stdout, type=Verdict)
    assert {made.name for made in verdict.versions if made.ok} == {e.name for e in found.entries}
    to = tmp_path / "m.safetensors"
    for version in range(7):
        done = await merged("export", "--to", str(to), "--version", str(version))
        assert done.returncode == 0, done.stderr
        assert same_bits(safetensors.torch.load_file(to), merged.states[version])
    path, other = merged.file("merged-0-4"), merged.file("merged-2-4")
    with path.open("rb") as whole, other.open("rb") as less:
        entry = files.read(whole, path).entry
        payload = files.read_payload(less, files.read(less, other), lambda: None)
    # Of the newest values only, so that who stands at version 2 or 3 would not notice.
    struct.pack_into("<q", payload, BASE_VERSION_AT, 0)
    checksum = PatchPayloads().checksum(payload)
    wrong = msgspec.structs.replace(entry, nbytes=len(payload), checksum=checksum)
    with path.open("wb") as file:
        files.write(file, wrong, memoryview(payload), None, lambda: None)
    done = await merged("verify", "--json", log=f"dir:{merged.folder}")
    assert done.returncode == 1
    verdict = msgspec.json.decode(done.stdout, type=Verdict)
    assert [made.name for made in verdict.versions if not made.ok] == [entry.name]
    assert all(checked.ok for checked in verdict.entries)


async def test_pruning_leaves_merged_patches_in_place_of_old_ones(merged: Past) -> None:
    """Of all but the newest two versions the single patches go that merged ones cover; what stays
    is proven, and leads to the same newest version."""
    done = await merged("prune", "--keep-versions", "2", "--json")
    assert done.returncode == 0, done.stderr
    pruned = msgspec.json.decode(done.stdout, type=Pruned)
    assert [name.rsplit("-", 1)[0] for name in pruned.dropped] == [
        f"1-patch-{version}-{version + 1}" for version in range(4)
    ]
    done = await merged("verify", "--json")
    assert done.returncode == 0, done.stdout
    verdict = msgspec.json.decode(done.stdout, type=Verdict)
    assert [made.version for made in verdict.versions] == [0, 2, 4, 5, 6, 4, 6]
    assert (verdict.head, verdict.unbroken) == (6, True)


@pytest.mark.parametrize("tiers", ["both", "dir", "jetstream"])
async def test_any_version_becomes_a_file(past: Past, tmp_path: Path, tiers: str) -> None:
    """Export of each version, by either tier: a file with the bits that were published. A
    directory alone needs no bus."""
    log = {"both": past.log, "dir": f"dir:{past.folder}", "jetstream": "jetstream"}[tiers]
    bus = () if tiers == "dir" else ("--bus", past.site.url)
    for version in (0, 3, None):
        to = tmp_path / f"{version}.safetensors"
        which = () if version is None else ("--version", str(version))
        done = await sparsecast(
            "export", "--run", past.site.run, *bus, "--log", log, "--to", str(to), *which,
            "--json",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        said = json.loads(done.stdout)
        assert set(said) == {"run", "version", "to", "nbytes", "digest", "way"}
        assert same_bits(safetensors.torch.load_file(to), past.states[said["version"]])
        assert said["version"] == (6 if version is None else version)
    assert not [name for name in os.listdir(tmp_path) if name.endswith("tmp")]
    missing = await past("export", "--to", str(tmp_path / "x"), "--version", "77", log=log)
    assert missing.returncode == 1
    assert "it has no version 77; it goes from 0 to 6" in missing.stderr
    assert not (tmp_path / "x").exists()


async def test_damage_is_found_named_and_gone_around(past: Past, tmp_path: Path) -> None:
    """A bit of a patch flips in one tier, and a file of another is cut off: verify names both, with
    exit code 1; export goes around them by the other tier, and without it by what is left."""
    flipped, cut = past.file("patch-2-3"), past.file("patch-4-5")
    data = bytearray(flipped.read_bytes())
    data[-3] ^= 4
    flipped.write_bytes(data)
    cut.write_bytes(cut.read_bytes()[:-100])
    done = await past("verify", "--json")
    assert done.returncode == 1
    verdict = msgspec.json.decode(done.stdout, type=Verdict)
    [bad] = [entry for entry in verdict.entries if not entry.ok]
    assert flipped.name in bad.reason
    assert any(f"{cut} is damaged" in problem for problem in verdict.problems)
    assert all(made.ok for made in verdict.versions)
    listed = await past("ls")
    assert listed.returncode == 1
    assert f"{cut} is damaged: it has" in listed.stderr
    to = tmp_path / "m.safetensors"
    for log, version in ((past.log, 5), (f"dir:{past.folder}", 6)):
        exported = await past("export", "--to", str(to), "--version", str(version), log=log)
        assert exported.returncode == 0, exported.stderr
        assert same_bits(safetensors.torch.load_file(to), past.states[version])
    alone = await past("export", "--to", str(to), "--version", "5", log=f"dir:{past.folder}")
    assert alone.returncode == 1
    alone = await past("verify", log=f"dir:{past.folder}")
    assert alone.returncode == 1
    assert "NOT OK" in alone.stdout
    assert flipped.name in alone.stdout


async def test_a_wrong_digest_is_a_wrong_log(past: Past, tmp_path: Path) -> None:
    """A patch is whole and of another run's weights: its checksum is right and its digest is not.
    verify says at which version, and export leaves no file."""
    path = past.file("patch-5-6")
    past.file("anchor-6").unlink()
    with path.open("rb") as file:
        opened = files.read(file, path)
        payload = files.read_payload(file, opened, lambda: None)
    wrong = msgspec.structs.replace(opened.entry, digest=opened.entry.digest ^ 1)
    with path.open("wb") as file:
        files.write(file, wrong, memoryview(payload), None, lambda: None)
    log = f"dir:{past.folder}"
    done = await past("verify", "--json", log=log)
    verdict = msgspec.json.decode(done.stdout, type=Verdict)
    assert done.returncode == 1
    [made] = [made for made in verdict.versions if not made.ok]
    assert (made.version, made.reason) == (6, "the state is not the one that was published")
    exported = await past("export", "--to", str(tmp_path / "m"), log=log)
    assert exported.returncode == 1
    assert "has digest" in exported.stderr
    assert not [name for name in os.listdir(tmp_path) if name.endswith((".tmp", "m"))]


async def test_pruning_says_what_goes_and_leaves_what_leads_to_the_head(past: Past) -> None:
    """A dry run names the entries and drops nothing; then they go in both tiers; what stays is
    proven; pruning again drops nothing; fewer bytes go further."""
    dry = await past("prune", "--dry-run", "--json")
    would = msgspec.json.decode(dry.stdout, type=Pruned)
    assert would.dry_run
    assert would.kept == 5
    assert len(msgspec.json.decode((await past("ls", "--json")).stdout, type=Listing).entries) == 10
    done = await past("prune", "--json")
    assert done.returncode == 0, done.stderr
    assert msgspec.json.decode(done.stdout, type=Pruned).dropped == would.dropped
    assert len(list(past.files.iterdir())) == 5
    assert (await past("verify")).returncode == 0
    again = await past("prune")
    assert "dropped 0 entries" in again.stdout
    less = await past("prune", "--keep-bytes", "1", "--json")
    assert msgspec.json.decode(less.stdout, type=Pruned).kept == 2
    assert (await past("verify")).returncode == 0


async def test_pruning_without_the_journal_spares_every_epoch(past: Past) -> None:
    """The directory holds an older trainer's epoch 7, and the bus that knows that epoch 1 is the
    live one is not asked: the live trainer's chain stays. With the journal its rule is applied."""
    payload, log = b"", DirectoryLog(past.folder, past.site.run, PatchPayloads())
    old = LogEntry(
        name="7-patch-8-9-other", epoch=7, base_version=8, version=9, nbytes=0, checksum=0,
        digest=0, manifest_hash="m", chunks=0, writer="other",
    )  # fmt: skip
    await log.store(old, payload, timeout_s=5)
    directory = ("--run", past.site.run, "--log", f"dir:{past.folder}")
    done = await sparsecast("prune", *directory, "--keep-bytes", "1", "--json")
    assert done.returncode == 0, done.stderr
    pruned = msgspec.json.decode(done.stdout, type=Pruned)
    assert (len(pruned.dropped), pruned.kept) == (8, 3)
    assert {e.name.rsplit("-", 1)[0] for e in await log.entries(timeout_s=5)} == {
        "1-patch-5-6", "1-anchor-6", "7-patch-8-9"
    }  # fmt: skip
    asked = await past("verify", log=f"dir:{past.folder}")
    assert asked.returncode == 0, asked.stdout


async def test_a_bad_anchor_takes_nothing_with_it(past: Past) -> None:
    """The anchor that would stay is damaged in the only tier: nothing is dropped, exit code 1."""
    path = past.file("anchor-6")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    before = sorted(past.files.iterdir())
    done = await past("prune", log=f"dir:{past.folder}")
    assert done.returncode == 1
    assert f"{path} is damaged" in done.stderr
    assert sorted(past.files.iterdir()) == before


async def test_a_run_without_a_log(broker: Broker, run: str, tmp_path: Path) -> None:
    """Nobody has stored anything: ls says so; the others fail and say why."""
    options = ("--run", run, "--bus", broker.url)
    listed = await sparsecast("ls", *options)
    assert (listed.returncode, listed.stdout.splitlines()[-1]) == (0, "empty")
    for command, says in (
        (("show", "3"), "no entry of version 3"),
        (("verify",), ""),
        (("export", "--to", str(tmp_path / "x")), "is empty"),
    ):
        done = await sparsecast(*command, *options)
        assert done.returncode == 1, command
        assert says in done.stderr
    assert (await sparsecast("prune", *options)).returncode == 0


@pytest.mark.parametrize(
    ("command", "kinds"),
    [
        ("ls", (Listing, EntryView)),
        ("verify", (Verdict, Checked, Made)),
        ("prune", (Pruned,)),
    ],
    ids=["ls", "verify", "prune"],
)
def test_the_help_has_every_key_of_the_json(command: str, kinds: tuple[type, ...]) -> None:
    """A key is added to what a command prints: its help must tell it."""
    text = CliRunner().invoke(app, ["log", command, "--help"]).output
    for kind in kinds:
        for key in kind.__struct_fields__:  # type: ignore[attr-defined]
            assert key in text, f"{kind.__name__}.{key}"


async def test_the_settings_file_serves_the_log(past: Past, tmp_path: Path) -> None:
    """One TOML file for all commands: `log` at the top level is for worker and log alike, a table
    [log] for the log's commands, and a slip in it is named."""
    path = tmp_path / "s.toml"
    path.write_text(f'run = "{past.site.run}"\nlog = "dir:{past.folder}"\nmax-lag = 3\n')
    done = await sparsecast("ls", "--config", str(path), "--json")
    assert done.returncode == 0, done.stderr
    path.write_text(
        f'[log]\nrun = "{past.site.run}"\nlog = "dir:{past.folder}"\nkeep-versions = 6\n'
    )
    for command in (("ls",), ("prune", "--dry-run")):
        done = await sparsecast(*command, "--config", str(path))
        assert done.returncode == 0, done.stderr
    path.write_text("[log]\nkeep-verions = 6\n")
    done = await sparsecast("ls", "--config", str(path))
    assert done.returncode == 2
    assert "log has no setting 'keep-verions'" in done.stderr
