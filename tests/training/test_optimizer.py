from __future__ import annotations

import pytest
import torch
from torch import nn

from der_fast.config.schema import ScheduleConfig
from der_fast.model.architecture import build_architecture
from der_fast.model.layout import MaskLayout
from der_fast.model.masks import ChannelMasks
from der_fast.training.optimizer import NamedSGD

CONFIG = ScheduleConfig(lr=0.1, momentum=0.9, weight_decay=0.01)


def parts() -> dict[str, nn.Module]:
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(3, 2)
    for parameter in head.parameters():
        nn.init.uniform_(parameter, generator=generator)
    layout = MaskLayout(build_architecture("resnet20", width=1))
    return {"head": head, "masks": ChannelMasks(layout, low=0.5, high=1.0, clamp=6.0, generator=generator)}


def loss_of(modules: dict[str, nn.Module], slope: float) -> torch.Tensor:
    """A loss whose gradient is `slope` everywhere."""
    return slope * sum(parameter.sum() for module in modules.values() for parameter in module.parameters())


def test_weights_have_momentum_and_decay_and_mask_logits_have_neither() -> None:
    modules = parts()
    head, logits = modules["head"], modules["masks"].logits
    optimizer = NamedSGD(modules, CONFIG, mask_lr=0.5)
    optimizer.set_lr(0.2)
    weight, start = head.weight.detach().clone(), logits.detach().clone()
    velocity = torch.zeros_like(weight)
    for number in range(1, 4):
        velocity = 0.9 * velocity + 1.0 + 0.01 * weight
        weight = weight - 0.2 * velocity
        optimizer.step(loss_of(modules, 1.0))
        assert torch.allclose(head.weight, weight, atol=1e-6)
        assert torch.allclose(logits, start - 0.5 * number, atol=1e-6)


def test_no_gradient_leaves_mask_logits_alone() -> None:
    modules = parts()
    before = modules["masks"].logits.detach().clone()
    optimizer = NamedSGD(modules, CONFIG, mask_lr=0.5)
    for _ in range(3):
        optimizer.step(loss_of(modules, 0.0))
    assert torch.equal(modules["masks"].logits, before)
    assert not torch.equal(modules["head"].weight, parts()["head"].weight)


def test_frozen_parameters_are_left_out() -> None:
    modules = parts()
    modules["head"].weight.requires_grad_(False)
    assert set(NamedSGD(modules, CONFIG, 0.5).parameters) == {"head.bias", "masks.logits"}


def test_momentum_can_be_written_down_and_taken_over() -> None:
    straight, before = parts(), parts()
    one = NamedSGD(straight, CONFIG, 0.5)
    first = NamedSGD(before, CONFIG, 0.5)
    for optimizer, modules in ((one, straight), (first, before)):
        for slope in (1.0, -3.0):
            optimizer.step(loss_of(modules, slope))
    after = parts()
    for name, module in after.items():
        module.load_state_dict(before[name].state_dict())
    second = NamedSGD(after, CONFIG, 0.5)
    second.restore(first.momentum())
    assert set(first.momentum()) == {"head.weight", "head.bias"}
    for optimizer, modules in ((one, straight), (second, after)):
        for slope in (0.5, 2.0):
            optimizer.step(loss_of(modules, slope))
    for name, module in after.items():
        assert all(torch.equal(value, straight[name].state_dict()[key]) for key, value in module.state_dict().items())


@pytest.mark.parametrize(
    ("prefixes", "left"), [(("head.",), set()), (("masks.",), {"head.weight", "head.bias"}), (("head.b",), {"head.weight"})]
)
def test_forgetting(prefixes: tuple[str, ...], left: set[str]) -> None:
    modules = parts()
    optimizer = NamedSGD(modules, CONFIG, 0.5)
    optimizer.step(loss_of(modules, 1.0))
    optimizer.forget(prefixes)
    assert set(optimizer.momentum()) == left
