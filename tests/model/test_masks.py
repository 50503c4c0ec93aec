"""The learnable masks of an extractor."""

from __future__ import annotations

import pytest
import torch

from der_fast.kernels.channel_masks import channel_masks, sparsity_loss
from der_fast.model.architecture import build_architecture
from der_fast.model.layout import MaskLayout
from der_fast.model.masks import ChannelMasks

LAYOUT = MaskLayout(build_architecture("resnet18", width=16))


def new(seed=0, low=0.0, high=2.0, clamp=6.0):
    return ChannelMasks(LAYOUT, low=low, high=high, clamp=clamp, generator=torch.Generator().manual_seed(seed))


def test_one_flat_parameter_and_nothing_else_is_saved():
    masks = new()
    assert [(name, tuple(p.shape), p.dtype) for name, p in masks.named_parameters()] == [("logits", (LAYOUT.channels,), torch.float32)]
    assert set(masks.state_dict()) == {"logits"}


def test_logits_start_uniformly_between_the_bounds():
    logits = new(low=-0.5, high=1.5).logits.detach().sort().values
    assert float(logits[0]) >= -0.5 and float(logits[-1]) <= 1.5
    # The largest gap between the drawn and the uniform distribution (Kolmogorov–Smirnov, chance below 1e-6).
    expected = torch.linspace(-0.5, 1.5, len(logits))
    assert float((logits - expected).abs().max()) / 2 < 2.7 / len(logits) ** 0.5


def test_equal_bounds_start_all_logits_alike():
    assert bool((new(low=0.25, high=0.25).logits == 0.25).all())


def test_logits_start_within_the_clamp():
    logits = new(low=-9, high=9, clamp=3).logits.detach()
    assert float(logits.min()) == -3 and float(logits.max()) == 3


def test_initial_logits_come_from_the_generator_alone():
    torch.manual_seed(1)
    first = new(seed=3).logits
    torch.manual_seed(2)
    assert torch.equal(new(seed=3).logits, first)
    assert not torch.equal(new(seed=4).logits, first)


def test_clamp_after_a_step():
    masks = new(clamp=6.0)
    with torch.no_grad():
        masks.logits.copy_(torch.linspace(-20, 20, LAYOUT.channels))
    inside = masks.logits.detach().abs() <= 6
    before = masks.logits.detach().clone()
    masks.clamp_logits()
    assert torch.equal(masks.logits[inside], before[inside])
    assert torch.equal(masks.logits[~inside], 6 * before[~inside].sign())
    assert masks.logits.requires_grad


def test_kept_are_the_channels_whose_final_mask_is_above_one_half():
    masks = new(low=-2)
    with torch.no_grad():
        masks.logits[:3] = torch.tensor([0.0, 1e-6, -1e-6])
    keep = masks.keep()
    assert keep.dtype == torch.bool and not keep.requires_grad
    assert keep[:3].tolist() == [False, True, False]
    for scale in (1.0, 100.0):
        assert torch.equal(keep[3:], masks.with_sparsity(scale)[0][3:] > 0.5)


@pytest.mark.parametrize("scale", [0.01, torch.tensor(100.0)])
def test_masks_and_sparsity_together_are_the_two_apart(scale):
    apart, together = new(low=-2), new(low=-2)
    soft = channel_masks(apart.logits, scale)
    sparsity = sparsity_loss(soft, **LAYOUT.sparsity_terms())
    (soft.square().sum() + 0.3 * sparsity).backward()
    masks, loss = together.with_sparsity(scale)
    (masks.square().sum() + 0.3 * loss).backward()
    assert torch.equal(masks, soft) and torch.equal(loss, sparsity)
    assert torch.equal(together.logits.grad, apart.logits.grad)


@pytest.mark.parametrize("backbone", ["resnet18", "resnet20", "resnet50", "preact_resnet18"])
def test_the_native_backend_agrees_for_every_kind_of_network(backbone):
    layout = MaskLayout(build_architecture(backbone, width=16))
    masks = ChannelMasks(layout, low=-2, high=2, clamp=6, generator=torch.Generator().manual_seed(1)).double()
    found = []
    for backend in ("reference", "native"):
        soft, loss = masks.with_sparsity(3.0, backend=backend)
        (gradient,) = torch.autograd.grad(soft.square().sum() + 50 * loss, masks.logits)
        found.append((soft.detach(), loss.detach(), gradient))
    for reference, native in zip(*found, strict=True):
        torch.testing.assert_close(native, reference, rtol=1e-12, atol=1e-14)


def test_sparsity_alone_drives_every_logit_down():
    masks = new(low=-2)
    masks.with_sparsity(100.0)[1].backward()
    assert bool((masks.logits.grad > 0).all())


def test_masks_move_to_another_precision_as_one():
    masks = new().double()
    assert masks.with_sparsity(1.0)[1].dtype == torch.float64
