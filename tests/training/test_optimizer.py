from __future__ import annotations

import pytest
import torch
from torch import nn

from der_fast.config.schema import ScheduleConfig
from der_fast.model.architecture import build_architecture
from der_fast.model.layout import MaskLayout
from der_fast.model.masks import ChannelMasks
from der_fast.training.optimizer import NamedSGD, _align

CONFIG = ScheduleConfig(lr=0.1, momentum=0.9, weight_decay=0.01)

MASKS = {"masks.logits": 0.5}


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
    optimizer = NamedSGD(modules, CONFIG, MASKS)
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
    optimizer = NamedSGD(modules, CONFIG, MASKS)
    for _ in range(3):
        optimizer.step(loss_of(modules, 0.0))
    assert torch.equal(modules["masks"].logits, before)
    assert not torch.equal(modules["head"].weight, parts()["head"].weight)


def test_frozen_parameters_are_left_out() -> None:
    modules = parts()
    modules["head"].weight.requires_grad_(False)
    assert set(NamedSGD(modules, CONFIG, MASKS).parameters) == {"head.bias", "masks.logits"}


def test_momentum_can_be_written_down_and_taken_over() -> None:
    straight, before = parts(), parts()
    one = NamedSGD(straight, CONFIG, MASKS)
    first = NamedSGD(before, CONFIG, MASKS)
    for optimizer, modules in ((one, straight), (first, before)):
        for slope in (1.0, -3.0):
            optimizer.step(loss_of(modules, slope))
    after = parts()
    for name, module in after.items():
        module.load_state_dict(before[name].state_dict())
    second = NamedSGD(after, CONFIG, MASKS)
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
    optimizer = NamedSGD(modules, CONFIG, MASKS)
    optimizer.step(loss_of(modules, 1.0))
    optimizer.forget(prefixes)
    assert set(optimizer.momentum()) == left


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_on_the_device_it_does_the_same(momentum: float) -> None:
    config = ScheduleConfig(lr=0.125, momentum=momentum, weight_decay=0.25)
    plain, other = parts(), parts()
    usual, on_device = NamedSGD(plain, config, MASKS), NamedSGD(other, config, MASKS, on_device=True)
    for lr in (0.125, 0.125, 0.5, 0.25):
        for optimizer, modules in ((usual, plain), (on_device, other)):
            optimizer.set_lr(lr)
            optimizer.step(loss_of(modules, 1.0))
    for name, module in other.items():
        for key, value in module.state_dict().items():
            torch.testing.assert_close(value, plain[name].state_dict()[key])
    assert set(on_device.momentum()) == set(usual.momentum()) == ({"head.weight", "head.bias"} if momentum else set())
    for name, buffer in usual.momentum().items():
        torch.testing.assert_close(on_device.momentum()[name], buffer)


def test_on_the_device_everything_stays_where_it_is() -> None:
    modules = parts()
    optimizer = NamedSGD(modules, CONFIG, MASKS, on_device=True)

    def places() -> list[int]:
        tensors = [*optimizer.parameters.values(), *optimizer.momentum().values(), optimizer.sgd.param_groups[0]["lr"]]
        return [tensor.data_ptr() for tensor in tensors]

    before = places()
    assert not any(buffer.any() for buffer in optimizer.momentum().values())
    optimizer.step(loss_of(modules, 1.0))
    optimizer.set_lr(0.5)
    earlier = {name: buffer.clone() for name, buffer in optimizer.momentum().items()}
    optimizer.forget(("head.",))
    assert not any(buffer.any() for buffer in optimizer.momentum().values())
    optimizer.restore(earlier)
    assert all(torch.equal(buffer, earlier[name]) for name, buffer in optimizer.momentum().items())
    optimizer.step(loss_of(modules, 1.0))
    assert places() == before
    assert float(optimizer.sgd.param_groups[0]["lr"]) == 0.5


@pytest.mark.parametrize("shape", [(4, 3, 1, 1), (4, 1, 3, 3), (1, 3, 1, 1), (4, 3, 3, 3)])
def test_on_the_device_gradients_get_the_strides_of_their_parameters(shape: tuple[int, ...]) -> None:
    conv = nn.Module()
    conv.weight = nn.Parameter(torch.ones(shape).to(memory_format=torch.channels_last))
    optimizer = NamedSGD({"conv": conv}, CONFIG, on_device=True)
    values = torch.arange(float(conv.weight.numel())).reshape(shape)
    conv.weight.grad = values.contiguous().as_strided(shape, torch.empty(shape).stride())
    _align(conv.weight)
    assert conv.weight.grad.stride() == conv.weight.stride() and torch.equal(conv.weight.grad, values)
    optimizer.step((conv.weight * values).sum())
    assert conv.weight.grad.stride() == conv.weight.stride() == optimizer.momentum()["conv.weight"].stride()
    torch.testing.assert_close(conv.weight.detach(), torch.ones(shape) - 0.1 * (values + 0.01))
