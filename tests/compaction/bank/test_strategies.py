"""Every strategy computes what `execute` computes, no less exactly than PyTorch does."""

from __future__ import annotations

import pytest
import torch

from der_fast.compaction.bank import lanes
from der_fast.compaction.bank.execute import execute
from der_fast.compaction.bank.strategies import FUSED, LANES, PLAIN, Runnable, macs, run
from der_fast.kernels.choices import Choices

FLOOR = 1e-6  # relative to the largest feature: a few float32 roundings per layer, in networks of up to 54 layers
BACKBONES = ("resnet18", "resnet20", "resnet34", "resnet50", "preact_resnet18")


def truth(weights, images):
    """The features in double precision, from the same float32 weights."""
    tensors = {name: tensor.double() for name, tensor in weights.tensors().items()}
    return execute(weights.ops, tensors, images.double())


def features(weights, images, strategy):
    runnable = Runnable(weights)
    assert strategy in runnable.strategies()
    (found,) = run([runnable], images, strategy, Choices())
    return found


def error(found, exact):
    if not exact.numel():
        return 0.0
    return float((found.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-12))


def check(weights, images, floor=FLOOR):
    exact = truth(weights, images)
    allowed = max(2 * error(execute(weights.ops, weights.tensors(), images), exact), floor)
    for strategy in (PLAIN, FUSED, LANES):
        found = features(weights, images, strategy)
        assert found.shape == exact.shape and found.dtype == torch.float32
        assert error(found, exact) <= allowed, strategy


@pytest.mark.parametrize("pattern", ["all", "most", "few", "one", "lost"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_equal_to_double_precision(backbone, pattern, arena_of, pictures):
    check(arena_of(backbone, pattern, width=4, seed=3), pictures())


@pytest.mark.parametrize("width", [1, 3, 17])
@pytest.mark.parametrize("backbone", ["resnet18", "resnet20", "resnet50"])
def test_odd_widths(backbone, width, arena_of, pictures):
    check(arena_of(backbone, "all", width=width), pictures(3, 9, 9))


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50", "preact_resnet18"])
def test_pooling_stem(backbone, arena_of, pictures):
    check(arena_of(backbone, "most", stem="imagenet", width=5), pictures(2, 70, 45))


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 33])
def test_batches_that_do_not_fill_the_lanes(count, arena_of, pictures):
    check(arena_of("resnet18", "most", width=6), pictures(count))


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (2, 3), (4, 4), (5, 31), (32, 32)])
def test_image_sizes(size, arena_of, pictures):
    check(arena_of("resnet18", "most", width=7), pictures(2, *size))


def test_images_in_any_memory_format(arena_of, pictures):
    weights, images = arena_of("resnet20", "most"), pictures(4, 12, 12)
    expected = features(weights, images, LANES)
    spread = torch.zeros(4, 12, 3, 24)[..., ::2].permute(0, 2, 1, 3)
    spread.copy_(images)
    for view in (images.contiguous(memory_format=torch.channels_last), spread, images.double()):
        assert torch.equal(features(weights, view, LANES), expected)
    one = images[:1].expand(4, -1, -1, -1)
    assert torch.equal(features(weights, one, LANES), expected[:1].expand(4, -1))


def test_an_image_has_the_same_bits_whatever_is_beside_it(arena_of, pictures):
    weights, images = arena_of("resnet18", "most"), pictures(37)
    together = features(weights, images, LANES)
    apart = torch.cat([features(weights, part, LANES) for part in images.split([1, 16, 20])])
    assert torch.equal(together, apart)


def test_threads_do_not_change_a_bit(arena_of, pictures):
    weights, images = [arena_of("resnet20", "most", seed=seed) for seed in range(3)], pictures(40)
    programs = [lanes.LanesProgram(one) for one in weights]
    alone = lanes.run(programs, images, 1)
    for threads in (2, 5, 64):
        assert torch.equal(lanes.run(programs, images, threads), alone)


def test_not_a_number_stays_one(arena_of, pictures):
    weights, images = arena_of("resnet18", "all", stem="imagenet", width=3), pictures(3, 40, 40)
    images[1, 0, 20, 20] = torch.nan
    for strategy in (PLAIN, LANES):
        wrong = features(weights, images, strategy).isnan()
        assert wrong[1].all() and not wrong[[0, 2]].any(), strategy


@pytest.mark.parametrize("backbone", ["resnet20", "resnet18"])
def test_padded_arenas_give_the_true_features(backbone, arena_of, pictures):
    images = pictures()
    exact = truth(arena_of(backbone, "most", width=5), images)
    padded = arena_of(backbone, "most", width=5, align=8)
    for strategy in (PLAIN, FUSED, LANES):
        found = features(padded, images, strategy)
        assert found.shape == exact.shape and error(found, exact) <= FLOOR


def test_half_precision_is_as_good_as_the_plain_loop(arena_of, pictures):
    images = pictures(6)
    for dtype in (torch.bfloat16, torch.float16):
        weights = arena_of("resnet18", "most", dtype=dtype)
        runnable = Runnable(weights)
        exact = truth(weights, images.to(dtype))
        bound = torch.finfo(dtype).eps
        for strategy in runnable.strategies():
            (found,) = run([runnable], images, strategy, Choices())
            assert found.dtype == dtype
            # One rounding per layer and branch, 20 of them, that partly cancel.
            assert error(found, exact) <= 4 * bound, strategy


def test_one_pixel_in_half_precision(arena_of, pictures):
    weights, images = arena_of("resnet18", "one", dtype=torch.bfloat16), pictures(1, 1, 1)
    runnable = Runnable(weights)
    exact = truth(weights, images.bfloat16())
    for strategy in runnable.strategies():
        (found,) = run([runnable], images, strategy, Choices())
        assert error(found, exact) <= 4 * torch.finfo(torch.bfloat16).eps


def test_double_precision_and_the_other_layout_run_plainly(arena_of, pictures):
    images = pictures()
    exact = arena_of("resnet20", "most", dtype=torch.float64)
    assert Runnable(exact).strategies() == (PLAIN,)
    (found,) = run([Runnable(exact)], images, "auto", Choices())
    assert found.dtype == torch.float64
    other = arena_of("resnet20", "most", layout="KCRS")
    assert LANES not in Runnable(other).strategies()
    (found,) = run([Runnable(other)], images, LANES, Choices())
    assert error(found, truth(other, images)) <= FLOOR


def test_nothing_left_and_no_images(arena_of, pictures):
    nothing, some = Runnable(arena_of("resnet20", "nothing")), Runnable(arena_of("resnet20", "most"))
    first, second, third = run([nothing, some, nothing], pictures(3), LANES, Choices())
    assert first.shape == third.shape == (3, 0) and second.shape == (3, some.arena.features)
    empty = run([nothing, some], pictures(0), "auto", Choices())
    assert [part.shape for part in empty] == [(0, 0), (0, some.arena.features)]


def test_weights_are_read_where_they_lie(arena_of, pictures):
    runnable = Runnable(arena_of("resnet18", "most"))
    begin = runnable.arena.storage.data_ptr()
    for tensor in runnable.tensors.values():
        assert begin <= tensor.data_ptr() < begin + runnable.arena.nbytes
    images = pictures(4)
    for strategy in (PLAIN, FUSED, LANES):
        before = runnable.run(strategy, runnable.prepared(images))
        runnable.tensors["stem.weight"].mul_(1.5)
        assert not torch.equal(runnable.run(strategy, runnable.prepared(images)), before), strategy


def test_multiplications_are_counted(arena_of):
    weights = arena_of("resnet18", "all", width=64)
    assert macs(weights, 32, 32) == 555_417_600  # the figure of the literature, 0.56 G


def test_the_native_executor_refuses_what_does_not_fit(arena_of):
    weights = arena_of("resnet20", "most")
    program = lanes.LanesProgram(weights)
    with pytest.raises(ValueError, match="images must have 3 channels"):
        lanes.run([program], torch.zeros(2, 4, 8, 8), 1)
    with pytest.raises(ValueError, match="images must be float32, not float64"):
        lanes.run([program], torch.zeros(2, 3, 8, 8, dtype=torch.float64), 1)
    with pytest.raises(ValueError, match="pixels"):
        lanes.run([program], torch.zeros(2, 3, 0, 8), 1)
