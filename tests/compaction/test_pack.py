"""Arenas hold the folded weights, and what they compute is what the binary-masked network computes."""

from __future__ import annotations

import functools
import math
import runpy
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from der_fast import native
from der_fast.compaction import pack, plan
from der_fast.compaction.bank.execute import execute
from der_fast.compaction.program import lost_branch
from der_fast.errors import DivergenceError
from der_fast.kernels.compact import compact_reference
from der_fast.model.architecture import BACKBONES, build_architecture
from der_fast.model.extractor import Extractor, MaskedBatchNorm
from der_fast.model.layout import MaskLayout

compact = runpy.run_path(str(Path(__file__).with_name("compact_network.py")))["compact"]

TOLERANCE = 1e-5
CASES = [(backbone, stem) for backbone in BACKBONES for stem in ("small", "imagenet")]
PATTERNS = ("all", "none", "one", "random", "thick and thin", "empty inner groups", "last inner empty", "first inner empty")


def seeded(number):
    return torch.Generator().manual_seed(number)


def images(dtype=torch.float32):
    return (torch.randn(2, 3, 21, 18, generator=seeded(3)) * 0.8 + 0.1).to(dtype)


@functools.cache
@torch.no_grad()
def network(backbone, stem, width=3):
    """A full network in evaluation mode whose batch-norm has uneven γ (some negative), β and statistics near those of a real pass."""
    net = Extractor(build_architecture(backbone, width=width, stem=stem)).initialise(seeded(0))
    norms, generator = [module for module in net.modules() if isinstance(module, MaskedBatchNorm)], seeded(1)
    for norm in norms:
        norm.weight.copy_(torch.rand(norm.weight.shape, generator=generator) * 1.5 - 0.25)
        norm.bias.copy_(torch.randn(norm.bias.shape, generator=generator) * 0.5)
        norm.momentum = 1.0
    net.train()(torch.randn(6, 3, 21, 18, generator=seeded(2)))
    for norm in norms:
        norm.running_mean.add_(torch.randn(norm.bias.shape, generator=generator) * 0.2)
        norm.running_var.mul_(torch.rand(norm.bias.shape, generator=generator) + 0.5).add_(0.05)
    return net.eval()


@functools.cache
def doubled(backbone, stem):
    net = Extractor(network(backbone, stem).architecture).double()
    net.load_state_dict(network(backbone, stem).state_dict())
    return net.eval()


def masks_of(layout, pattern, seed=0):
    """A binary mask; but for 'none' every stream group keeps at least one channel."""
    generator, keep, streams = seeded(seed), torch.zeros(layout.channels, dtype=torch.bool), set(layout.stream_groups())
    for number, (name, part) in enumerate(layout.by_group(keep).items()):
        inner = name not in streams
        draw, lucky = torch.rand(len(part), generator=generator), int(torch.randint(len(part), (), generator=generator))
        density = {"all": 1.1, "none": -1.0, "one": -1.0, "thick and thin": [0.1, 0.95][number % 2]}.get(pattern, 0.5)
        part[:] = draw < density
        if pattern != "none":
            part[lucky] = True
        if inner and pattern == "empty inner groups" and draw[0] < 0.5:
            part[:] = False
        if inner and pattern == "last inner empty" and name.endswith("b"):
            part[:] = False
        if inner and pattern == "first inner empty" and name.endswith("a"):
            part[:] = False
    return keep


@torch.no_grad()
def fold(net):
    """Folded weights of a compact network by name, in its dtype: batch-norm by batch-norm, as the formulas say."""
    architecture, found = net.architecture, {}

    def folded(norm):
        scale = norm.weight / (norm.running_var + 1e-5).sqrt()
        return scale, norm.bias - scale * norm.running_mean

    def convolution(name, weight, norm):
        if norm is not None:
            scale, found[f"{name}.bias"] = folded(norm)
            weight = weight * scale[:, None, None, None]
        found[f"{name}.weight"] = weight

    before = architecture.preactivation
    convolution("stem", net.stem.weight, None if before else net.norm)
    if before:
        found["norm.scale"], found["norm.shift"] = folded(net.norm)
    for description, block in zip(architecture.blocks, net.blocks, strict=True):
        names = [f"{description.name}.{conv.name}" for conv in description.convs]
        lost = lost_branch(architecture, description, net.widths)
        if description.shortcut:
            convolution(f"{description.name}.shortcut", block.shortcut.weight, block.shortcut_norm)
        if before:
            if description.shortcut or not lost:
                found[f"{description.name}.norm.scale"], found[f"{description.name}.norm.shift"] = folded(block.norms[0])
            norms = [*list(block.norms)[1:], None]
        else:
            norms = list(block.norms)
        if not lost:
            for name, conv, norm in zip(names, block.convs, norms, strict=True):
                convolution(name, conv.weight, norm)
        elif not before:
            found[f"{names[-1]}.bias"] = folded(norms[-1])[1]
    return found


@torch.no_grad()
def masked_features(net, decision, dtype):
    return net(images(dtype), decision.masks.to(dtype))[:, decision.features]


@torch.no_grad()
def features(arena, dtype):
    found = execute(arena.ops, arena.tensors(), images(dtype))
    return found if arena.feature_index is None else found[:, arena.feature_index]


def difference(found, expected):
    assert found.shape == expected.shape
    # Few channels may all be cut off by the last ReLU: then nothing but zeros will do.
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30)) if expected.numel() else 0.0


@pytest.mark.parametrize("case", CASES, ids="-".join)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_arena_computes_what_the_masked_network_does(case, pattern):
    net = network(*case)
    layout = MaskLayout(net.architecture)
    decision = plan(layout, masks_of(layout, pattern, seed=len(pattern)))
    expected = masked_features(net, decision, torch.float32)[:, : 0 if decision.constant else None]
    for align, order in ((1, "KRSC"), (4, "KCRS"), (8, "KRSC"), (16, "KCRS")):
        arena = pack(net, decision, align=align, layout=order)
        assert difference(features(arena, torch.float32), expected) <= TOLERANCE
        assert arena.features == int(decision.features.sum()) and arena.parameters == decision.parameters
        assert arena.widths == decision.widths
        assert all(stored % align == 0 and 0 <= stored - arena.widths[name] < align for name, stored in arena.stored.items())
        assert (arena.ops == ()) == decision.constant == (arena.nbytes == 0)


@pytest.mark.parametrize("case", CASES, ids="-".join)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_in_double_precision_nothing_but_rounding_is_left(case, pattern):
    net = doubled(*case)
    layout = MaskLayout(net.architecture)
    decision = plan(layout, masks_of(layout, pattern, seed=7))
    expected = masked_features(net, decision, torch.float64)[:, : 0 if decision.constant else None]
    small = compact(net, decision)
    with torch.no_grad():
        assert difference(small(images(torch.float64)), expected) <= 1e-13, "the network that can be trained further"
    for source, given_plan in ((net, decision), (small, decision), (small, None)):
        arena = pack(source, given_plan, dtype=torch.float64, align=4)
        assert difference(features(arena, torch.float64), expected) <= 1e-13


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    case=st.sampled_from(CASES),
    pattern=st.sampled_from(PATTERNS),
    seed=st.integers(0, 10_000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    layout=st.sampled_from(["KCRS", "KRSC"]),
    align=st.sampled_from([1, 4, 8]),
)
def test_every_tensor_is_the_folded_one_rounded_once(case, pattern, seed, dtype, layout, align):
    """The truth is folded in float64; the bound is half a unit in the last place."""
    net = network(*case)
    mask_layout = MaskLayout(net.architecture)
    decision = plan(mask_layout, masks_of(mask_layout, pattern, seed))
    arena = pack(net, decision, dtype=dtype, layout=layout, align=align)
    truth = {} if decision.constant else fold(compact(doubled(*case), decision))
    tensors = arena.tensors()
    assert tensors.keys() == truth.keys() and list(tensors) == [name for op in arena.ops for name in op.tensors()]
    for op in arena.ops:
        for name, shape in op.tensors().items():
            found = tensors[name]
            assert found.shape == shape and found.data_ptr() % 64 == 0
            assert found.dtype == (dtype if name.endswith("weight") else torch.float32)
            if len(shape) == 4 and min(shape) > 1:
                assert found.is_contiguous(memory_format=torch.channels_last if layout == "KRSC" else torch.contiguous_format)
            true = padded(truth[name], shape, arena, op)
            limits = torch.finfo(found.dtype)
            bound = true.abs() * limits.eps / 2 * (1 + 1e-9) + limits.smallest_normal * limits.eps
            assert bool(((found.double() - true).abs() <= bound).all()), name
            assert bool((found[true == 0] == 0).all()), "padding is exactly zero"


def padded(value, shape, arena, op):
    """Put a compact tensor's channels where the arena stores them."""
    found = value.new_zeros(shape)
    index = [stored_positions(arena, groups_of(arena, op, dim)) for dim in range(min(2, len(shape)))]
    if len(index) == 1:
        found[index[0]] = value
    else:
        found[index[0][:, None], index[1]] = value
    return found


def groups_of(arena, op, dim):
    """The groups of an operation's outputs (dim 0) or inputs (dim 1)."""
    architecture = arena.architecture
    if op.target == "stem":
        return architecture.stem.source if dim else architecture.stem.target
    if op.target == "norm":
        return architecture.features
    for block in architecture.blocks:
        if op.target.startswith(f"{block.name}."):
            rest = op.target.removeprefix(f"{block.name}.")
            convs = {conv.name: conv for conv in block.convs}
            if rest == "norm":
                return block.source
            if rest == "shortcut":
                return block.source if dim else block.target
            return convs[rest].source if dim else convs[rest].target
    raise AssertionError(op)


def stored_positions(arena, groups):
    if not groups:
        return torch.arange(3)
    parts, before = [], 0
    for name in groups:
        parts.append(torch.arange(before, before + arena.widths[name]))
        before += arena.stored[name]
    return torch.cat(parts)


@pytest.mark.parametrize("backbone", ["resnet20", "preact_resnet18", "resnet50"])
def test_whole_arenas_have_the_reference_s_bits_whatever_lay_there_before(backbone, monkeypatch):
    net = network(backbone, "small")
    layout = MaskLayout(net.architecture)
    decision = plan(layout, masks_of(layout, "empty inner groups"))
    packed = pack(net, decision, dtype=torch.bfloat16, align=8)
    # The function of the same name hides the module.
    module = sys.modules["der_fast.compaction.pack"]
    monkeypatch.setattr(module, "_aligned", lambda size, device: torch.full((size,), 0xFF, dtype=torch.uint8))
    assert torch.equal(pack(net, decision, dtype=torch.bfloat16, align=8).storage, packed.storage)

    def by_reference(jobs, storage, *, layout, epsilon, threads):
        compact_reference(jobs, storage, layout=layout, epsilon=epsilon)
        return -1

    monkeypatch.setattr(module.kernel, "compact", by_reference)
    assert torch.equal(pack(net, decision, dtype=torch.bfloat16, align=8).storage, packed.storage)


def test_counts():
    net = network("resnet18", "small")
    layout = MaskLayout(net.architecture)
    decision = plan(layout, masks_of(layout, "random"))
    arena, wide = pack(net, decision), pack(net, decision, align=8)
    sizes = [torch.Size(shape).numel() for op in arena.ops for shape in op.tensors().values()]
    assert arena.stored_parameters == sum(sizes) and wide.stored_parameters > arena.stored_parameters
    assert wide.parameters == arena.parameters == sum(p.numel() for p in compact(net, decision).parameters())
    assert wide.nbytes == wide.storage.numel() == sum(-(-entry.nbytes // 64) * 64 for entry in wide.entries)


def test_features_of_padded_option_a_streams_are_found():
    # Padding lies behind each stage's channels, so the true features are not the first ones.
    net = network("resnet20", "small")
    layout = MaskLayout(net.architecture)
    arena = pack(net, plan(layout, masks_of(layout, "random", seed=4)), align=8)
    first, second, third = (arena.widths[f"stage{number}"] for number in (1, 2, 3))
    assert arena.feature_index.tolist() == [*range(first), *range(8, 8 + second), *range(16, 16 + third)]
    assert pack(net, plan(layout, masks_of(layout, "random", seed=4))).feature_index is None


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_nothing(threads):
    net = Extractor(build_architecture("resnet18", width=32)).initialise(seeded(0)).eval()
    assert torch.equal(pack(net, threads=threads).storage, pack(net, threads=1).storage)


def test_channels_last_weights_and_training_mode_change_nothing():
    net = network("resnet18", "small", width=5)
    expected = pack(net).storage
    other = Extractor(net.architecture)
    other.load_state_dict(net.state_dict())
    other.to(memory_format=torch.channels_last).train()
    assert torch.equal(pack(other).storage, expected) and other.training


def cloned(backbone="resnet18"):
    net = network(backbone, "small")
    other = Extractor(net.architecture)
    other.load_state_dict(net.state_dict())
    return other.eval()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("place", "name"),
    [
        (lambda net: net.stem.weight, "stem.weight"),
        (lambda net: net.norm.bias, "stem.bias"),
        (lambda net: net.norm.running_mean, "stem.bias"),
        (lambda net: net.blocks[3].convs[1].weight, "stage2.1.conv2.weight"),
        (lambda net: net.blocks[2].shortcut_norm.weight, "stage2.0.shortcut.weight"),
    ],
)
def test_kept_weights_that_are_not_finite_are_refused_by_name(place, name, value):
    net = cloned()
    with torch.no_grad():
        place(net).view(-1)[0] = value
    with pytest.raises(DivergenceError, match=f"resnet18: {name} would hold NaN or infinity"):
        pack(net)


def test_a_negative_variance_is_refused():
    net = cloned()
    net.blocks[0].norms[0].running_var[0] = -1.0
    with pytest.raises(DivergenceError, match=r"stage1.0.conv1.weight would hold NaN"):
        pack(net)


def test_weights_that_are_cut_away_may_be_anything():
    net = cloned()
    layout = MaskLayout(net.architecture)
    keep = torch.ones(layout.channels, dtype=torch.bool)
    layout.by_group(keep)["stage1.0"][0] = False
    expected = pack(net, plan(layout, keep)).storage
    with torch.no_grad():
        net.blocks[0].convs[0].weight[0] = math.nan
        net.blocks[0].norms[0].bias[0] = math.inf
        net.blocks[0].convs[1].weight[:, 0] = math.nan
    assert torch.equal(pack(net, plan(layout, keep)).storage, expected)


def test_what_float16_cannot_hold_is_refused():
    net = cloned()
    with torch.no_grad():
        net.blocks[0].convs[0].weight[0, 0, 0, 0] = 1e8
    with pytest.raises(ValueError, match=r"stage1.0.conv1.weight holds \S+, which torch.float16 cannot hold; choose bfloat16"):
        pack(net, dtype=torch.float16)
    pack(net, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": torch.int8}, "dtype must be one of torch.float32, .*not torch.int8"),
        ({"layout": "NHWC"}, "layout must be one of KCRS, KRSC, not 'NHWC'"),
        ({"align": 0}, "align must be a whole number from 1 to 1024, not 0"),
        ({"threads": -2}, "threads must be a whole number from 0 to 1024, not -2"),
    ],
)
def test_options_that_do_not_exist_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        pack(network("resnet20", "small"), **options)


def test_plans_of_other_networks_are_refused():
    net = network("resnet18", "small")
    for other in (build_architecture("resnet18", width=4), build_architecture("resnet18", width=3, stem="imagenet")):
        layout = MaskLayout(other)
        with pytest.raises(ValueError, match="the plan is for another network: resnet18, not this resnet18"):
            pack(net, plan(layout, masks_of(layout, "random")))
    layout = MaskLayout(net.architecture)
    small = compact(net, plan(layout, masks_of(layout, "one")))
    with pytest.raises(ValueError, match="the plan is for another compact resnet18"):
        pack(small, plan(layout, masks_of(layout, "all")))


def test_weights_of_another_dtype_are_refused():
    net = cloned().to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"jobs\[0\].weight must be float32 or float64, not bfloat16"):
        pack(net)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device")
@pytest.mark.parametrize("backbone", BACKBONES)
def test_arenas_made_on_a_gpu_are_the_same(backbone):
    net = cloned(backbone)
    layout = MaskLayout(net.architecture)
    decision = plan(layout, masks_of(layout, "empty inner groups"))
    expected = pack(net, decision, dtype=torch.bfloat16, align=8)
    found = pack(net.cuda(), decision, dtype=torch.bfloat16, align=8)
    assert found.storage.is_cuda and torch.equal(found.storage.cpu(), expected.storage), native.build_info()
    back = found.to("cpu")
    assert not back.storage.is_cuda and torch.equal(back.feature_index, expected.feature_index)
