"""SGD whose parameter groups and momentum buffers are addressed by name, so that they can be saved and read back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from der_fast.config.schema import ScheduleConfig


class NamedSGD:
    """SGD with momentum over named modules.

    With `on_device`, the learning rate is a scalar on the device, every momentum buffer exists from the start (as zeros), and all
    parameters move in one launch, so a CUDA graph can hold a step. Momentum can be exchanged between both forms.

    Args:
        modules: the modules by name; frozen parameters are left out.
        config: momentum and weight decay.
        own_lr: parameters with their own learning rate, by name: it is constant over the step, without momentum or weight decay.
        on_device: use the form for a CUDA graph.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        config: ScheduleConfig,
        own_lr: Mapping[str, float] | None = None,
        *,
        on_device: bool = False,
    ) -> None:
        self.parameters = {
            f"{part}.{name}": parameter
            for part, module in modules.items()
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }
        own = {name: rate for name, rate in (own_lr or {}).items() if name in self.parameters}
        weights = [parameter for name, parameter in self.parameters.items() if name not in own]
        self.on_device = on_device
        # The gradient of the loss, which autograd would otherwise make in every batch.
        self._one = torch.ones((), dtype=weights[0].dtype, device=weights[0].device)
        lr = torch.tensor(config.lr, device=weights[0].device) if on_device else config.lr
        groups = [{"params": weights, "lr": lr, "momentum": config.momentum, "weight_decay": config.weight_decay}]
        groups += [{"params": [self.parameters[name]], "lr": rate, "momentum": 0.0, "weight_decay": 0.0} for name, rate in own.items()]
        self.sgd = torch.optim.SGD(groups, lr=config.lr, fused=True if on_device else None)
        if on_device and config.momentum:
            for parameter in weights:
                self.sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of all parameters that do not have their own."""
        group = self.sgd.param_groups[0]
        if self.on_device:
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr

    def step(self, loss: Tensor) -> None:
        """Back-propagate `loss` and update every parameter that it reaches."""
        self.sgd.zero_grad(set_to_none=True)
        loss.backward(self._one)  # type: ignore[no-untyped-call]
        if self.on_device:
            for parameter in self.parameters.values():
                _align(parameter)
        self.sgd.step()

    def momentum(self) -> dict[str, Tensor]:
        """Momentum buffers by parameter name."""
        buffers = {name: self.sgd.state[parameter].get("momentum_buffer") for name, parameter in self.parameters.items()}
        return {name: buffer for name, buffer in buffers.items() if buffer is not None}

    def restore(self, momentum: Mapping[str, Tensor]) -> None:
        """Restore momentum buffers."""
        for name, buffer in momentum.items():
            if self.on_device:
                self.sgd.state[self.parameters[name]]["momentum_buffer"].copy_(buffer)
            else:
                self.sgd.state[self.parameters[name]]["momentum_buffer"] = buffer.clone()

    def forget(self, prefixes: tuple[str, ...]) -> None:
        """Drop the momentum of parameters whose name starts with one of `prefixes` (because they were initialised again)."""
        for name, parameter in self.parameters.items():
            if not name.startswith(prefixes):
                continue
            if not self.on_device:
                self.sgd.state[parameter].pop("momentum_buffer", None)
            elif "momentum_buffer" in self.sgd.state[parameter]:
                self.sgd.state[parameter]["momentum_buffer"].zero_()


def _align(parameter: Tensor) -> None:
    """Give a gradient its parameter's strides, which one launch for all of them requires; they may differ in dimensions of length 1."""
    gradient = parameter.grad
    if gradient is not None and gradient.stride() != parameter.stride():
        parameter.grad = torch.empty_like(parameter).copy_(gradient)
