"""Anchors of real models as safetensors files: open to any tool, and exact to the bit."""

import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runs import same_bits, weights
from sparsecast import CorruptPatch, LocalProtocolError, LogError
from sparsecast.messages.manifest import ITEMSIZE
from sparsecast.pipeline.delta import Patch, Shadow, check
from sparsecast.pipeline.log.container import DTYPES
from sparsecast.pipeline.log.directory import DirectoryLog
from sparsecast.workers.choice import Choice
from sparsecast.workers.entries import PatchPayloads, describe
from sparsecast.workers.outgoing import Outgoing

S = 10.0


def outgoing(tensors: dict[str, torch.Tensor]) -> Outgoing:
    """What a trainer has published of these tensors."""
    return Outgoing(Choice(tensors), clock=lambda: 1.0, writer="me")


async def stored(
    tensors: dict[str, torch.Tensor], folder: Path
) -> tuple[DirectoryLog, Any, bytes, Path]:
    """An anchor of these tensors in a directory, its payload, and its file."""
    trained = outgoing(tensors)
    entry, patch = trained.anchor(3)
    payload = trained.wire(patch)
    log = DirectoryLog(folder, "run", PatchPayloads(lambda: trained.manifest))
    await log.store(entry, payload, timeout_s=S)
    return log, entry, payload, folder / "run" / f"{entry.name}.safetensors"


def every_dtype() -> dict[str, torch.Tensor]:
    """A tensor of each dtype that can be published, of odd sizes, bits at random."""
    random = torch.Generator().manual_seed(5)
    return {
        f"layer.{name}": torch.randint(0, 2 if name == "bool" else 256, (7, size), generator=random)
        .to(torch.uint8)
        .view(getattr(torch, name))
        for name, size in ITEMSIZE.items()
        if hasattr(torch, name)
    }


@pytest.mark.parametrize("make", [weights, every_dtype], ids=["model", "every dtype"])
async def test_any_tool_opens_an_anchor_and_we_get_its_exact_bytes(
    make: Any, tmp_path: Path
) -> None:
    """safetensors' own loader gives every tensor under its name, dtype and shape, bit for bit; the
    log of another process, which has no manifest, gives the payload that was stored."""
    tensors = make()
    _, entry, payload, path = await stored(tensors, tmp_path)
    assert same_bits(safetensors.torch.load_file(path), tensors)
    with safetensors.safe_open(path, "pt") as opened:
        assert opened.metadata()["format"] == "pt"
    reader = DirectoryLog(tmp_path, "run", PatchPayloads())
    assert await reader.load(entry, timeout_s=S) == payload
    manifest = await reader.manifest(entry.manifest_hash, timeout_s=S)
    assert manifest == outgoing(tensors).manifest
    assert await reader.manifest("0" * 32, timeout_s=S) is None
    check(Patch.from_bytes(payload), manifest)


def test_every_dtype_has_a_name_in_safetensors() -> None:
    """A dtype is added to the wire: an anchor of it must have a name in the file."""
    assert DTYPES.keys() == ITEMSIZE.keys()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([torch.bool, torch.uint8, torch.bfloat16, torch.float32, torch.int64]),
            st.lists(st.integers(0, 40), max_size=3),
        ),
        max_size=8,
    )
)
async def test_models_of_any_shape_come_back(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[Any]
) -> None:
    """Scalars, empty tensors, no tensors at all; so many small ones that the anchor has the full
    form: the payload comes back to the bit."""
    tensors = {
        f"t{at}": torch.arange(torch.Size(shape).numel()).to(dtype).reshape(shape)
        for at, (dtype, shape) in enumerate(shapes)
    }
    log, entry, payload, _ = await stored(tensors, tmp_path_factory.mktemp("log"))
    assert await log.load(entry, timeout_s=S) == payload


async def test_both_forms_of_an_anchor_come_back(tmp_path: Path) -> None:
    """A model of thousands of tiny tensors takes the full form, which has no table; it comes back
    like one with a table, and one with more sections than the first look at a payload shows."""
    for count, size, full in ((3000, 1, True), (2500, 16_000, False)):
        tensors = {
            f"t{at}": torch.full((size,), at % 251, dtype=torch.uint8) for at in range(count)
        }
        folder = tmp_path / str(count)
        folder.mkdir()
        log, entry, payload, path = await stored(tensors, folder)
        assert Patch.from_bytes(payload).full == full
        assert await log.load(entry, timeout_s=S) == payload
        assert same_bits(safetensors.torch.load_file(path), tensors)


async def test_the_one_name_that_a_file_has_no_place_for(tmp_path: Path) -> None:
    """A tensor called as safetensors calls its metadata: LogError by name, and no file."""
    with pytest.raises(LogError, match="no place for a tensor called '__metadata__'"):
        await stored({"__metadata__": torch.ones(3), "w": torch.ones(2)}, tmp_path)
    assert os.listdir(tmp_path / "run") == []


def test_what_is_no_anchor_of_ours_is_refused() -> None:
    """Another model's anchor, a patch, nothing at all, and nobody who knows the manifest."""
    ours, theirs = Shadow(weights()), Shadow({"w": torch.ones(3)})
    payloads = PatchPayloads(lambda: ours.manifest)
    for data in (theirs.anchor(1).to_bytes(), b""):
        with pytest.raises(CorruptPatch):
            payloads.anatomy(memoryview(data))
    patch = ours.diff(weights(1), base_version=0, version=1).patch
    with pytest.raises(CorruptPatch, match="no anchor of this model"):
        payloads.anatomy(memoryview(patch.to_bytes()))
    with pytest.raises(LocalProtocolError, match="manifest"):
        PatchPayloads().anatomy(memoryview(b"x" * 80))


def test_the_checksum_is_the_patchs_own() -> None:
    """The log's checksum of bytes is what an entry has of a patch, of any kind of buffer."""
    patch = Shadow(weights()).anchor(1)
    entry = describe(patch, 1, 0)
    for data in (patch.to_bytes(), bytearray(patch.to_bytes()), memoryview(patch.to_bytes())):
        assert PatchPayloads().checksum(data) == entry.checksum
    assert PatchPayloads().checksum(b"") == 0
