"""`sparsecast log` on what the roots of a trainer of several have stored: one entry a version."""

from pathlib import Path

import msgspec
import pytest
import safetensors.torch

import commands
from commands import Done
from rooted import WRITER, Roots
from runs import same_bits
from sparsecast.pipeline.bus.broker import Broker
from sparsecast.pipeline.bus.journal import Journal
from sparsecast.pipeline.bus.nats import NatsBus
from sparsecast.pipeline.log.directory import DirectoryLog
from sparsecast.pipeline.log.jetstream import JetStreamLog
from sparsecast.pipeline.log.pieces import WholeLog
from sparsecast.pipeline.log.tiered import TieredLog
from sparsecast.workers.audit import Verdict
from sparsecast.workers.entries import PatchPayloads
from sparsecast.workers.logview import EntryView, Listing, Pruned

S = 10.0
VERSIONS = 4


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings from outside, no live broker, and lines that are not wrapped."""
    commands.no_settings(tmp_path, monkeypatch)


class Past:
    """A run of three roots that has ended, in a directory and in JetStream: four versions, anchors
    at 0 and 2, and of a fifth version what one root had stored when it died."""

    def __init__(self, bus: NatsBus, url: str, run: str, folder: Path) -> None:
        self.bus = bus
        self.url = url
        self.run = run
        self.folder = folder
        self.files = folder / run
        self.roots = Roots(3)

    def log(self, root: int) -> WholeLog:
        """The log, as the process of a root has it."""
        payloads = PatchPayloads(lambda: self.roots.layouts[root].local)
        directory = DirectoryLog(self.folder, self.run, payloads)
        return WholeLog(
            TieredLog({"directory": directory, "jetstream": JetStreamLog(self.bus, self.run)})
        )

    async def live(self) -> None:
        """Claim the run, and store all of it."""
        journal = Journal(self.bus, self.run)
        await journal.open(S)
        await journal.append(
            self.roots.claim(), message_id="claim", expected_sequence=0, timeout_s=S
        )
        stored = [self.roots.anchor()]
        for version in range(1, VERSIONS + 1):
            stored.append(self.roots.publish())
            if version == 2:
                stored.append(self.roots.anchor())
        stored.append(self.roots.publish()[:1])
        logs = [self.log(root) for root in range(3)]
        for pieces in stored:
            for entry, payload in pieces:
                await logs[entry.root].store(entry, payload, timeout_s=S)

    async def __call__(self, *arguments: str, bus: bool = True) -> Done:
        """A command on this run; without the bus on the directory alone."""
        log = f"dir:{self.folder}" + (",jetstream" if bus else "")
        url = ("--bus", self.url) if bus else ()
        return await commands.sparsecast("log", *arguments, "--run", self.run, *url, "--log", log)


@pytest.fixture
async def past(bus: NatsBus, broker: Broker, run: str, tmp_path: Path) -> Past:
    """A run of the past."""
    folder = tmp_path / "log"
    folder.mkdir()
    past = Past(bus, broker.url, run, folder)
    await past.live()
    return past


async def test_a_version_is_one_entry(past: Past) -> None:
    """ls and show have one line a version, with the number of its pieces; what is not whole is
    named by itself, and the way does not lead over it."""
    done = await past("ls", "--json")
    assert done.returncode == 0, done.stderr
    found = msgspec.json.decode(done.stdout, type=Listing)
    assert [entry.name.removesuffix(f"-{WRITER}") for entry in found.entries] == [
        "1-anchor-0", "1-patch-0-1", "1-patch-1-2", "1-anchor-2", "1-patch-2-3", "1-patch-3-4"
    ]  # fmt: skip
    assert {entry.pieces for entry in found.entries} == {3}
    assert {len(entry.tiers) for entry in found.entries} == {2}
    assert {entry.manifest_hash for entry in found.entries} == {past.roots.manifest.hash}
    assert (found.head, found.partial) == (4, [f"1-patch-4-5-{WRITER}.0"])
    shown = await past("show", "2", "--json")
    assert len(msgspec.json.decode(shown.stdout, type=list[EntryView])) == 2
    told = await past("ls")
    assert "pieces" in told.stdout
    assert f"missing: 1-patch-4-5-{WRITER}.0" in told.stdout


async def test_an_entry_is_where_all_of_its_pieces_are(past: Past) -> None:
    """A file of one piece is gone: the directory has the entry no more, the other tier has."""
    (past.files / f"1-patch-1-2-{WRITER}.1.safetensors").unlink()
    done = await past("ls", "--json")
    found = msgspec.json.decode(done.stdout, type=Listing)
    [entry] = [entry for entry in found.entries if entry.base_version == 1]
    assert entry.tiers == ("jetstream",)


async def test_every_version_becomes_a_file(past: Past, tmp_path: Path) -> None:
    """The published tensors, whole and under their own names, put together of what each root holds
    as the claim in the journal says."""
    to = tmp_path / "m.safetensors"
    for version in range(VERSIONS + 1):
        done = await past("export", "--to", str(to), "--version", str(version))
        assert done.returncode == 0, done.stderr
        assert same_bits(safetensors.torch.load_file(to), past.roots.states[version])
    to.unlink()
    alone = await past("export", "--to", str(to), bus=False)
    assert alone.returncode == 1
    assert "give the --bus of the run" in alone.stderr
    assert not to.exists()


async def test_each_piece_is_proven(past: Past) -> None:
    """verify reads each piece in each tier, those of what is not whole too, and makes every version
    again; a bit that flips in one of them is found by its name."""
    done = await past("verify", "--json")
    assert done.returncode == 0, done.stdout
    verdict = msgspec.json.decode(done.stdout, type=Verdict)
    assert len(verdict.entries) == 2 * (3 * 6 + 1)
    assert [made.version for made in verdict.versions if made.ok] == [0, 1, 2, 2, 3, 4]
    assert (verdict.anchor, verdict.head, verdict.unbroken) == (2, 4, True)
    path = past.files / f"1-patch-2-3-{WRITER}.1.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    done = await past("verify", "--json")
    assert done.returncode == 1
    verdict = msgspec.json.decode(done.stdout, type=Verdict)
    [bad] = [entry for entry in verdict.entries if not entry.ok]
    assert bad.name == f"1-patch-2-3-{WRITER}.1"
    assert all(made.ok for made in verdict.versions)


async def test_pruning_takes_all_pieces(past: Past) -> None:
    """What lies before the newest anchor goes in both tiers, to the last piece, though one tier has
    lost one before; what stays is proven."""
    (past.files / f"1-patch-0-1-{WRITER}.2.safetensors").unlink()
    dry = await past("prune", "--keep-bytes", "1", "--dry-run", "--json")
    would = msgspec.json.decode(dry.stdout, type=Pruned)
    assert [name.removesuffix(f"-{WRITER}") for name in would.dropped] == [
        "1-anchor-0", "1-patch-0-1"
    ]  # fmt: skip
    done = await past("prune", "--keep-bytes", "1", "--json")
    assert done.returncode == 0, done.stderr
    assert len(list(past.files.iterdir())) == 3 * 4 + 1
    left = await JetStreamLog(past.bus, past.run).entries(timeout_s=S)
    assert len(left) == 3 * 4 + 1
    assert (await past("verify")).returncode == 0


async def test_a_damaged_piece_of_the_anchor_that_stays_takes_nothing_with_it(past: Past) -> None:
    """One root's file of the anchor is damaged in the only tier: nothing is dropped."""
    path = past.files / f"1-anchor-2-{WRITER}.2.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    before = sorted(past.files.iterdir())
    done = await past("prune", "--keep-bytes", "1", bus=False)
    assert done.returncode == 1
    assert f"{path} is damaged" in done.stderr
    assert sorted(past.files.iterdir()) == before


async def test_any_tool_opens_what_a_root_has_of_an_anchor(past: Past) -> None:
    """A root's file of an anchor has its own tensors, as they lie there."""
    for root, layout in enumerate(past.roots.layouts):
        held = safetensors.torch.load_file(past.files / f"1-anchor-0-{WRITER}.{root}.safetensors")
        assert {name: tuple(tensor.shape) for name, tensor in held.items()} == {
            spec.name: spec.shape for spec in layout.tensors
        }
