"""The settled part of a step, on the small network: once masks are binary, pruned channels no longer need to be computed.

The compact network takes over the full one's weights, batch-norm statistics and momentum, so the next batch's loss does not change.
The removed part is kept, because the next step's extractor starts from this one's full weights. A channel whose mask is zero receives
no gradient, so only momentum and weight decay would have moved its weights; both are linear, and a whole epoch of them is one 2 × 2
matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from der_fast.compaction.plan import CompactionPlan
from der_fast.compaction.slices import gather, scatter
from der_fast.config.schema import ScheduleConfig
from der_fast.model.classifier import slice_classifier
from der_fast.model.extractor import Extractor

PREFIX = "extractor."


@dataclass
class Remainder:
    """The full network while its compact form is trained.

    Attributes:
        plan: which channels the compact network has.
        tensors: the full network's state by name; the kept channels' entries are out of date.
        momentum: its momentum buffers by parameter name; likewise out of date.
    """

    plan: CompactionPlan
    tensors: dict[str, Tensor]
    momentum: dict[str, Tensor]

    def decay(self, schedule: ScheduleConfig, lr: float, updates: int) -> None:
        """Update the removed part as `updates` steps of SGD without gradient would (eq. 13)."""
        decay, momentum = schedule.weight_decay, schedule.momentum
        step = np.array([[1 - lr * decay, -lr * momentum], [decay, momentum]], dtype=np.float64)
        (ww, wv), (vw, vv) = np.linalg.matrix_power(step, updates).tolist()
        for name, weight in self.tensors.items():
            if not _is_parameter(name):
                continue
            old = self.momentum.get(name)
            buffer = torch.zeros_like(weight) if old is None else old
            self.tensors[name] = ww * weight + wv * buffer
            if old is not None:
                self.momentum[name] = vw * weight + vv * buffer


def take_over(full: Extractor, momentum: Mapping[str, Tensor], plan: CompactionPlan) -> tuple[Extractor, dict[str, Tensor], Remainder]:
    """Return the compact network ready for training, its momentum buffers, and the remainder of the full one.

    Args:
        full: the full network.
        momentum: its momentum buffers by parameter name.
        plan: what to keep; its features must not be constant.
    """
    tensors = {name: value.detach() for name, value in full.state_dict().items()}
    small = extractor_like(full, plan.widths)
    small.load_state_dict(gather(plan, tensors))
    return small, gather(plan, momentum), Remainder(plan, tensors, dict(momentum))


def extractor_like(other: Extractor, widths: Mapping[str, int] | None = None) -> Extractor:
    """Return a new extractor of the same architecture, on the same device and in the same memory format; load its weights afterwards."""
    weight = other.stem.weight
    extractor = Extractor(other.architecture, widths).to(weight)
    if weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous():
        extractor.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return extractor


def merged(small: Extractor, remainder: Remainder) -> Extractor:
    """Return the full network with the compact one's weights and statistics put back."""
    tensors = {name: value.clone() for name, value in remainder.tensors.items()}
    scatter(remainder.plan, small.state_dict(), tensors)
    full = extractor_like(small)
    full.load_state_dict(tensors)
    return full


def slice_inputs(
    layer: nn.Linear, momentum: Mapping[str, Tensor], keep: Tensor, constant: Tensor | None = None
) -> tuple[nn.Linear, dict[str, Tensor]]:
    """Return the linear layer that reads only the features in `keep` (boolean), and its momentum buffers by parameter name."""
    buffers = dict(momentum)
    if "weight" in buffers:
        buffers["weight"] = buffers["weight"][:, keep.to(buffers["weight"].device)].clone()
    return slice_classifier(layer, keep.to(layer.weight.device), constant), buffers


def _is_parameter(name: str) -> bool:
    return not name.endswith(("running_mean", "running_var"))
