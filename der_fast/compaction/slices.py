"""The part of a wide network's tensors that belongs to a narrower one: taking it out, and putting it back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from der_fast.compaction.selection import Selection
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


def gather(selection: Selection, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what the narrow network has of the wide one's tensors, which do not change.

    Args:
        selection: the narrow network's channels.
        tensors: any of an `Extractor`'s tensors by name (see `tensor_groups`), or others of the same shapes, such as momentum buffers.

    Raises:
        KeyError: a name that the network does not have.
    """
    table = tensor_groups(selection.architecture)
    parts = {}
    for name, value in tensors.items():
        part = value.detach()
        for dimension, groups in enumerate(table[name]):
            part = part.index_select(dimension, selection.rows(groups).to(value.device))
        parts[name] = part.clone() if part.data_ptr() == value.data_ptr() else part
    return parts


@torch.no_grad()
def scatter(selection: Selection, parts: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Write the narrow network's tensors into the wide one's, in place: the inverse of `gather`.

    Args:
        selection: the narrow network's channels.
        parts: its tensors by name.
        tensors: the wide network's tensors, at least those in `parts`.

    Raises:
        KeyError: a name that the network or `tensors` does not have.
    """
    table = tensor_groups(selection.architecture)
    for name, part in parts.items():
        indices = [selection.rows(groups).to(part.device) for groups in table[name]]
        where = torch.meshgrid(*indices, indexing="ij") if len(indices) > 1 else (indices[0],)
        tensors[name].index_put_(where, part.detach())


def spread(selection: Selection, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the wide network's tensors: the narrow one's, and zeros everywhere else.

    Raises:
        KeyError: a name that the network does not have.
    """
    architecture, table, tensors = selection.architecture, tensor_groups(selection.architecture), {}
    for name, part in parts.items():
        lengths = [architecture.width(groups, selection.wide) for groups in table[name]]
        tensors[name] = part.new_zeros(*lengths, *part.shape[len(lengths) :])
    scatter(selection, parts, tensors)
    return tensors
