"""What a plan keeps, and the floor under the streams."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from der_fast.compaction import plan
from der_fast.compaction.plan import with_floor
from der_fast.model.architecture import BACKBONES, build_architecture
from der_fast.model.layout import MaskLayout

few = settings(max_examples=60, deadline=None, derandomize=True)
backbones = st.sampled_from(BACKBONES)
seeds = st.integers(0, 10_000)
densities = st.floats(0, 1)


def layout_of(backbone, width=4):
    return MaskLayout(build_architecture(backbone, width=width))


def draw(layout, seed, density):
    """Logits and the channels among them that are kept (so that about `density` of them are)."""
    logits = torch.rand(layout.channels, generator=torch.Generator().manual_seed(seed)) - (1 - density)
    return logits, logits > 0


def streams_of(layout):
    """The groups of every tensor that a residual stream consists of, from the image to the features."""
    return {layout.architecture.stem.target, *(block.target for block in layout.architecture.blocks)}


def streams_mask(layout):
    """The channels of the streams."""
    mask = torch.zeros(layout.channels, dtype=torch.bool)
    for name in layout.stream_groups():
        layout.by_group(mask)[name][:] = True
    return mask


@few
@given(backbone=backbones, seed=seeds, density=densities)
def test_a_plan_counts_what_it_keeps(backbone, seed, density):
    layout = layout_of(backbone)
    _, keep = draw(layout, seed, density)
    decision = plan(layout, keep)
    lost = any(not bool(keep[layout.slice_of(groups)].any()) for groups in streams_of(layout))
    assert decision.constant is lost
    # Inner channels may go besides: tests/compaction/test_plan_oracle.py says which.
    assert not bool(decision.keep.any()) if lost else torch.equal(decision.keep & streams_mask(layout), keep & streams_mask(layout))
    assert not bool((decision.keep & ~keep).any()) and torch.equal(decision.masks, keep)
    assert decision.widths == layout.widths(decision.keep)
    assert torch.equal(decision.features, decision.keep[layout.slice_of(layout.architecture.features)])
    assert decision.parameters == layout.kept_parameters(decision.keep)
    if lost:
        assert decision.parameters == 0 and not bool(decision.features.any())


@pytest.mark.parametrize("backbone", BACKBONES)
def test_keeping_everything_keeps_everything(backbone):
    layout = layout_of(backbone)
    decision = plan(layout, torch.ones(layout.channels, dtype=torch.bool))
    assert not decision.constant and bool(decision.features.all())
    assert decision.widths == dict(layout.architecture.groups)
    assert decision.parameters == layout.architecture.parameters()


@pytest.mark.parametrize("backbone", BACKBONES)
def test_an_empty_inner_group_is_no_empty_stream(backbone):
    layout = layout_of(backbone)
    keep = torch.ones(layout.channels, dtype=torch.bool)
    for name, part in layout.by_group(keep).items():
        if "." in name:
            part[:] = False
    decision = plan(layout, keep)
    assert not decision.constant and torch.equal(decision.keep, keep)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_each_empty_stream_empties_everything(backbone):
    layout = layout_of(backbone)
    for groups in streams_of(layout):
        keep = torch.ones(layout.channels, dtype=torch.bool)
        keep[layout.slice_of(groups)] = False
        decision = plan(layout, keep)
        assert decision.constant, groups
        assert set(decision.widths.values()) == {0} and decision.parameters == 0


@pytest.mark.parametrize("appended", ["stage2", "stage3"])
def test_channels_that_cifar_resnets_append_may_all_go(appended):
    # The stream goes on through the channels that stand before them.
    layout = layout_of("resnet20")
    keep = torch.ones(layout.channels, dtype=torch.bool)
    layout.by_group(keep)[appended][:] = False
    decision = plan(layout, keep)
    assert not decision.constant and decision.widths[appended] == 0 and decision.widths["stage1"] == 4


@few
@given(backbone=backbones, seed=seeds, density=densities)
def test_planning_changes_nothing_and_holds_a_copy(backbone, seed, density):
    layout = layout_of(backbone)
    _, keep = draw(layout, seed, density)
    before = keep.clone()
    decision = plan(layout, keep)
    assert torch.equal(keep, before)
    planned = decision.keep.clone(), decision.features.clone(), dict(decision.widths)
    keep.logical_not_()
    assert torch.equal(decision.keep, planned[0]) and torch.equal(decision.features, planned[1]) and decision.widths == planned[2]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda keep: keep[:-1],
        lambda keep: keep[:0],
        lambda keep: torch.cat([keep, keep[:1]]),
        lambda keep: keep.reshape(1, -1),
        lambda keep: keep.float(),
        lambda keep: keep.to(torch.uint8),
    ],
    ids=["short", "empty", "long", "matrix", "float", "uint8"],
)
def test_anything_but_a_boolean_vector_of_the_right_length_is_refused(wrong):
    layout = layout_of("resnet18")
    keep = wrong(torch.ones(layout.channels, dtype=torch.bool))
    with pytest.raises(ValueError, match=rf"boolean vector of {layout.channels} entries, not {keep.dtype} .*{keep.shape[-1]}"):
        plan(layout, keep)


@few
@given(backbone=backbones, seed=seeds, density=densities, share=st.decimals(0, 1, places=2))
def test_floor(backbone, seed, density, share):
    layout = layout_of(backbone, width=25)
    logits, keep = draw(layout, seed, density)
    before, logits_before = keep.clone(), logits.clone()
    floored = with_floor(layout, logits, keep, float(share))
    assert torch.equal(keep, before) and torch.equal(logits, logits_before)
    assert bool((floored | ~keep).all()), "the floor only adds"
    streams = set(layout.stream_groups())
    old, new, scores = layout.by_group(keep), layout.by_group(floored), layout.by_group(logits)
    for name in layout.names:
        need = math.ceil(Fraction(share) * old[name].numel()) if name in streams else 0
        assert int(new[name].sum()) == max(int(old[name].sum()), need), name
        added, left_out = scores[name][new[name] & ~old[name]], scores[name][~new[name]]
        if len(added) and len(left_out):
            assert float(added.min()) >= float(left_out.max()), "those with the largest logits"


@pytest.mark.parametrize("backbone", BACKBONES)
def test_floor_of_zero_and_of_one(backbone):
    layout = layout_of(backbone)
    logits, keep = draw(layout, 0, 0.3)
    unchanged = with_floor(layout, logits, keep, 0.0)
    assert torch.equal(unchanged, keep) and unchanged is not keep
    full = layout.by_group(with_floor(layout, logits, keep, 1.0))
    assert all(bool(full[name].all()) for name in layout.stream_groups())


@few
@given(backbone=backbones, seed=seeds, share=st.floats(0.001, 1))
def test_with_any_floor_no_stream_is_lost(backbone, seed, share):
    layout = layout_of(backbone)
    logits, _ = draw(layout, seed, 0.0)
    nothing = torch.zeros(layout.channels, dtype=torch.bool)
    assert plan(layout, nothing).constant
    assert not plan(layout, with_floor(layout, logits, nothing, share)).constant


def test_floor_takes_logits_that_are_being_learned():
    layout = layout_of("resnet20")
    logits, keep = draw(layout, 1, 0.2)
    floored = with_floor(layout, logits.requires_grad_(), keep, 0.5)
    assert not floored.requires_grad
