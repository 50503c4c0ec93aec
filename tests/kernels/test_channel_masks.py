"""`channel_masks` and `sparsity_loss` against Python floats, finite differences and the printed formulas."""

from __future__ import annotations

import math
from decimal import Decimal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from der_fast.kernels.channel_masks import channel_masks, sparsity_loss

few = settings(max_examples=100, deadline=None, derandomize=True)
SNAP = 2.0**-24


def sigmoid(x):
    """σ(x) in Python floats, without overflow."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def slope(x):
    """σ(x)[1 − σ(x)], correctly rounded: e⁻ˣ / (1 + e⁻ˣ)² in decimals, which do not underflow."""
    power = (-abs(Decimal(x))).exp()
    return float(power / (1 + power) ** 2)


def doubles(values):
    return torch.tensor(values, dtype=torch.float64)


def gradient_of(loss, logits, scale):
    """Return what autograd delivers at the logits."""
    logits = logits.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(channel_masks(logits, scale)), logits)
    return gradient


def smooth_loss(masks):
    """Any smooth function in which every mask has a slope of its own and masks act on each other."""
    weights = torch.linspace(-1.5, 2.0, len(masks), dtype=masks.dtype)
    return (torch.sin(weights * masks) + weights * masks**2).sum() + torch.exp(0.3 * masks.sum() / len(masks))


finite = st.floats(-6, 6, allow_nan=False)
scales = st.floats(0.01, 400)


@few
@given(logits=st.lists(finite, min_size=1, max_size=20), scale=scales)
def test_forward_is_the_sigmoid_and_tiny_masks_are_exactly_zero(logits, scale):
    masks = channel_masks(doubles(logits), scale).tolist()
    for logit, mask in zip(logits, masks, strict=True):
        expected = sigmoid(scale * logit)
        if abs(expected - SNAP) > 1e-12 * SNAP:
            assert mask == pytest.approx(expected, rel=1e-13) if expected >= SNAP else mask == 0.0


def test_snap_begins_just_below_two_to_the_minus_24():
    edge = math.log(SNAP / (1 - SNAP))
    logits = doubles([edge + 1e-9, edge - 1e-9, -95.0, 0.0, 50.0])
    masks = channel_masks(logits, 1.0).tolist()
    assert masks[0] == pytest.approx(SNAP, rel=1e-8)
    assert masks[1:] == [0.0, 0.0, 0.5, 1.0]


def test_no_mask_in_single_precision_is_denormal():
    masks = channel_masks(torch.linspace(-6, 6, 10_001), 100.0)
    assert masks.dtype == torch.float32
    assert bool(((masks == 0) | (masks >= SNAP)).all())
    assert int((masks == 0).sum()) > 4000


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scale_may_be_a_number_or_a_tensor(dtype):
    logits = torch.linspace(-2, 2, 9, dtype=dtype)
    upstream = torch.linspace(-1, 3, 9, dtype=dtype)
    by_number, by_tensor = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    expected = channel_masks(by_number, 7.5)
    result = channel_masks(by_tensor, torch.tensor(7.5))
    assert result.dtype == dtype
    assert torch.equal(result, expected)
    expected.backward(upstream)
    result.backward(upstream)
    assert torch.equal(by_tensor.grad, by_number.grad)


def test_scale_is_read_when_the_masks_are_made():
    # A captured CUDA graph replays with whatever number the tensor holds by then.
    scale, logits = torch.tensor(1.0), torch.tensor([0.3, -0.2])
    first = channel_masks(logits, scale)
    scale.fill_(50.0)
    assert torch.equal(channel_masks(logits, scale), channel_masks(logits, 50.0))
    assert torch.equal(first, channel_masks(logits, 1.0))


@few
@given(
    pairs=st.lists(st.tuples(st.floats(-30, 30), st.floats(-1e3, 1e3).filter(lambda g: abs(g) > 1e-6)), min_size=1, max_size=20),
    scale=scales,
)
def test_gradient_is_the_closed_form_whatever_the_scale(pairs, scale):
    logits, upstream = doubles([e for e, _ in pairs]), doubles([g for _, g in pairs])
    gradient = gradient_of(lambda masks: (masks * upstream).sum(), logits, scale).tolist()
    for (logit, arriving), value in zip(pairs, gradient, strict=True):
        assert value == pytest.approx(arriving * slope(logit), rel=1e-15, abs=0)


@pytest.mark.parametrize(("scale", "size"), [(1000.0, 1.0), (100.0, 10.0), (400.0, 2.5), (1.0, 1000.0)])
def test_gradient_is_exact_where_the_printed_form_is_zero_by_zero(scale, size):
    logits, upstream = doubles([size, -size]), doubles([3.0, -7.0])
    saturated = torch.sigmoid(scale * logits)
    printed = slope(size) / (scale * saturated * (1 - saturated)) * (upstream * scale * saturated * (1 - saturated))
    assert not bool(torch.isfinite(printed).all())
    gradient = gradient_of(lambda masks: (masks * upstream).sum(), logits, scale).tolist()
    assert gradient == pytest.approx([3 * slope(size), -7 * slope(size)], rel=1e-15, abs=0)


@few
@given(logits=st.lists(st.floats(-2, 2), min_size=1, max_size=8), scale=st.floats(0.05, 4))
def test_gradient_is_the_printed_quotient_times_finite_differences(logits, scale):
    point, step = doubles(logits), 1e-5
    gradient = gradient_of(smooth_loss, point, scale)
    for c, logit in enumerate(logits):
        offset = torch.zeros_like(point)
        offset[c] = step
        up, down = (float(smooth_loss(torch.sigmoid(scale * (point + sign * offset)))) for sign in (1, -1))
        quotient = slope(logit) / (scale * slope(scale * logit))
        assert float(gradient[c]) == pytest.approx(quotient * (up - down) / (2 * step), rel=1e-6, abs=1e-7)


def test_a_snapped_mask_can_come_back():
    logits = doubles([-4.0])
    assert channel_masks(logits, 100.0).item() == 0.0
    assert gradient_of(lambda masks: -masks.sum(), logits, 100.0).item() == pytest.approx(-slope(4.0), rel=1e-15)


# Four groups of 2, 3, 1 and 4 channels; an image convolution, one that reads two groups, one that writes two.
SIZES = (2, 3, 1, 4)
CONVS = (  # kernel, groups read (none: the image), groups written
    (3, (), (0,)),
    (3, (0,), (1,)),
    (1, (0, 1), (2,)),
    (3, (2,), (0, 3)),
    (5, (3,), (1,)),
)


def terms(dtype=torch.float64):
    channels = sum(SIZES)
    membership, start = torch.zeros(len(SIZES), channels, dtype=dtype), 0
    for row, size in enumerate(SIZES):
        membership[row, start : start + size] = 1
        start += size
    return {
        "membership": membership,
        "reads": torch.tensor([[float(g in read) for g in range(4)] for _, read, _ in CONVS], dtype=dtype),
        "writes": torch.tensor([[float(g in written) for g in range(4)] for _, _, written in CONVS], dtype=dtype),
        "image": torch.tensor([0.0 if read else 3.0 for _, read, _ in CONVS], dtype=dtype),
        "area": torch.tensor([float(kernel**2) for kernel, _, _ in CONVS], dtype=dtype),
    }


def group_sums(masks):
    starts = [sum(SIZES[:g]) for g in range(len(SIZES))]
    return [sum(masks[start : start + size]) for start, size in zip(starts, SIZES, strict=True)]


def looped(masks):
    """The sparsity loss as printed: a loop over convolutions, in Python floats."""
    sums, soft, full = group_sums(masks), 0.0, 0.0
    for kernel, read, written in CONVS:
        soft += kernel**2 * (sum(sums[g] for g in read) if read else 3) * sum(sums[g] for g in written)
        full += kernel**2 * (sum(SIZES[g] for g in read) if read else 3) * sum(SIZES[g] for g in written)
    return soft / full


def by_group(masks):
    """∂L_S/∂m of every group in closed form: what a group's convolutions have on their other side."""
    sums, full = group_sums(masks), 0.0
    slopes = [0.0] * len(SIZES)
    for kernel, read, written in CONVS:
        inputs, outputs = (sum(sums[g] for g in read) if read else 3), sum(sums[g] for g in written)
        for g in read:
            slopes[g] += kernel**2 * outputs
        for g in written:
            slopes[g] += kernel**2 * inputs
        full += kernel**2 * (sum(SIZES[g] for g in read) if read else 3) * sum(SIZES[g] for g in written)
    return [value / full for value in slopes]


mask_vectors = st.lists(st.floats(0, 1), min_size=sum(SIZES), max_size=sum(SIZES))


@few
@given(masks=mask_vectors)
def test_sparsity_loss_is_the_loop_over_convolutions(masks):
    loss = sparsity_loss(doubles(masks), **terms())
    assert loss.shape == ()
    assert loss.item() == pytest.approx(looped(masks), rel=1e-13, abs=1e-15)


def test_sparsity_loss_spans_zero_to_one():
    assert sparsity_loss(torch.ones(sum(SIZES)), **terms(torch.float32)).item() == 1.0
    assert sparsity_loss(torch.zeros(sum(SIZES)), **terms(torch.float32)).item() == 0.0


@few
@given(masks=mask_vectors)
def test_sparsity_gradient_at_the_masks(masks):
    point = doubles(masks).requires_grad_()
    (gradient,) = torch.autograd.grad(sparsity_loss(point, **terms()), point)
    expected, step = by_group(masks), 1e-3
    for c in range(len(masks)):
        # The loss is at most quadratic in one mask, so central differences have no truncation error.
        up, down = ([*masks[:c], masks[c] + sign * step, *masks[c + 1 :]] for sign in (1, -1))
        assert gradient[c].item() == pytest.approx((looped(up) - looped(down)) / (2 * step), rel=1e-9, abs=1e-11)
    for group, part in enumerate(gradient.split(SIZES)):
        assert bool((part == part[0]).all())
        assert part[0].item() == pytest.approx(expected[group], rel=1e-13, abs=1e-15)


@few
@given(logits=st.lists(finite, min_size=sum(SIZES), max_size=sum(SIZES)), scale=scales)
def test_sparsity_gradient_at_the_logits_is_compensated(logits, scale):
    gradient = gradient_of(lambda masks: sparsity_loss(masks, **terms()), doubles(logits), scale).split(SIZES)
    expected = by_group(channel_masks(doubles(logits), scale).tolist())
    for part, own, group in zip(gradient, doubles(logits).split(SIZES), expected, strict=True):
        for value, logit in zip(part.tolist(), own.tolist(), strict=True):
            assert value == pytest.approx(group * slope(logit), rel=1e-13, abs=1e-300)


@pytest.mark.parametrize("scale", [100.0, 1000.0])
def test_sparsity_gradient_is_exact_where_the_sigmoid_saturates(scale):
    signs = [1, -1, 1, 1, -1, 1, 1, -1, -1, 1]
    logits = doubles([1000.0 / scale * sign for sign in signs])
    masks = [float(sign > 0) for sign in signs]
    assert channel_masks(logits, scale).tolist() == masks
    gradient = gradient_of(lambda m: sparsity_loss(m, **terms()), logits, scale).split(SIZES)
    for part, group in zip(gradient, by_group(masks), strict=True):
        assert part.tolist() == pytest.approx([group * slope(1000.0 / scale)] * len(part), rel=1e-14, abs=0)


@few
@given(logits=st.lists(finite, min_size=sum(SIZES), max_size=sum(SIZES)), scale=scales, weight=st.floats(0, 10))
def test_both_losses_together_give_the_sum_of_their_gradients(logits, scale, weight):
    point = doubles(logits)
    task = gradient_of(smooth_loss, point, scale)
    sparsity = gradient_of(lambda masks: sparsity_loss(masks, **terms()), point, scale)
    both = gradient_of(lambda masks: smooth_loss(masks) + weight * sparsity_loss(masks, **terms()), point, scale)
    torch.testing.assert_close(both, task + weight * sparsity, rtol=1e-12, atol=1e-15)
