"""SGD whose parameter groups and momentum buffers are addressed by name, so that they can be written down and read back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from der_fast.config.schema import ScheduleConfig

MASK_LOGITS = "masks.logits"


class NamedSGD:
    """SGD with momentum over named modules; mask logits get a learning rate of their own, no momentum and no weight decay.

    Args:
        modules: the modules by name; frozen parameters are left out.
        config: momentum and weight decay.
        mask_lr: learning rate of the mask logits, constant over the step.
    """

    def __init__(self, modules: Mapping[str, nn.Module], config: ScheduleConfig, mask_lr: float = 0.0) -> None:
        self.parameters = {
            f"{part}.{name}": parameter
            for part, module in modules.items()
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }
        weights = [parameter for name, parameter in self.parameters.items() if name != MASK_LOGITS]
        groups = [{"params": weights, "lr": config.lr, "momentum": config.momentum, "weight_decay": config.weight_decay}]
        if MASK_LOGITS in self.parameters:
            groups.append({"params": [self.parameters[MASK_LOGITS]], "lr": mask_lr, "momentum": 0.0, "weight_decay": 0.0})
        self.sgd = torch.optim.SGD(groups, lr=config.lr)

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of everything but the mask logits."""
        self.sgd.param_groups[0]["lr"] = lr

    def step(self, loss: Tensor) -> None:
        """Back-propagate `loss` and update every parameter that it reaches."""
        self.sgd.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.sgd.step()

    def momentum(self) -> dict[str, Tensor]:
        """Momentum buffers by parameter name."""
        buffers = {name: self.sgd.state[parameter].get("momentum_buffer") for name, parameter in self.parameters.items()}
        return {name: buffer for name, buffer in buffers.items() if buffer is not None}

    def restore(self, momentum: Mapping[str, Tensor]) -> None:
        """Take over momentum buffers."""
        for name, buffer in momentum.items():
            self.sgd.state[self.parameters[name]]["momentum_buffer"] = buffer.clone()

    def forget(self, prefixes: tuple[str, ...]) -> None:
        """Drop the momentum of parameters whose name starts with one of `prefixes` (after they were drawn anew)."""
        for name, parameter in self.parameters.items():
            if name.startswith(prefixes):
                self.sgd.state[parameter].pop("momentum_buffer", None)
