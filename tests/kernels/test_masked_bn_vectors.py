"""The passes over vectors for several batch-norms at once, and the running statistics that the forward one moves."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from der_fast.kernels.masked_bn import Affine, Running, Statistics, Sums, backward_coefficients_all, finalize_all, passes

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EPS = 1e-5
ULP = torch.finfo(torch.float32).eps
# Parts and channels of every batch-norm: one alone, a block's join, and more than one launch can take.
SIZES = {"one": [(3, 17)], "join": [(40, 64), (2, 64)], "uneven": [(1, 1), (200, 130)], "three": [(2, 3), (17, 9), (5, 24)]}
EVERY = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)


@pytest.fixture(autouse=True)
def poisoned():
    """What torch.empty returns is NaN, so that whatever a kernel leaves unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


def draw(*size: int, seed: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def statistics(parts: int, channels: int, seed: int, momentum: float | None) -> Statistics:
    partials = torch.stack([draw(parts, channels, seed=seed).abs().mul(9).ceil() + 1, *draw(2, parts, channels, seed=seed + 1)], 1)
    partials[:, 0], partials[:, 2] = partials[:, 0, :1], partials[:, 2].abs() * 5
    running = None if momentum is None else Running(draw(channels, seed=seed + 2), draw(channels, seed=seed + 3).abs(), momentum)
    mask = draw(channels, seed=seed + 4).sigmoid() if seed % 2 else None
    return Statistics(partials.contiguous(), draw(channels, seed=seed + 5), draw(channels, seed=seed + 6), mask, running)


def truth(norm: Statistics) -> tuple[Tensor, Tensor]:
    counts, means, squares = norm.partials.double().unbind(1)
    mean = (counts * means).sum(0) / counts.sum(0)
    return mean, (squares + counts * (means - mean) ** 2).sum(0) / (counts.sum(0) - 1)


@pytest.mark.parametrize("backend", ["reference", "fused"])
@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.5, 1.0])
@EVERY
def test_running_statistics_move_towards_the_batch(sizes, momentum, backend):
    norms = [statistics(*size, seed=10 * number, momentum=momentum) for number, size in enumerate(sizes)]
    olds = [(norm.running.mean.double(), norm.running.variance.double()) for norm in norms]
    found = finalize_all(norms, EPS, backend=backend)
    for norm, old, (affine, mean, variance) in zip(norms, olds, found, strict=True):
        for value, moved, before, exact in zip((mean, variance), (norm.running.mean, norm.running.variance), old, truth(norm), strict=True):
            scale = before.abs() + exact.abs() + 1
            assert bool(((value - exact).abs() <= 32 * ULP * scale).all())
            wanted = (1 - momentum) * before + momentum * exact
            eager = before.float().lerp(exact.float(), momentum)
            allowed = torch.maximum(2 * (eager - wanted).abs(), 32 * ULP * scale)
            assert bool(((moved - wanted).abs() <= allowed).all())
            if momentum in (0.0, 1.0):
                assert torch.equal(moved, value if momentum else before.float())
        assert torch.equal(affine.mean, mean)


@pytest.mark.parametrize("backend", ["reference", "fused"])
@EVERY
def test_several_batch_norms_are_what_each_is_alone(sizes, backend):
    norms = [statistics(*size, seed=10 * number, momentum=0.1 if number != 1 else None) for number, size in enumerate(sizes)]

    def copied(norm: Statistics) -> Statistics:
        moving = norm.running
        return replace(norm, running=moving and replace(moving, mean=moving.mean.clone(), variance=moving.variance.clone()))

    together, alone = [copied(norm) for norm in norms], [copied(norm) for norm in norms]
    for one, found in zip(alone, finalize_all(together, EPS, backend=backend), strict=True):
        vectors = one.weight, one.bias, one.mask
        affine, mean, variance = passes.finalize(one.partials, *vectors, EPS, running=one.running, backend=backend)
        wanted = [affine.mean, affine.rstd, affine.scale, affine.shift, mean, variance]
        got = [found[0].mean, found[0].rstd, found[0].scale, found[0].shift, *found[1:]]
        assert all(torch.equal(a, b) and bool(a.isfinite().all()) for a, b in zip(got, wanted, strict=True))
    for one, other, before in zip(alone, together, norms, strict=True):
        if one.running is not None and other.running is not None and before.running is not None:
            assert torch.equal(one.running.mean, other.running.mean) and torch.equal(one.running.variance, other.running.variance)
            assert not torch.equal(one.running.mean, before.running.mean)

    sums = []
    for number, (parts, channels) in enumerate(sizes):
        affine = Affine(*draw(4, channels, seed=50 + number))
        mask = draw(channels, seed=60 + number).sigmoid() if number % 2 else None
        count = math.inf if number == 2 else 7.0 * parts
        sums.append(Sums(draw(parts, 2, channels, seed=70 + number), count, affine, *draw(2, channels, seed=80 + number), mask))
    for one, found in zip(sums, backward_coefficients_all(sums, backend=backend), strict=True):
        wanted = passes.backward_coefficients(one.partials, one.count, one.affine, one.weight, one.bias, one.mask, backend=backend)
        for a, b in zip(found, wanted, strict=True):
            assert (a is None and b is None) or (torch.equal(a, b) and bool(a.isfinite().all()))


@pytest.mark.parametrize("backend", ["reference", "fused"])
def test_running_statistics_that_do_not_fit_are_refused(backend):
    norm = statistics(2, 4, seed=0, momentum=0.1)
    wrong = replace(norm, running=Running(torch.zeros(3, device=DEVICE), torch.zeros(4, device=DEVICE), 0.1))
    with pytest.raises(ValueError, match="running mean"):
        finalize_all([norm, wrong], EPS, backend=backend)
