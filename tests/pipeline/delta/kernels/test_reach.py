"""Kernels read and write what they were given, and nothing beside it.

In the interpreter every address is seen; on a GPU it is not, so these tests run without one only.
"""

import pytest
import torch

from reach import reached
from sparsecast.pipeline.delta import Patch, Shadow, apply_checked, check, checksum, digest
from states import DTYPES, laid_out, random_tensor
from twins import DEVICE, by_kernels, copied, model, placed, step

pytestmark = pytest.mark.skipif(
    DEVICE.type == "cuda", reason="addresses are seen in the interpreter alone"
)


@pytest.mark.parametrize("dtype", ["uint8", "bfloat16", "float32", "float64"])
def test_a_whole_update(dtype: str) -> None:
    """Diff, checksum, check, apply and digest, with odd ends, odd starts, every encoding and tiles
    that overflow: each address lies in the weights, the shadow, the patch or scratch."""
    shapes = {"sparse": (1_037,), "bitmap": (1_003,), "dense": (131,)}
    state = model(DTYPES[dtype], **shapes)
    generator = torch.Generator().manual_seed(3)
    askew = laid_out(random_tensor(DTYPES[dtype], (129,), generator), "askew")
    state["askew"] = placed(askew)
    worker = copied(state)
    with by_kernels(), reached() as reach:
        shadow = Shadow(state)
        step(state, {"sparse": 0.01, "bitmap": 0.25, "dense": 1.0, "askew": 0.3}, 4)
        found = shadow.diff(state, base_version=0, version=1)
        assert found.patch.changed > 0
        checked = check(Patch.from_buffer(found.patch.buffer), shadow.manifest)
        assert checked.readied is not None
        apply_checked(checked, worker)
        assert checksum(found.patch.buffer) == found.checksum
        assert digest(worker) == found.digest
    held = [*state.values(), *worker.values(), *shadow._held, found.patch.buffer]
    assert reach.require_within(*held) > 10_000
    assert reach.written
