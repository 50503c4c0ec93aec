"""`masks_and_sparsity` on every backend against the reference in double precision."""

from __future__ import annotations

import math
import runpy
from decimal import Decimal
from pathlib import Path

import pytest
import torch

from der_fast import native
from der_fast.kernels.channel_masks import channel_masks, masks_and_sparsity, sparsity_loss

NETWORKS = runpy.run_path(str(Path(__file__).with_name("mask_structures.py")))
STRUCTURES, structure_of, poisoned = (NETWORKS[name] for name in ("STRUCTURES", "structure_of", "poisoned"))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SNAP = 2.0**-24
# Of a mask in single precision, whose largest value is one.
FLOOR = 2.0**-22


def native_device() -> str:
    return DEVICE if DEVICE == "cpu" or native.build_info()["cuda"] else "cpu"


@pytest.fixture(params=["reference", "fused", "native"])
def backend(request):
    return request.param


def device_of(backend):
    return native_device() if backend == "native" else DEVICE


def draw(name, scale, seed=0):
    """Logits between which the scaled sigmoid is small, medium, large and saturated; and a gradient."""
    generator = torch.Generator().manual_seed(seed)
    channels = structure_of(name).channels
    logits = torch.randn(channels, generator=generator, dtype=torch.float64) * 10 / scale
    return logits.float().double(), torch.randn(channels, generator=generator, dtype=torch.float64).float().double()


def results(backend, name, logits, scale, dtype, upstream=None, weight=None):
    """Return masks, loss and the gradient of Σ upstream·m + weight·L_S, on the CPU."""
    device = device_of(backend)
    leaf = logits.to(device, dtype).requires_grad_()
    masks, loss = masks_and_sparsity(leaf, scale, structure_of(name, device), backend=backend)
    assert masks.dtype == loss.dtype == dtype and masks.shape == leaf.shape and loss.shape == ()
    total = torch.zeros((), dtype=dtype, device=device)
    if upstream is not None:
        total = total + (masks * upstream.to(device, dtype)).sum()
    if weight is not None:
        total = total + weight * loss
    (gradient,) = torch.autograd.grad(total, leaf) if upstream is not None or weight is not None else (leaf.detach(),)
    return masks.detach().cpu(), loss.detach().cpu(), gradient.cpu()


def truth(name, logits, scale, upstream=None, weight=None):
    leaf = logits.clone().requires_grad_()
    structure = structure_of(name)
    masks = channel_masks(leaf, scale)
    loss = sparsity_loss(masks, **structure.terms(torch.float64))
    total = (masks * upstream).sum() if upstream is not None else 0.0
    (gradient,) = torch.autograd.grad(total + (weight or 0.0) * loss, leaf)
    return masks.detach(), loss.detach(), gradient


def slope(x):
    """σ(x)[1 − σ(x)], correctly rounded: in decimals, which do not underflow."""
    power = (-abs(Decimal(x))).exp()
    return float(power / (1 + power) ** 2)


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_double_precision_is_the_reference(backend, name, scale):
    logits, upstream = draw(name, scale)
    for parts in ((upstream, None), (None, 0.7), (upstream, 0.7)):
        masks, loss, gradient = results(backend, name, logits, scale, torch.float64, *parts)
        exact = truth(name, logits, scale, *parts)
        torch.testing.assert_close(masks, exact[0], rtol=1e-14, atol=0)
        torch.testing.assert_close(loss, exact[1], rtol=1e-12, atol=0)
        torch.testing.assert_close(gradient, exact[2], rtol=1e-12, atol=1e-15 * float(exact[2].abs().max()))


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_single_precision_is_no_worse_than_eager(backend, name, scale):
    logits, upstream = draw(name, scale, seed=1)
    # The product in single precision is part of the definition: at s = 100 its rounding moves a mask by more than anything else.
    scaled = (logits.float() * torch.tensor(scale)).double()
    exact_masks = torch.where(torch.sigmoid(scaled) < SNAP, torch.zeros_like(scaled), torch.sigmoid(scaled))
    masks, loss, gradient = results(backend, name, logits, scale, torch.float32, upstream, 0.7)
    eager = results("reference", name, logits, scale, torch.float32, upstream, 0.7)
    safe = (scaled.sigmoid() / SNAP - 1).abs() > 1e-5
    error, allowed = ((found[safe] - exact_masks[safe]).abs().max() for found in (masks, eager[0]))
    assert float(error) <= max(2 * float(allowed), FLOOR)
    assert bool(((masks == 0) | (masks >= SNAP)).all())
    exact_loss = sparsity_loss(exact_masks, **structure_of(name).terms(torch.float64))
    assert float((loss - exact_loss).abs()) <= max(2 * float((eager[1] - exact_loss).abs()), FLOOR * float(exact_loss))
    exact = truth(name, logits, scale, upstream, 0.7)[2]
    size = float((upstream.abs().max() + 0.7) / 4)
    assert float((gradient - exact).abs().max()) <= max(2 * float((eager[2] - exact).abs().max()), FLOOR * size)


@pytest.mark.parametrize(("scale", "size"), [(1000.0, 1.0), (100.0, 10.0), (400.0, 2.5), (1.0, 1000.0)])
def test_exact_in_double_precision_where_the_sigmoid_saturates(backend, scale, size):
    channels = structure_of("odd").channels
    signs = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0] * 5, dtype=torch.float64)[:channels]
    upstream = torch.linspace(-7, 3, channels, dtype=torch.float64)
    masks, loss, task = results(backend, "odd", signs * size, scale, torch.float64, upstream)
    assert masks.tolist() == (signs > 0).double().tolist()
    assert task.tolist() == pytest.approx((upstream * slope(size)).tolist(), rel=1e-15, abs=0)
    full, leaf = truth("odd", signs * size, scale)[1], masks.clone().requires_grad_()
    (at_masks,) = torch.autograd.grad(sparsity_loss(leaf, **structure_of("odd").terms(torch.float64)), leaf)
    assert float(loss) == pytest.approx(float(full), rel=1e-14)
    sparsity = results(backend, "odd", signs * size, scale, torch.float64, None, 1.0)[2]
    assert sparsity.tolist() == pytest.approx((at_masks * slope(size)).tolist(), rel=1e-14, abs=0)


def test_the_loss_spans_zero_to_one_and_half_way_masks_are_exact(backend):
    for name in STRUCTURES:
        zeros = torch.zeros(structure_of(name).channels)
        assert float(results(backend, name, zeros + 5, 100.0, torch.float32)[1]) == 1.0
        assert float(results(backend, name, zeros - 5, 100.0, torch.float32)[1]) == 0.0
        assert torch.equal(results(backend, name, zeros, 100.0, torch.float32)[0], zeros + 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scale_is_a_number_or_a_tensor_that_is_read_when_the_masks_are_made(backend, dtype):
    device = device_of(backend)
    structure = structure_of("odd", device)
    logits = draw("odd", 7.5)[0].to(device, dtype)
    scale = torch.tensor([7.5], dtype=torch.float32, device=device)
    first = masks_and_sparsity(logits, scale, structure, backend=backend)
    by_number = masks_and_sparsity(logits, 7.5, structure, backend=backend)
    assert torch.equal(first[0], by_number[0]) and torch.equal(first[1], by_number[1])
    scale.fill_(50.0)
    again = masks_and_sparsity(logits, scale, structure, backend=backend)
    assert torch.equal(again[0], masks_and_sparsity(logits, 50.0, structure, backend=backend)[0])
    assert not torch.equal(again[0], first[0])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_a_finite_number_stays_in_its_channel_and_in_the_loss(backend, value):
    logits = torch.full((structure_of("odd").channels,), 0.5)
    logits[3] = value
    masks, loss, gradient = results(backend, "odd", logits, 10.0, torch.float32, torch.ones_like(logits))
    expected = {math.inf: 1.0, -math.inf: 0.0}
    others = [c for c in range(len(logits)) if c != 3]
    assert bool(masks[others].isfinite().all()) and bool(gradient[others].isfinite().all())
    if math.isnan(value):
        assert bool(masks[3].isnan()) and bool(loss.isnan()) and bool(gradient[3].isnan())
    else:
        assert float(masks[3]) == expected[value] and float(gradient[3]) == 0.0 and bool(loss.isfinite())


def test_gradients_that_autograd_hands_over_without_memory_of_their_own(backend):
    # The gradient of a sum is one number that every channel shares.
    logits, _ = draw("rows", 1.0)
    device = device_of(backend)
    leaf = logits.to(device).requires_grad_()
    masks, loss = masks_and_sparsity(leaf, 1.0, structure_of("rows", device), backend=backend)
    masks.sum().backward(retain_graph=True)
    torch.testing.assert_close(leaf.grad.cpu(), torch.sigmoid(logits) * torch.sigmoid(-logits), rtol=1e-13, atol=0)
    leaf.grad = None
    loss.backward()
    assert bool((leaf.grad[:-5] > 0).all())
    assert bool((leaf.grad[-5:] == 0).all()), "no convolution uses the last channels"


def test_reference_is_made_of_the_two_functions():
    logits, upstream = draw("odd", 3.0)
    structure = structure_of("odd")
    masks, loss, gradient = results("reference", "odd", logits, 3.0, torch.float32, upstream, 0.3)
    leaf = logits.float().requires_grad_()
    own = channel_masks(leaf, 3.0)
    own_loss = sparsity_loss(own, **structure.terms(torch.float32))
    ((own * upstream.float()).sum() + 0.3 * own_loss).backward()
    assert torch.equal(own, masks) and torch.equal(own_loss, loss) and torch.equal(leaf.grad, gradient)
