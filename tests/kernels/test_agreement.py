"""Before the fastest way is taken, every way must compute what the trusted one does: in every block of rows and in every channel."""

from __future__ import annotations

import logging
import math
import time

import pytest
import torch
import torch.nn.functional as F

from der_fast.kernels import agreement, choices
from der_fast.kernels.agreement import CHANNELS, LARGEST, ROWS, agreeing, difference
from der_fast.kernels.choices import Choices

# What one norm over the whole result was once allowed to be.
OF_THE_WHOLE = {torch.bfloat16: 0.1, torch.float16: 0.1, torch.float32: 0.02, torch.float64: 1e-6}


def values(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape or (1000,), generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def image(*shape, **options):
    return values(*shape, **options).contiguous(memory_format=torch.channels_last)


def always(result):
    return lambda: result


def whole(result):
    return [result]


def kept(runs, trusted="right"):
    return list(agreeing(runs, [trusted], whole)[0])


def test_the_difference_is_relative_to_what_is_there_and_to_what_is_usual():
    one = torch.full((256, 3), 2.0)
    assert difference(one, one).size == 0.0
    other = one.clone()
    other[:, 1] = 2.02
    found = difference(other, one)
    # √(n·0.02² / (n·2² + n·2²)) of that channel; a block holds two right channels more.
    assert found.size == pytest.approx(0.02 / math.sqrt(8), rel=1e-5) and found.where == "channel 1"
    other = one.clone()
    other[70:80] = 0
    found = difference(other, one)
    assert found.size == pytest.approx(math.sqrt(10 / 64 / 2)) and found.where == "rows 64 to 127, channels 0 to 2"
    # A channel without anything in it is not held against rounding, but against what is usual.
    one[:, 2] = 0
    other = one.clone()
    other[:, 2] = 1e-6
    assert 0 < difference(other, one).size < 1e-6
    assert difference(one[:10], one).size == math.inf
    assert difference(one[:0], one[:0]).size == difference(torch.zeros(3), torch.zeros(3)).size == 0.0
    assert difference(torch.tensor(2.0), torch.tensor(1.0)).size == pytest.approx(1 / math.sqrt(2))


@pytest.mark.parametrize("allowed", [math.inf, LARGEST[torch.float32]])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_one_number_that_is_not_finite_is_a_difference(bad, allowed):
    one = values()
    other = one.clone()
    other[3] = bad
    assert difference(other, one, allowed).size == difference(one, other, allowed).size == math.inf
    # A loss that has diverged is no fault of the way that computes it.
    assert difference(other, other.clone(), allowed).size == 0.0


@pytest.mark.parametrize("dtype", LARGEST)
def test_what_is_wrong_is_left_out_and_what_only_rounds_is_kept(dtype):
    truth = values(dtype=dtype)
    allowed = LARGEST[dtype]
    runs = {
        "right": lambda: truth,
        "rounded": lambda: (truth.double() * (1 + 0.5 * allowed)).to(dtype),
        "wrong": lambda: (truth.double() * (1 + 2 * allowed)).to(dtype),
    }
    agreed, problems = agreeing(runs, ["right"], whole)
    assert list(agreed) == ["right", "rounded"]
    assert problems["wrong"].startswith("computes something else (it differs by")


def tile(matrix):
    """One of a thousand."""
    return matrix[501 * ROWS : 502 * ROWS, :CHANNELS]


FAULTS = {
    "a tile that is not written": lambda matrix: tile(matrix).zero_(),
    "a tile of its neighbour": lambda matrix: tile(matrix).copy_(matrix[:ROWS, :CHANNELS].clone()),
    "a tile that lacks one of 72 steps": lambda matrix: tile(matrix).add_(values(*tile(matrix).shape, seed=7) / math.sqrt(72)),
    "a channel that is not written": lambda matrix: matrix[:, -1].zero_(),
    "a channel with another scale": lambda matrix: matrix[:, 0].mul_(1.2),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("dtype", "channels"), [(torch.bfloat16, 64), (torch.float16, 130), (torch.float32, 130), (torch.bfloat16, 17)])
def test_one_wrong_tile_of_a_thousand_and_one_wrong_channel_are_refused(dtype, channels, fault):
    truth = image(63, channels, 32, 32, dtype=dtype)
    matrix = truth.permute(0, 2, 3, 1).reshape(-1, channels).clone()
    FAULTS[fault](matrix)
    wrong = matrix.view(63, 32, 32, channels).permute(0, 3, 1, 2)
    assert kept({"right": lambda: truth, "wrong": lambda: wrong}) == ["right"]
    # One norm over the whole would have let it pass; not a whole channel of a few, and in float32 only what is wrong by little.
    error = float((wrong.double() - truth.double()).norm() / truth.double().norm())
    small = "steps" in fault or "scale" in fault
    if small or (dtype != torch.float32 and ("tile" in fault or channels == 130)):
        assert error < OF_THE_WHOLE[dtype]


def rounded(tensor, dtype):
    """As stored, or for float32 as TensorFloat-32 reads it."""
    if dtype != torch.float32:
        return tensor.to(dtype).double()
    bits = tensor.float().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32).double()


def layer(x, weight, kernel, dtype, scale):
    """A convolution, batch-norm with its weights, and a ReLU, every result rounded; the sums are exact."""
    y = rounded(F.conv2d(rounded(x, dtype), rounded(weight, dtype), padding=kernel // 2), dtype)
    mean, variance = y.mean((0, 2, 3), keepdim=True), y.var((0, 2, 3), unbiased=False, keepdim=True)
    return rounded(F.relu((y - mean) / (variance + 1e-5).sqrt() * scale), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("shape", "kernel"), [((2, 3, 16, 17), 3), ((4, 17, 13, 11), 3), ((2, 64, 16, 16), 1), ((5, 130, 8, 9), 1), ((1, 1, 24, 24), 3)]
)
def test_roundings_of_a_whole_block_are_no_fault(dtype, shape, kernel):
    """Three layers, each rounding its own way, against the same in double precision; activations, gradients and vectors of sums."""
    for seed in range(4):
        channels = shape[1]
        x = values(*shape, dtype=torch.float64, seed=seed).requires_grad_()
        weights = [values(channels, channels, kernel, kernel, dtype=torch.float64, seed=seed + 10 + i).requires_grad_() for i in range(3)]
        scale = (0.1 + values(channels, dtype=torch.float64, seed=seed + 20).abs()).view(1, -1, 1, 1)
        results = []
        for kind in (torch.float64, dtype):
            out = x
            for weight in weights:
                out = layer(out, weight, kernel, kind, scale) if kind == dtype else exactly(out, weight, kernel, scale)
            found = out.detach().to(dtype)
            results.append([found, found.double().sum((0, 2, 3)).float(), found.double().var((0, 2, 3)).float()])
        agreed, problems = agreeing(dict(zip(("right", "rounded"), map(always, results), strict=True)), ["right"], list)
        assert "rounded" in agreed, problems


def exactly(x, weight, kernel, scale):
    y = F.conv2d(x, weight, padding=kernel // 2)
    mean, variance = y.mean((0, 2, 3), keepdim=True), y.var((0, 2, 3), unbiased=False, keepdim=True)
    return F.relu((y - mean) / (variance + 1e-5).sqrt() * scale)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_values_on_the_other_side_of_a_relus_corner_are_no_fault_and_half_a_tile_is(dtype):
    truth = image(8, 64, 16, 16, dtype=dtype)
    corner = truth.clone()
    # One value of a channel in 256.
    corner.permute(0, 2, 3, 1).reshape(-1, 64)[::256, 5] = 0
    matrix = truth.permute(0, 2, 3, 1).reshape(-1, 64).clone()
    matrix[64:80, :16] = 0
    half = matrix.view(8, 16, 16, 64).permute(0, 3, 1, 2)
    assert kept({"right": lambda: truth, "corner": lambda: corner, "half": lambda: half}) == ["right", "corner"]


@pytest.mark.parametrize("shape", [(3, 5, 7, 9), (1, 130, 20, 20), (70, 65), (513,)])
def test_a_large_result_is_compared_in_parts(monkeypatch, shape):
    one, other = values(*shape), values(*shape, seed=1)
    at_once = difference(other, one, 0.01)
    monkeypatch.setattr(agreement, "_AT_ONCE", 1)
    assert difference(other, one, 0.01).size == pytest.approx(at_once.size, rel=1e-12)


def test_a_way_that_fails_or_gives_nothing_is_left_out():
    def fail():
        raise RuntimeError("ptxas fatal : Unsupported .version 9.9\nand a hundred lines more")

    def full():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    agreed, problems = agreeing({"right": values, "bad": fail, "none": lambda: None, "full": full}, ["right"], whole)
    assert list(agreed) == ["right"]
    assert problems == {
        "bad": "failed: RuntimeError: ptxas fatal : Unsupported .version 9.9",
        "none": "returns a gradient where there should be none, or none where there should be one",
        "full": "failed: OutOfMemoryError: CUDA out of memory. Tried to allocate 9 GiB",
    }


def test_what_a_failed_run_has_allocated_is_given_back_to_the_device(monkeypatch):
    alive, given_back = [], []

    class Large:
        def __init__(self):
            alive.append(self.__class__)

        def __del__(self):
            alive.pop()

    def full():
        large = Large()
        raise torch.OutOfMemoryError(f"CUDA out of memory: {large}")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given_back.append(len(alive)))
    assert list(agreeing({"right": values, "full": full, "next": values}, ["right"], whole)[0]) == ["right", "next"]
    assert given_back == [0]


def test_the_first_trusted_run_that_works_is_the_truth():
    def full():
        raise torch.OutOfMemoryError("CUDA out of memory")

    runs = {"best": full, "good": values, "wrong": lambda: 2 * values(), "same": values}
    assert list(agreeing(runs, ["best", "good"], whole)[0]) == ["good", "same"]
    with pytest.raises(torch.OutOfMemoryError):
        agreeing(runs, ["best"], whole)


def test_when_the_time_is_over_nothing_more_is_tried():
    agreed, problems = agreeing({"other": values, "right": values}, ["right"], whole, until=time.perf_counter())
    assert list(agreed) == ["right"] and problems == {}


def test_the_trusted_result_may_be_overwritten_by_the_next_run():
    buffer = torch.empty(4)
    runs = {"right": lambda: buffer.fill_(1.0), "wrong": lambda: buffer.fill_(2.0)}
    assert kept(runs) == ["right"]


def test_the_fastest_wrong_answer_is_not_chosen(monkeypatch, caplog):
    monkeypatch.setattr(choices, "measure", lambda runs, device: {name: {"right": 2.0, "wrong": 1.0}[name] for name in runs})
    runs = {"right": values, "wrong": lambda: 2 * values()}
    assert Choices().fastest("key", runs) == "wrong"
    store = Choices()
    with caplog.at_level(logging.WARNING):
        for key in ("one shape", "another"):
            assert store.fastest(key, runs, what="sums run as", trusted=["right"], tensors=whole) == "right"
    (record,) = caplog.records
    assert "sums run as 'wrong' is not used, because it computes something else (it differs by" in record.getMessage()
