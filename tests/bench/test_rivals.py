"""The networks that ours are compared with compute what ours compute."""

from __future__ import annotations

import pytest
import torch

from bench.subjects.networks import SharedNetworks
from bench.subjects.plain import PlainFeatures
from bench.subjects.rivals import MaskedNet, Masks, sparsity, take
from bench.subjects.steps import Task
from der_fast.model.architecture import build_architecture
from der_fast.model.extractor import Extractor
from der_fast.model.layout import MaskLayout
from der_fast.model.masks import ChannelMasks


def test_the_masked_network_is_the_extractor():
    net = build_architecture("resnet18", width=4)
    draw = torch.Generator().manual_seed(0)
    extractor = Extractor(net).initialise(draw).double()
    rival = MaskedNet(net).double()
    take(rival, extractor.state_dict())
    layout = MaskLayout(net)
    masks = torch.rand(layout.channels, generator=draw, dtype=torch.float64)
    images = torch.randn(3, 3, 16, 16, generator=draw, dtype=torch.float64)
    by_group = {name.replace(".", "_"): part for name, part in layout.by_group(masks).items()}
    torch.testing.assert_close(rival(images, by_group), extractor(images, masks))


def test_masks_compensation_and_sparsity_agree_with_the_closed_form():
    net, scale = build_architecture("resnet18", width=4), 5.0
    layout = MaskLayout(net)
    flat = ChannelMasks(layout, low=0.0, high=2.0, clamp=6.0, generator=torch.Generator().manual_seed(0)).double()
    single = Masks(net, torch.Generator().manual_seed(0)).double()
    for logits, start in zip(single.values(), layout.by_group(flat.logits.detach()).values(), strict=True):
        logits.data.copy_(start)
    weights = torch.randn(layout.channels, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (masks, loss), parts = flat.with_sparsity(scale), single.soft(scale)
    torch.testing.assert_close(torch.cat(list(parts.values())), masks)
    other = sparsity(net, parts)
    torch.testing.assert_close(other, loss)
    ((masks * weights).sum() + loss).backward()
    ((torch.cat(list(parts.values())) * weights).sum() + other).backward()
    single.compensate(scale)
    assert flat.logits.grad is not None
    torch.testing.assert_close(torch.cat([logits.grad for logits in single.values()]), flat.logits.grad)


def test_full_and_compact_frozen_networks_give_the_same_features(setting):
    networks = SharedNetworks(setting)
    images = networks.images(3, torch.Generator().manual_seed(0))
    full, compact = networks.full(1)(images), networks.compact(1, torch.float32)(images)
    kept = networks.plan(1).features
    torch.testing.assert_close(full[:, kept], compact, rtol=1e-4, atol=1e-5)
    assert full[:, ~kept].abs().max() == 0 and compact.std() > 0.1
    assert 0.05 < networks.plan(1).parameters / networks.architecture.parameters() < 0.15


def test_networks_of_other_shapes_are_refused():
    other = Extractor(build_architecture("resnet18", width=8))
    with pytest.raises(ValueError, match="different shapes"):
        take(PlainFeatures(build_architecture("resnet18", width=4)), other.state_dict())


@pytest.mark.parametrize("backend", ["reference", "fused"])
def test_ours_trains_with_the_backend_that_is_asked_for(setting, backend):
    task = Task(SharedNetworks(setting), 1, 2, 1)
    assert task.stage(task.inputs(torch.Generator().manual_seed(0)), "fp32", backend).context.backend.name == backend
