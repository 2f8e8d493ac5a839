"""Entries and payloads for tests of the log: any bytes will do, an anchor's too."""

import zlib
from collections.abc import Sequence

import msgspec

from sparsecast.messages.control import LogEntry
from sparsecast.messages.manifest import Manifest, TensorSpec
from sparsecast.pipeline.log.base import Anatomy

HEAD_NBYTES = 5


def entry(
    base: int | None,
    version: int,
    payload: bytes,
    epoch: int = 1,
    writer: str = "",
    merged: int = 0,
) -> LogEntry:
    """An entry as a trainer makes it: it does not know the number of chunks."""
    kind = "anchor" if base is None else f"merged-{base}" if merged else "patch"
    return LogEntry(
        name=f"{epoch}-{kind}-{version}" + (f"-{writer}" if writer else ""),
        epoch=epoch,
        base_version=base,
        version=version,
        nbytes=len(payload),
        checksum=zlib.crc32(payload),
        digest=version * 7,
        manifest_hash=manifest(len(payload)).hash if base is None else "m",
        chunks=0,
        writer=writer,
        merged=merged,
        step=version,
    )


def pieces(
    base: int | None,
    version: int,
    payloads: Sequence[bytes],
    epoch: int = 1,
    writer: str = "",
    merged: int = 0,
) -> list[LogEntry]:
    """What the roots of a trainer of several ranks store of one version, in their order."""
    found = []
    for root, payload in enumerate(payloads):
        one = entry(base, version, payload, epoch, writer, merged)
        found.append(
            msgspec.structs.replace(
                one, name=f"{one.name}.{root}", root=root, roots=len(payloads),
                layout=f"layout{root}", whole="whole",
            )
        )  # fmt: skip
    return found


def manifest(nbytes: int) -> Manifest:
    """What an anchor of so many bytes consists of: tensors of different sizes, one without any."""
    rest = max(0, nbytes - HEAD_NBYTES)
    wide = rest // 16 * 2
    return Manifest(
        tensors=(
            TensorSpec("narrow", "uint8", (rest - wide * 4,)),
            TensorSpec("empty", "float32", (0, 3)),
            TensorSpec("wide", "bfloat16", (wide, 2)),
        )
    )


class ToyPayloads:
    """What a tier asks about payloads, for bytes that are no patches: head, narrow, wide."""

    def checksum(self, payload: bytes | bytearray | memoryview) -> int:
        """Any checksum."""
        return zlib.crc32(payload)

    def anatomy(self, payload: memoryview) -> Anatomy:
        """Where the tensors lie."""
        made = manifest(payload.nbytes)
        narrow = made.tensors[0].nbytes
        return Anatomy(made, (HEAD_NBYTES, 0, HEAD_NBYTES + narrow))
