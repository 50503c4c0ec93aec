"""Convolutions whose tiles are loaded as boxes by tensor descriptors: against float64, the edges, split sums, and where they apply."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from der_fast.kernels.compile_case import CAPABILITIES
from der_fast.kernels.conv import ConvShape, ConvTiles, boxes, candidates, conv_dgrad, conv_forward, conv_wgrad, likely
from tests.kernels.test_conv import DEVICE, check_dgrad, check_forward, draw, poisoned

__all__ = ["poisoned"]

HALF = torch.float16
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != boxes.CAPABILITY, reason="needs compute capability 9.0"
)


def tiles(block_m: int = 64, block_k: int = 32, split: int = 1) -> ConvTiles:
    return ConvTiles(block_m, 64, block_k, boxed=True, split=split)


# Odd sizes, one image, one pixel, more channels than a block, a block of channels that is not full, boxes of several images.
SHAPES = [
    (ConvShape(2, 8, 5, 7, 24, 3, 1), tiles()),
    (ConvShape(1, 64, 9, 5, 136, 3, 1), tiles(128, 64, split=3)),
    (ConvShape(5, 24, 4, 4, 64, 3, 1), tiles(split=3)),
    (ConvShape(1, 136, 1, 1, 8, 3, 1), tiles(block_k=64)),
    (ConvShape(3, 136, 5, 3, 24, 1, 1), tiles(128)),
    (ConvShape(1, 128, 7, 17, 128, 1, 1), tiles(split=2)),
]
EVERY = pytest.mark.parametrize(("shape", "config"), SHAPES, ids=[f"{s.kernel}x{s.kernel}-{s.channels}to{s.filters}" for s, _ in SHAPES])


@EVERY
def test_forward_with_its_statistics(shape, config):
    check_forward(draw(shape, HALF), config, HALF, prologue=None)


@EVERY
def test_dgrad_with_the_relu_and_the_sums_before_it(shape, config):
    check_dgrad(draw(shape, HALF), config, HALF, g_affine=None)


@pytest.mark.parametrize("split", [1, 3])
def test_without_any_sums(split):
    case = draw(ConvShape(3, 40, 3, 5, 24, 3, 1), HALF, seed=1)
    check_forward(case, tiles(split=split), HALF, prologue=None, statistics=False)
    check_dgrad(case, tiles(split=split), HALF, g_affine=None, epilogue=None)


@pytest.mark.parametrize("split", [1, 2])
def test_one_multiprocessor_computes_every_tile(monkeypatch, split):
    """Each program then has several tiles, and which one has it changes nothing."""
    from der_fast.kernels.conv import triton_descriptor

    case = draw(ConvShape(5, 64, 9, 5, 128, 1, 1), HALF, seed=2).as_dtype(HALF)
    options = {"stride": 1, "config": tiles(split=split), "backend": "fused"}

    def both():
        y = conv_forward(case.x, case.weight, prologue=None, statistics=True, **options)
        return (*y, *conv_dgrad(case.g, case.weight, (9, 5), g_affine=None, epilogue=(case.x, case.affine), **options))

    first = both()
    monkeypatch.setattr(triton_descriptor, "multiprocessors", lambda device: 1)
    for one, other in zip(first, both(), strict=True):
        assert torch.equal(one, other) and not one.isnan().any()


@pytest.mark.parametrize("dtype", [HALF, torch.bfloat16])
@pytest.mark.parametrize("split", [1, 3])
def test_what_lies_outside_the_image_is_zero(dtype, split):
    """Small whole numbers are exact in every dtype. A box begins at −1, and the next image must not show beyond the end of one."""
    ones = torch.ones(3, 8, 5, 3, dtype=dtype, device=DEVICE).contiguous(memory_format=torch.channels_last)
    ones[1] = 2
    weight = torch.ones(8, 8, 3, 3, dtype=dtype, device=DEVICE).contiguous(memory_format=torch.channels_last)
    inside = 8 * F.conv2d(torch.ones(1, 1, 5, 3), torch.ones(1, 1, 3, 3), padding=1)
    expected = inside.expand(3, 8, -1, -1) * torch.tensor([1.0, 2.0, 1.0]).reshape(3, 1, 1, 1)
    options = {"stride": 1, "config": tiles(split=split), "backend": "fused"}
    y, _ = conv_forward(ones, weight, prologue=None, statistics=False, **options)
    dx, _ = conv_dgrad(ones, weight, (5, 3), g_affine=None, epilogue=None, **options)
    expected = expected.to(DEVICE)
    assert torch.equal(y.float(), expected) and torch.equal(dx.float(), expected)


def test_dgrad_turns_the_weight():
    """One weight is not 0: its tap and its channels say where the gradient of a pixel goes."""
    weight = torch.zeros(16, 8, 3, 3, dtype=HALF, device=DEVICE).contiguous(memory_format=torch.channels_last)
    weight[11, 5, 0, 2] = 1
    g = torch.zeros(1, 16, 4, 4, dtype=HALF, device=DEVICE).contiguous(memory_format=torch.channels_last)
    g[0, 11, 2, 1] = 3
    dx, _ = conv_dgrad(g, weight, (4, 4), stride=1, g_affine=None, epilogue=None, config=tiles(), backend="fused")
    # y[2, 1] took x[2 + 0 − 1, 1 + 2 − 1].
    assert dx.nonzero().tolist() == [[0, 5, 1, 2]] and float(dx[0, 5, 1, 2]) == 3


def test_a_nan_passes():
    case = draw(ConvShape(1, 8, 3, 3, 8, 3, 1), HALF).as_dtype(HALF)
    case.x[0, 3, 0, 0] = torch.nan
    y, partials = conv_forward(case.x, case.weight, stride=1, prologue=None, statistics=True, config=tiles(), backend="fused")
    assert y[0, :, :2, :2].isnan().all() and not y[0, :, 2].isnan().any() and partials[:, 1:].isnan().all()


@pytest.mark.parametrize(
    ("shape", "pixels", "expected"),
    [
        (ConvShape(128, 64, 32, 32, 64, 3, 1), 128, (1, 4, 32)),
        (ConvShape(128, 64, 16, 16, 64, 3, 1), 128, (1, 8, 16)),
        (ConvShape(128, 64, 8, 8, 64, 3, 1), 128, (2, 8, 8)),
        (ConvShape(128, 64, 4, 4, 64, 3, 1), 64, (4, 4, 4)),
        (ConvShape(6, 64, 7, 7, 64, 3, 1), 128, (2, 8, 8)),
        # One pixel of 128 images pads nothing.
        (ConvShape(128, 64, 7, 7, 64, 3, 1), 128, (128, 1, 1)),
        (ConvShape(1, 64, 1, 1, 64, 3, 1), 64, (1, 1, 64)),
    ],
    ids=str,
)
def test_the_box_that_pads_least(shape, pixels, expected):
    assert boxes.box(shape, pixels) == expected


def test_split_sums_have_equal_parts_and_only_where_tiles_are_few():
    assert boxes.splits(72, 64, 132) == [2]
    assert boxes.splits(36, 10, 132) == [9, 6, 4, 3, 2]
    assert boxes.splits(72, 132, 132) == []


GOOD = ConvShape(128, 64, 4, 4, 512, 3, 1)


@pytest.mark.parametrize(
    ("changes", "dtype", "capability"),
    [
        ({"stride": 2}, HALF, (9, 0)),
        ({"channels": 37}, HALF, (9, 0)),
        ({"filters": 20}, HALF, (9, 0)),
        ({}, torch.float32, (9, 0)),
        ({}, HALF, (8, 0)),
        ({}, HALF, (10, 0)),
    ],
)
def test_where_they_do_not_apply_they_are_no_candidates(changes, dtype, capability):
    shape = replace(GOOD, **changes)
    assert boxes.applies(GOOD, HALF, (9, 0)) and not boxes.applies(shape, dtype, capability)
    for direction in ("forward", "dgrad"):
        assert not any(config.boxed for config in candidates(direction, shape, dtype, capability=capability))


def test_candidates_are_never_the_default_and_split_where_tiles_are_few():
    for direction in ("forward", "dgrad"):
        found = candidates(direction, GOOD, capability=(9, 0))
        boxed = [config for config in found if config.boxed]
        assert not found[0].boxed and len(boxed) > 2 and all(config.block_k in (32, 64) for config in boxed)
        assert not any(config.boxed for config in candidates(direction, GOOD, transformed=True, capability=(9, 0)))
    assert any(config.split > 1 for config in found)
    assert not any(config.split > 1 for config in candidates("forward", replace(GOOD, batch=4096), capability=(9, 0)))
    assert not any(config.boxed for config in candidates("wgrad", GOOD, capability=(9, 0)))


def test_what_they_refuse():
    case = draw(ConvShape(2, 8, 5, 4, 16, 3, 1)).as_dtype(HALF)
    given = {"stride": 1, "prologue": None, "statistics": False, "config": tiles(), "backend": "fused"}
    with pytest.raises(ValueError, match="config: boxed tiles need stride 1, multiples of 8 .* not ConvShape.*stride=2"):
        conv_forward(case.x, case.weight, **given | {"stride": 2})
    with pytest.raises(ValueError, match=r"config: boxed tiles .* in torch.float32 on 9.0"):
        conv_forward(case.x.float(), case.weight.float(), **given)
    with pytest.raises(ValueError, match="boxed tiles are for forward without a prologue .* not for this forward"):
        conv_forward(case.x, case.weight, **given | {"prologue": (torch.ones(8, device=DEVICE), torch.ones(8, device=DEVICE))})
    with pytest.raises(ValueError, match="the sum has 9 steps, which 2 equal parts do not divide"):
        conv_forward(case.x, case.weight, **given | {"config": tiles(split=2)})
    # The same values, one element further on.
    storage = torch.empty(case.x.numel() + 1, dtype=HALF, device=DEVICE)[1:]
    moved = storage.as_strided(case.x.shape, case.x.stride()).copy_(case.x)
    with pytest.raises(ValueError, match="begin at a multiple of 16 bytes"):
        conv_forward(moved, case.weight, **given)
    for affine in (None, (torch.ones(3, 16, device=DEVICE), case.g)):
        config = tiles() if affine else tiles(split=2)
        with pytest.raises(ValueError, match="not for this dgrad" if affine else "9 steps"):
            conv_dgrad(case.g, case.weight, (5, 4), stride=1, g_affine=affine, epilogue=None, config=config, backend="fused")
    with pytest.raises(ValueError, match="not for this wgrad"):
        conv_wgrad(case.x, case.g, 3, stride=1, config=tiles(), backend="fused")
    for boxed, split in ((False, 2), (True, 0)):
        with pytest.raises(ValueError, match=f"split must be at least 1, and 1 unless tiles are boxed, not {split}"):
            ConvTiles(64, 64, 32, boxed=boxed, split=split)


def test_a_case_is_compiled_only_for_the_gpus_that_launch_it():
    from der_fast.kernels.conv import triton_descriptor, triton_forward

    assert {case.capabilities for case in triton_descriptor.compile_cases()} == {(90,)}
    assert {case.capabilities for case in triton_forward.compile_cases()} == {CAPABILITIES}


@pytest.mark.parametrize("direction", ["forward", "dgrad"])
def test_two_of_them_are_measured_where_they_apply(direction):
    shape = ConvShape(128, 128, 16, 16, 128, 3, 1)
    offered = likely(direction, shape, torch.bfloat16, capability=(9, 0))
    assert sum(config.boxed for config in offered) == 2 and not offered[0].boxed
    assert [config for config in offered if not config.boxed] == likely(direction, shape, torch.bfloat16)
    assert len({config.name for config in offered}) == len(offered)
