"""What a trainer of several roots publishes, and the pieces that it stores: no bus, no rounds."""

from __future__ import annotations

from layouts import contents
from runs import Tensors, step, weights
from sparsecast import digest
from sparsecast.messages import codec
from sparsecast.messages.control import Claim, LogEntry, Sender
from sparsecast.messages.layout import Layout, Part
from sparsecast.messages.manifest import TensorSpec
from sparsecast.pipeline.delta import Patch, manifest_of
from sparsecast.workers.choice import Choice
from sparsecast.workers.entries import Origin, describe
from sparsecast.workers.outgoing import Outgoing

WRITER = "me"


def layouts_of(published: Tensors, roots: int) -> tuple[Layout, ...]:
    """Of each tensor the rows by turns, a contiguous share a root; a scalar is the last root's. The
    local tensors are called otherwise, and transposed where there are two dimensions."""
    tensors: list[list[TensorSpec]] = [[] for _ in range(roots)]
    parts: list[list[Part]] = [[] for _ in range(roots)]
    for spec in manifest_of(published).tensors:
        rows = spec.shape[0] if spec.shape else 1
        ends = [rows * root // roots for root in range(roots + 1)]
        for root in range(roots):
            begin, end = ends[root], ends[root + 1]
            if not spec.shape and root < roots - 1:
                continue
            shape = (end - begin, *spec.shape[1:]) if spec.shape else ()
            axes = tuple(reversed(range(len(shape))))
            name = f"shard.{spec.name}"
            tensors[root].append(TensorSpec(name, spec.dtype, tuple(reversed(shape))))
            parts[root].append(
                Part(
                    tensor=spec.name, begin=(begin, *(0 for _ in shape[1:])) if shape else (),
                    shape=shape, local=name, at=tuple(0 for _ in shape), axes=axes,
                )
            )  # fmt: skip
    return tuple(
        Layout(tensors=tuple(specs), parts=tuple(held))
        for specs, held in zip(tensors, parts, strict=True)
    )


class Roots:
    """The weights as published, and what each root holds and sends of them."""

    def __init__(self, roots: int = 2) -> None:
        self.published = weights()
        self.manifest = manifest_of(self.published)
        self.layouts = layouts_of(self.published, roots)
        self.locals = [contents(layout, self.published) for layout in self.layouts]
        self.outgoing = [
            Outgoing(Choice(held), clock=lambda: 1.0, writer=WRITER) for held in self.locals
        ]
        self.outgoing[0].roots = self.layouts
        #: The weights of each version.
        self.states = [{name: tensor.clone() for name, tensor in self.published.items()}]

    @property
    def version(self) -> int:
        """The newest one."""
        return self.outgoing[0].version

    def claim(self, epoch: int = 1) -> Claim:
        """What the journal says of them."""
        return Claim(
            sender=Sender("trainer", WRITER), epoch=epoch, version=0,
            digest=digest(self.states[0]), manifest=self.manifest, nonce="n", heartbeat_s=1.0,
            roots=tuple(codec.pack_layout(layout) for layout in self.layouts),
        )  # fmt: skip

    def publish(
        self, share: float = 0.02, *, busy: int | None = None
    ) -> list[tuple[LogEntry, bytes]]:
        """Make a version; the pieces of its patch. All that the root `busy` holds changes."""
        step(self.published, self.version, share)
        for part in () if busy is None else self.layouts[busy].parts:
            if part.shape:
                self.published[part.tensor].narrow(0, part.begin[0], part.shape[0]).add_(1.5)
        self.states.append({name: tensor.clone() for name, tensor in self.published.items()})
        patches = []
        for held, layout, outgoing in zip(self.locals, self.layouts, self.outgoing, strict=True):
            for name, tensor in contents(layout, self.published).items():
                held[name].copy_(tensor)
            outgoing.publish(self.version, None)
            sealed = outgoing.take(())
            assert sealed is not None
            patches.append(outgoing.entry((sealed.version,), 1)[1])
            outgoing.release(sealed.version)
        return self._pieces(patches)

    def anchor(self) -> list[tuple[LogEntry, bytes]]:
        """The pieces of a full copy."""
        return self._pieces([outgoing.anchor(1)[1] for outgoing in self.outgoing])

    def _pieces(self, patches: list[Patch]) -> list[tuple[LogEntry, bytes]]:
        whole = digest(self.published)
        found = []
        for root, (patch, layout) in enumerate(zip(patches, self.layouts, strict=True)):
            origin = Origin(root, len(patches), layout.hash, self.manifest.hash)
            entry = describe(patch, 1, whole, writer=WRITER, origin=origin)
            found.append((entry, patch.to_bytes()))
        return found
