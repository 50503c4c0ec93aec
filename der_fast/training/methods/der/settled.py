"""The settled part of a step, on the small network: once masks are binary, pruned channels no longer need to be computed.

The compact network takes over the full one's weights, batch-norm statistics and momentum, so the next batch's loss does not change.
The removed part is kept, because the next step's extractor starts from this one's full weights. A channel whose mask is zero receives
no gradient, so only momentum and weight decay would have moved its weights; both are linear, and a whole epoch of them is one 2 × 2
matrix.

Kept widths are any numbers. Where whole blocks of channels are faster, the small network is trained with dead channels behind the live ones
of every group. Everything that belongs to a dead channel is zero and stays zero: its filter yields zeros, γ = β = 0 keeps them, no ReLU
passes a gradient where its output is zero, and no weight that reads a zero gets one. The classifiers read dead features with zero weights.
Dead channels exist in the memory of the settled epochs only: nothing saves or counts them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from der_fast.compaction.plan import CompactionPlan
from der_fast.compaction.selection import Selection, among_dead
from der_fast.compaction.slices import gather, scatter, spread
from der_fast.config.schema import ScheduleConfig
from der_fast.model.classifier import slice_classifier, spread_classifier
from der_fast.model.extractor import Extractor
from der_fast.training.packing import TENSOR_CORE_BLOCK
from der_fast.training.state import named_part

PREFIX = "extractor."


@dataclass
class Remainder:
    """The full network while its compact form is trained.

    Attributes:
        plan: which channels the compact network has.
        tensors: the full network's state by name; the kept channels' entries are out of date.
        momentum: its momentum buffers by parameter name; likewise out of date.
        padding: the compact network's channels among dead ones; None if it is trained without any.
    """

    plan: CompactionPlan
    tensors: dict[str, Tensor]
    momentum: dict[str, Tensor]
    padding: Selection | None = None

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


def settled_padding(device: torch.device) -> int:
    """Return the number of which the settled network's widths are padded to a multiple."""
    # cuDNN's and Triton's wide loads need it. On a CPU it made a batch slower.
    return TENSOR_CORE_BLOCK if device.type == "cuda" else 1


def padding_of(plan: CompactionPlan, device: torch.device) -> Selection | None:
    """Return where the compact network's channels lie among dead ones; None if it is trained without any."""
    padding = among_dead(plan.layout.architecture, plan.widths, settled_padding(device))
    return None if padding.wide == plan.widths else padding


def narrowed(
    parts: Mapping[str, nn.Module], momentum: Mapping[str, Tensor], selection: Selection
) -> tuple[dict[str, nn.Module], dict[str, Tensor]]:
    """Return a step's parts and their momentum with the narrow extractor of `selection` in place of the wide one.

    Args:
        parts: by name; 'extractor', and the linear layers that read its features last.
        momentum: buffers by parameter name.
        selection: what the extractor and the layers behind it keep.
    """
    extractor = cast(Extractor, parts["extractor"])
    parts, momentum = dict(parts), dict(momentum)
    parts["extractor"] = small = extractor_like(extractor, selection.narrow)
    small.load_state_dict(gather(selection, extractor.state_dict()))
    momentum.update(_extractor_momentum(gather(selection, named_part(momentum, PREFIX))))
    for name, layer in _linear_layers(parts):
        columns = _columns(selection, layer.in_features - extractor.features, layer.weight.device)
        keep = torch.zeros(layer.in_features, dtype=torch.bool, device=columns.device).index_fill_(0, columns, True)
        parts[name], weight = slice_classifier(layer, keep), f"{name}.weight"
        if weight in momentum:
            momentum[weight] = momentum[weight].index_select(1, columns)
    return parts, momentum


def widened(
    parts: Mapping[str, nn.Module], momentum: Mapping[str, Tensor], selection: Selection
) -> tuple[dict[str, nn.Module], dict[str, Tensor]]:
    """Return a step's parts and their momentum with the wide extractor of `selection` in place of the narrow one.

    What only the wide one has is zero, the variance of dead channels included: then every tensor stays as it is in training.

    Args:
        parts, momentum: as `narrowed` returns them.
        selection: as there.
    """
    extractor = cast(Extractor, parts["extractor"])
    parts, momentum = dict(parts), dict(momentum)
    parts["extractor"] = wide = extractor_like(extractor, selection.wide)
    wide.load_state_dict(spread(selection, extractor.state_dict()))
    momentum.update(_extractor_momentum(spread(selection, named_part(momentum, PREFIX))))
    for name, layer in _linear_layers(parts):
        old = layer.in_features - extractor.features
        columns = _columns(selection, old, layer.weight.device)
        parts[name], weight = spread_classifier(layer, columns, old + wide.features), f"{name}.weight"
        if weight in momentum:
            buffer = momentum[weight]
            momentum[weight] = buffer.new_zeros(len(buffer), old + wide.features).index_copy_(1, columns, buffer)
    return parts, momentum


def _extractor_momentum(buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{PREFIX}{name}": buffer for name, buffer in buffers.items()}


def _linear_layers(parts: Mapping[str, nn.Module]) -> list[tuple[str, nn.Linear]]:
    return [(name, layer) for name, layer in parts.items() if isinstance(layer, nn.Linear)]


def _columns(selection: Selection, old: int, device: torch.device) -> Tensor:
    """Positions of the narrow network's features behind `old` others, among the wide one's."""
    return torch.cat([torch.arange(old), old + selection.rows(selection.architecture.features)]).to(device)


def extractor_like(other: Extractor, widths: Mapping[str, int] | None = None) -> Extractor:
    """Return a new extractor of the same architecture, on the same device and in the same memory format; load its weights afterwards."""
    weight = other.stem.weight
    extractor = Extractor(other.architecture, widths).to(weight)
    if weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous():
        extractor.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return extractor


def merged(small: Extractor, remainder: Remainder) -> Extractor:
    """Return the full network with the compact one's weights and statistics put back; the compact one has no dead channels."""
    tensors = {name: value.clone() for name, value in remainder.tensors.items()}
    scatter(remainder.plan.selection, small.state_dict(), tensors)
    full = extractor_like(small)
    full.load_state_dict(tensors)
    return full


def _is_parameter(name: str) -> bool:
    return not name.endswith(("running_mean", "running_var"))
