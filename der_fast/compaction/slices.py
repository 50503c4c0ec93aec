"""The part of the full network's tensors that belongs to the compact one: taking it out, and putting it back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from der_fast.compaction.plan import CompactionPlan
from der_fast.model.architecture import Architecture, Conv, Groups

NORM_TENSORS = ("weight", "bias", "running_mean", "running_var")


def tensor_groups(architecture: Architecture) -> dict[str, tuple[Groups, ...]]:
    """Return for every tensor in an `Extractor`'s state the channel groups of its first and, for convolutions, second dimension.

    The second is left out for the stem, whose second dimension is the image's channels.
    """
    before = architecture.preactivation
    table: dict[str, tuple[Groups, ...]] = {}

    def conv(prefix: str, conv: Conv) -> None:
        table[f"{prefix}.weight"] = (conv.target, conv.source) if conv.source else (conv.target,)

    def norm(prefix: str, groups: Groups) -> None:
        table.update({f"{prefix}.{name}": (groups,) for name in NORM_TENSORS})

    conv("stem", architecture.stem)
    norm("norm", architecture.features if before else architecture.stem.target)
    for index, block in enumerate(architecture.blocks):
        for number, row in enumerate(block.convs):
            conv(f"blocks.{index}.convs.{number}", row)
            norm(f"blocks.{index}.norms.{number}", row.source if before else row.target)
        if block.shortcut:
            conv(f"blocks.{index}.shortcut", block.shortcut)
            if not before:
                norm(f"blocks.{index}.shortcut_norm", block.target)
    return table


def gather(plan: CompactionPlan, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what the compact network keeps of the full network's tensors, which do not change.

    Args:
        plan: what remains.
        tensors: any of an `Extractor`'s tensors by name (see `tensor_groups`), or others of the same shapes, such as momentum buffers.

    Raises:
        KeyError: a name that the network does not have.
    """
    table, rows = tensor_groups(plan.layout.architecture), _Rows(plan)
    parts = {}
    for name, value in tensors.items():
        part = value.detach()
        for dimension, groups in enumerate(table[name]):
            part = part.index_select(dimension, rows(groups).to(value.device))
        parts[name] = part.clone() if part.data_ptr() == value.data_ptr() else part
    return parts


@torch.no_grad()
def scatter(plan: CompactionPlan, parts: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Write the compact network's tensors back into the full network's, in place: the inverse of `gather`.

    Args:
        plan: what remains.
        parts: the compact network's tensors by name.
        tensors: the full network's tensors, at least those in `parts`.

    Raises:
        KeyError: a name that the network or `tensors` does not have.
    """
    table, rows = tensor_groups(plan.layout.architecture), _Rows(plan)
    for name, part in parts.items():
        indices = [rows(groups).to(part.device) for groups in table[name]]
        where = torch.meshgrid(*indices, indexing="ij") if len(indices) > 1 else (indices[0],)
        tensors[name].index_put_(where, part.detach())


class _Rows:
    """Positions of the kept channels of a tensor, by its groups."""

    def __init__(self, plan: CompactionPlan) -> None:
        self.plan = plan
        self.known: dict[Groups, Tensor] = {}

    def __call__(self, groups: Groups) -> Tensor:
        if groups not in self.known:
            self.known[groups] = self.plan.keep[self.plan.layout.slice_of(groups)].nonzero().squeeze(1)
        return self.known[groups]
