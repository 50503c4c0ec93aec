"""The sums of several weight gradients' parts in one launch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from der_fast.kernels.conv import Parts, add_parts, conv_wgrad

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def drawn(elements: int, split: int, seed: int) -> Parts:
    values = torch.randn(split, elements, generator=torch.Generator().manual_seed(seed)) * 10.0 ** (seed % 3)
    return Parts(values.to(DEVICE), torch.full((elements,), torch.nan, device=DEVICE))


def one_by_one(parts: Tensor) -> Tensor:
    total = torch.zeros_like(parts[0])
    for part in parts:
        total += part
    return total


@pytest.mark.parametrize(
    "sizes",
    [
        [(27, 2)],
        [(1, 9), (256, 8)],
        [(300, 17), (1, 1), (257, 3)],
        [(512, 7), (5, 16), (255, 2), (130, 33)],
        # Two launches.
        [(10 + index, 2 + index) for index in range(9)],
    ],
    ids=["one", "two", "three", "four", "nine"],
)
def test_every_sum_is_the_one_in_the_order_of_its_parts(sizes):
    pending = [drawn(elements, split, seed) for seed, (elements, split) in enumerate(sizes)]
    guards = [one.parts.clone() for one in pending]
    add_parts(pending)
    for one, before in zip(pending, guards, strict=True):
        assert torch.equal(one.out, one_by_one(before))
        truth, eager = before.double().sum(0), before.sum(0)
        error, allowed = (one.out - truth).abs().max(), 2 * (eager - truth).abs().max()
        assert error <= max(float(allowed), float(4 * torch.finfo(torch.float32).eps * before.abs().sum(0).max()))
        assert torch.equal(one.parts, before)


def test_nothing_pending_launches_nothing():
    add_parts([])


@pytest.mark.parametrize("split", [1, 3])
def test_a_pending_gradient_is_the_one_that_is_added_at_once(split):
    generator = torch.Generator().manual_seed(0)
    x, g = (
        torch.randn(2, channels, 5, 4, generator=generator).to(DEVICE).contiguous(memory_format=torch.channels_last) for channels in (3, 6)
    )
    at_once = conv_wgrad(x, g, 3, stride=1, split=split, backend="fused")
    pending: list[Parts] = []
    later = conv_wgrad(x, g, 3, stride=1, split=split, pending=pending, backend="fused")
    assert len(pending) == (split > 1)
    add_parts(pending)
    assert torch.equal(later, at_once)
    nothing: list[Parts] = []
    torch.testing.assert_close(conv_wgrad(x, g, 3, stride=1, pending=nothing), at_once)
    assert not nothing
