"""Whole blocks of channels within the same parameters."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from der_fast.compaction.plan import with_floor
from der_fast.compaction.program import live_widths
from der_fast.compaction.rounding import block_of, round_channels
from der_fast.model.architecture import BACKBONES, build_architecture
from der_fast.model.layout import MaskLayout

LAYOUTS = [MaskLayout(build_architecture(name, width=width)) for name in BACKBONES for width in (8, 17)]
RESNET18 = MaskLayout(build_architecture("resnet18"))


def parameters(layout, keep):
    return layout.architecture.parameters(live_widths(layout.architecture, layout.widths(keep)))


def drawn(layout, seed, density):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(layout.channels, generator=generator)
    return logits, torch.rand(layout.channels, generator=generator) < density


@settings(max_examples=60, deadline=None)
@given(
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 10**6),
    density=st.sampled_from([0.0, 0.05, 0.3, 0.6, 1.0]),
    multiple=st.sampled_from([2, 4, 8, 32]),
    floor=st.sampled_from([0.0, 0.3]),
)
def test_whole_blocks(layout, seed, density, multiple, floor):
    logits, keep = drawn(layout, seed, density)
    keep = with_floor(layout, logits, keep, floor)
    rounded = round_channels(layout, logits, keep, multiple, floor)
    streams, before, after = layout.stream_groups(), layout.widths(keep), layout.widths(rounded)
    for name, width in layout.architecture.groups.items():
        block = block_of(width, multiple)
        assert after[name] % block == 0 or after[name] == width
        assert (after[name] > 0) == (before[name] > 0)
        assert abs(after[name] - before[name]) < block
        assert name not in streams or after[name] >= math.ceil(floor * width - 1e-9)
    assert torch.equal(round_channels(layout, logits, rounded, multiple, floor), rounded)
    enough = all(before[name] >= block_of(width, multiple) or not before[name] for name, width in layout.architecture.groups.items())
    if enough and floor == 0:
        assert parameters(layout, rounded) <= parameters(layout, keep)


@given(layout=st.sampled_from(LAYOUTS), seed=st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_the_best_of_the_kept_stay_and_the_best_of_the_others_come(layout, seed):
    logits, keep = drawn(layout, seed, 0.4)
    rounded = round_channels(layout, logits, keep, 4)
    scores, before, after = layout.by_group(logits), layout.by_group(keep), layout.by_group(rounded)
    for name in layout.names:
        was, now = before[name], after[name]
        shrunk = int(now.sum()) < int(was.sum())
        assert not shrunk or not (now & ~was).any()
        assert shrunk or not (was & ~now).any()
        gone, stayed = scores[name][was & ~now], scores[name][was & now]
        assert not len(gone) or not len(stayed) or gone.max() <= stayed.min()
        came, out = scores[name][now & ~was], scores[name][~now & ~was]
        assert not len(came) or not len(out) or came.min() >= out.max()


def test_one_changes_nothing():
    logits, keep = drawn(RESNET18, 0, 0.3)
    assert round_channels(RESNET18, logits, keep, 1) is keep


def test_what_it_is_for():
    """ResNet-18 at the paper's density: the parameters stay, and the widths are what kernels compute in."""
    keep = torch.zeros(RESNET18.channels, dtype=torch.bool)
    for part in RESNET18.by_group(keep).values():
        part[: round(len(part) * math.sqrt(1 / 12))] = True
    logits = torch.where(keep, 1.0, -1.0)
    rounded = round_channels(RESNET18, logits, keep, 16)
    assert set(RESNET18.widths(rounded).values()) == {16, 32, 80, 144}
    assert 0.97 * parameters(RESNET18, keep) <= parameters(RESNET18, rounded) <= parameters(RESNET18, keep)


@pytest.mark.parametrize(("width", "multiple", "block"), [(64, 16, 16), (64, 32, 16), (512, 32, 32), (16, 8, 4), (3, 8, 1), (1, 1, 1)])
def test_blocks_fit_their_group(width, multiple, block):
    assert block_of(width, multiple) == block
