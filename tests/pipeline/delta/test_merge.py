"""Several patches as one."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsecast.messages.errors import ManifestMismatch, WrongBase
from sparsecast.pipeline.delta import Patch, Shadow, apply, diff, manifest_of, merge
from states import bits, changed, clone, densities, same, seeds, states


def chain(state: dict[str, Tensor], steps: list[tuple[float, int]]) -> list[dict[str, Tensor]]:
    """The state at versions 0, 1, 2 …"""
    history = [state]
    for density, seed in steps:
        history.append(changed(history[-1], density, seed))
    return history


def patches_of(history: list[dict[str, Tensor]]) -> list[Patch]:
    """The patches between them."""
    return [
        diff(old, new, base_version=version, version=version + 1)
        for version, (old, new) in enumerate(pairwise(history))
    ]


@settings(max_examples=60, deadline=None)
@given(states(), st.lists(st.tuples(densities, seeds), min_size=2, max_size=4))
def test_merged_patches_do_what_they_do_one_by_one(
    state: dict[str, Tensor], steps: list[tuple[float, int]]
) -> None:
    """From every version that the chain passes, the merged patch leads to its end."""
    history = chain(state, steps)
    patches = patches_of(history)
    merged = merge(
        [Patch.from_bytes(patch.to_bytes()) for patch in patches], manifest=manifest_of(state)
    )
    assert (merged.base_version, merged.version) == (0, len(steps))
    for held in history[:-1]:
        worker = clone(held)
        apply(Patch.from_bytes(merged.to_bytes()), worker)
        assert same(worker, history[-1])
    named = sum(
        int(
            torch.stack([(bits(a[name]) != bits(b[name])) for a, b in pairwise(history)])
            .any(0)
            .sum()
        )
        for name in state
    )
    assert merged.changed >= named
    if not any(
        section.encoding.name == "DENSE" for patch in patches for section in patch.sections
    ) and not any(patch.full for patch in patches):
        assert merged.changed == named
    assert merge(patches).to_bytes() == merged.to_bytes()


@settings(max_examples=25, deadline=None)
@given(states(), st.tuples(densities, seeds), st.tuples(densities, seeds))
def test_a_patch_on_an_anchor_is_an_anchor(
    state: dict[str, Tensor], first: tuple[float, int], second: tuple[float, int]
) -> None:
    """An anchor with what came after it is the anchor of the last version, byte for byte."""
    history = chain(state, [first, second])
    anchor = Shadow(history[1]).anchor(1)
    before, after = patches_of(history)
    merged = merge([anchor, after])
    assert merged.to_bytes() == Shadow(history[2]).anchor(2).to_bytes()
    assert merged.base_version is None
    # What came before an anchor does not matter; versions only have to ascend.
    assert merge([before, Shadow(history[2]).anchor(2)]).to_bytes() == merged.to_bytes()


def test_an_element_that_changed_back_is_kept() -> None:
    """0 → 1 → 0: a worker that holds the version between needs the zero."""
    zero, one = {"w": torch.zeros(1000)}, {"w": torch.zeros(1000)}
    one["w"][[5, 900]] = 1
    merged = merge(patches_of([zero, one, zero]))
    assert merged.changed == 2
    worker = clone(one)
    apply(merged, worker)
    assert same(worker, zero)


def test_changes_apart_merge_to_the_bytes_of_the_direct_diff() -> None:
    """Encodings are chosen anew: two sparse patches of other elements become one bitmap."""
    generator = torch.Generator().manual_seed(1)
    start = {"w": torch.zeros(200_000, dtype=torch.bfloat16), "b": torch.zeros(40)}
    middle, end = clone(start), None
    order = torch.randperm(200_000, generator=generator)
    middle["w"][order[:9_000]] = 1
    end = clone(middle)
    end["w"][order[9_000:18_000]] = 2
    end["b"][:20] = 3
    patches = patches_of([start, middle, end])
    merged = merge(patches)
    assert patches[0].encoding == "sparse"
    assert merged.sections[0].encoding.name == "BITMAP"
    assert merged.to_bytes() == diff(start, end, base_version=0, version=2).to_bytes()


def test_merging_over_many_spans() -> None:
    """Tensors of several spans, one of them unchanged, one dense: the end is exact."""
    generator = torch.Generator().manual_seed(2)
    start = {
        "w": torch.randint(-99, 99, (2_500_003,), dtype=torch.int16, generator=generator),
        "d": torch.randint(-99, 99, (70_000,), dtype=torch.int8, generator=generator),
    }
    history = chain(start, [(0.002, 1), (0.1, 2)])
    bits(history[1]["d"]).add_(1)
    history[2]["w"][1 << 20 : 2 << 20] = history[0]["w"][1 << 20 : 2 << 20]
    worker = clone(start)
    apply(merge(patches_of(history)), worker)
    assert same(worker, history[2])


def test_patches_that_do_not_follow_each_other_are_refused() -> None:
    """A gap, the wrong order, a base below the first one's: WrongBase says which versions."""
    state = {"w": torch.zeros(10)}
    other = {"w": torch.ones(10)}

    def patch(base_version: int, version: int) -> Patch:
        return diff(state, other, base_version=base_version, version=version)

    for pair in ([(1, 2), (3, 4)], [(1, 2), (0, 3)], [(1, 4), (2, 3)], [(1, 2), (1, 2)]):
        with pytest.raises(WrongBase, match="does not fit"):
            merge([patch(*versions) for versions in pair])
    with pytest.raises(WrongBase):
        merge([patch(1, 3), Shadow(state).anchor(2)])
    assert merge([patch(1, 4), patch(2, 5)]).base_version == 1
    with pytest.raises(ValueError, match="at least one"):
        merge([])
    single = patch(1, 2)
    assert merge([single]) is single


def test_patches_of_different_models_are_refused() -> None:
    """A patch of another run slipped in: ManifestMismatch, naming both hashes."""
    one = diff({"w": torch.zeros(4)}, {"w": torch.ones(4)}, base_version=0, version=1)
    two = diff({"v": torch.zeros(4)}, {"v": torch.ones(4)}, base_version=1, version=2)
    with pytest.raises(ManifestMismatch, match=one.manifest_hash):
        merge([one, two])


def test_the_full_form_needs_a_manifest_to_merge() -> None:
    """Many tiny tensors in the full form, read from bytes: the error says what to give."""
    state = {f"t{i}": torch.tensor(float(i)) for i in range(200)}
    history = [state, {name: value + 1 for name, value in state.items()}, dict(state)]
    history[2] = {**history[1], "t7": torch.tensor(-5.0)}
    first, second = patches_of(history)
    assert first.full
    assert not second.full
    read = [Patch.from_bytes(first.to_bytes()), Patch.from_bytes(second.to_bytes())]
    with pytest.raises(ManifestMismatch, match="manifest="):
        merge(read)
    merged = merge(read, manifest=manifest_of(state))
    assert merged.full
    worker = clone(state)
    apply(merged, worker)
    assert same(worker, history[2])
    with pytest.raises(ManifestMismatch, match="not for"):
        merge(read, manifest=manifest_of({"w": torch.zeros(1)}))
