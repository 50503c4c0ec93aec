"""The native plan against a simple one in Python, for every backbone, mask pattern, alignment and dtype."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from der_fast import native
from der_fast.compaction import plan
from der_fast.compaction.program import program
from der_fast.compaction.units import CONSTANT, CONVOLUTION, description, units
from der_fast.model.architecture import BACKBONES, build_architecture
from der_fast.model.layout import MaskLayout

CODES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
PATTERNS = ("all", "none", "one", "random", "thick and thin", "empty inner groups", "some groups whole, some gone")


def masks_of(layout, pattern, seed):
    """One binary mask per group, as lists."""
    generator = torch.Generator().manual_seed(seed)
    streams, masks = set(layout.stream_groups()), {}
    for number, (name, width) in enumerate(layout.architecture.groups.items()):
        draw = torch.rand(width, generator=generator)
        lucky = int(torch.randint(width, (), generator=generator))
        if pattern == "one":
            part = torch.arange(width) == lucky
        elif pattern == "empty inner groups":
            part = (draw < 0.6) | (torch.arange(width) == lucky)
            part &= name in streams or bool(draw[0] < 0.5)
        elif pattern == "some groups whole, some gone":
            part = torch.full((width,), bool(draw[0] < 0.8))
        else:
            part = draw < {"all": 1.1, "none": -1.0, "random": 0.5}.get(pattern, [0.05, 0.95][number % 2])
        masks[name] = part.tolist()
    return masks


def simple_plan(architecture, masks, align):
    """What stays, as docs/method.md and `program` say it: lists of kept positions by group."""
    kept = {name: [channel for channel, bit in enumerate(mask) if bit] for name, mask in masks.items()}
    streams = [architecture.stem.target] + [block.target for block in architecture.blocks]
    if any(not any(kept[name] for name in groups) for groups in streams):
        kept = {name: [] for name in kept}
    for block in architecture.blocks:
        inner = [name for conv in block.convs[:-1] for name in conv.target]
        if any(not kept[name] for name in inner):
            kept.update({name: [] for name in inner})
    return kept, {name: -(-len(channels) // align) * align for name, channels in kept.items()}


def positions(architecture, groups, kept, stored):
    """Where the stored channels of a tensor lie in the full one; -1 for padding."""
    if not groups:
        return [0, 1, 2]
    found, before = [], 0
    for name in groups:
        found += [before + channel for channel in kept[name]] + [-1] * (stored[name] - len(kept[name]))
        before += architecture.groups[name]
    return found


cases = st.tuples(st.sampled_from(BACKBONES), st.sampled_from(["small", "imagenet"]), st.integers(1, 5))


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    case=cases,
    pattern=st.sampled_from(PATTERNS),
    seed=st.integers(0, 10_000),
    align=st.sampled_from([1, 4, 7, 8, 16]),
    dtype=st.sampled_from(list(CODES)),
)
@example(case=("resnet50", "small", 4), pattern="empty inner groups", seed=0, align=8, dtype=torch.bfloat16)
@example(case=("preact_resnet18", "small", 4), pattern="empty inner groups", seed=1, align=1, dtype=torch.float32)
def test_native_plan_is_the_simple_one(case, pattern, seed, align, dtype):
    backbone, stem, width = case
    architecture = build_architecture(backbone, width=width, stem=stem)
    layout = MaskLayout(architecture)
    masks = masks_of(layout, pattern, seed)
    keep = torch.tensor([bit for mask in masks.values() for bit in mask], dtype=torch.bool)
    vector = torch.float64 if dtype == torch.float64 else torch.float32
    arguments = {"align": align, "weight_dtype": CODES[dtype], "vector_dtype": CODES[vector]}
    facts = description(architecture, architecture.groups)
    found = native.plan(facts, native.facts_of(keep), **arguments)

    kept, stored = simple_plan(architecture, masks, align)
    widths = {name: len(channels) for name, channels in kept.items()}
    assert found["widths"] == list(widths.values()) and found["stored"] == list(stored.values())
    assert [bool(bit) for bit in found["keep"]] == [channel in kept[name] for name in masks for channel in range(len(masks[name]))]
    assert found["constant"] == (not kept[architecture.stem.target[0]])
    assert found["parameters"] == architecture.parameters(widths)

    rows = units(architecture)
    offset, elements, wanted = 0, 0, []
    for op in program(architecture, stored):
        for name, shape in op.tensors().items():
            wanted.append((name, shape, offset))
            size = torch.Size(shape).numel()
            offset += -(-size * (dtype if name.endswith("weight") else vector).itemsize // 64) * 64
            elements += size
    parts = {(CONVOLUTION, 0): "weight", (CONVOLUTION, 2): "bias", (1, 1): "scale", (1, 2): "shift", (CONSTANT, 3): "bias"}
    pieces = [(f"{rows[unit].name}.{parts[rows[unit].kind, part]}", shape, where) for unit, part, shape, where in found["pieces"]]
    assert pieces == wanted
    assert (found["bytes"], found["stored_elements"]) == (offset, elements)
    assert found["elements"] == sum(torch.Size(shape).numel() for op in program(architecture, widths) for shape in op.tensors().values())

    for unit, part, _, _ in found["pieces"]:
        assert found["rows"][unit].tolist() == positions(architecture, rows[unit].target, kept, stored)
        if part == 0:
            assert found["columns"][unit].tolist() == positions(architecture, rows[unit].source, kept, stored)

    again = native.plan(facts, native.facts_of(keep), **arguments)
    assert again.keys() == found.keys() and again["pieces"] == found["pieces"] and again["keep"].tolist() == found["keep"].tolist()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(case=cases, pattern=st.sampled_from(PATTERNS), seed=st.integers(0, 10_000))
def test_a_compaction_plan_says_the_same_and_remembers_the_masks(case, pattern, seed):
    architecture = build_architecture(case[0], stem=case[1], width=case[2])
    layout = MaskLayout(architecture)
    masks = masks_of(layout, pattern, seed)
    keep = torch.tensor([bit for mask in masks.values() for bit in mask], dtype=torch.bool)
    decision = plan(layout, keep)
    kept, _ = simple_plan(architecture, masks, 1)
    assert decision.widths == {name: len(channels) for name, channels in kept.items()}
    assert decision.constant == (not kept[architecture.stem.target[0]])
    for groups in {conv.target for conv in architecture.convs()}:
        assert decision.kept(groups).nonzero().squeeze(1).tolist() == positions(architecture, groups, kept, decision.widths)
        assert decision.masked(groups).tolist() == [bit for name in groups for bit in masks[name]]
    assert torch.equal(decision.features, decision.kept(architecture.features))
    # Planning what a plan keeps changes nothing any more.
    assert torch.equal(plan(layout, decision.keep).keep, decision.keep)


@pytest.mark.parametrize("empty", [["a"], ["b"], ["a", "b"]])
def test_a_bottleneck_with_one_empty_inner_group_loses_both(empty):
    layout = MaskLayout(build_architecture("resnet50", width=2))
    keep = torch.ones(layout.channels, dtype=torch.bool)
    for suffix in empty:
        layout.by_group(keep)[f"stage2.1{suffix}"][:] = False
    decision = plan(layout, keep)
    assert decision.widths["stage2.1a"] == decision.widths["stage2.1b"] == 0
    others = {name: full for name, full in layout.architecture.groups.items() if not name.startswith("stage2.1")}
    assert {name: decision.widths[name] for name in others} == others
    assert decision.parameters < layout.kept_parameters(keep) or len(empty) == 2
