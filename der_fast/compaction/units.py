"""A network's description as the native planner reads it: flat lists of groups, streams and stored units."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from der_fast.model.architecture import IMAGE_CHANNELS, Architecture, Block, Conv, Groups

CONVOLUTION, AFFINE, CONSTANT = 0, 1, 2
ALWAYS, ALIVE, LOST = 0, 1, 2


@dataclass(frozen=True)
class Unit:
    """One stored piece: the tensors of one operation of `program`, for any masks.

    Attributes:
        name: the operation's target.
        kind: CONVOLUTION, AFFINE (a separate batch-norm) or CONSTANT (what is left of a lost branch).
        block: number of the block, or -1.
        when: stored ALWAYS, or only if the block's branch is ALIVE, or LOST.
        source, target: groups.
        kernel: of a convolution.
        norm: a batch-norm is folded into the convolution, which then has a bias.
    """

    name: str
    kind: int
    block: int
    when: int
    source: Groups
    target: Groups
    kernel: int = 1
    norm: bool = False


def units(architecture: Architecture) -> list[Unit]:
    """Return every unit in the order of `program`'s operations."""
    before = architecture.preactivation
    rows = [_convolution("stem", architecture.stem, -1, ALWAYS, norm=not before)]
    for number, block in enumerate(architecture.blocks):
        rows += _preactivation_units(block, number) if before else _units(block, number)
    if before:
        rows.append(Unit("norm", AFFINE, -1, ALWAYS, architecture.features, architecture.features))
    return rows


def _convolution(name: str, conv: Conv, block: int, when: int, *, norm: bool) -> Unit:
    return Unit(name, CONVOLUTION, block, when, conv.source, conv.target, conv.kernel, norm)


def _units(block: Block, number: int) -> list[Unit]:
    rows = []
    if block.shortcut:
        rows.append(_convolution(f"{block.name}.shortcut", block.shortcut, number, ALWAYS, norm=True))
    rows += [_convolution(f"{block.name}.{conv.name}", conv, number, ALIVE, norm=True) for conv in block.convs]
    return [*rows, Unit(f"{block.name}.{block.convs[-1].name}", CONSTANT, number, LOST, block.target, block.target)]


def _preactivation_units(block: Block, number: int) -> list[Unit]:
    rows = [Unit(f"{block.name}.norm", AFFINE, number, ALWAYS if block.shortcut else ALIVE, block.source, block.source)]
    if block.shortcut:
        rows.append(_convolution(f"{block.name}.shortcut", block.shortcut, number, ALWAYS, norm=False))
    last = block.convs[-1]
    return rows + [_convolution(f"{block.name}.{conv.name}", conv, number, ALIVE, norm=conv is not last) for conv in block.convs]


def streams(architecture: Architecture) -> list[Groups]:
    """Return the groups of every tensor that the residual streams consist of, from the stem's output to the features."""
    return list(dict.fromkeys([architecture.stem.target, *(block.target for block in architecture.blocks)]))


def inner_groups(block: Block) -> Groups:
    """Return the groups that only this block reads and writes."""
    return tuple(name for conv in block.convs[:-1] for name in conv.target)


def description(architecture: Architecture, widths: Mapping[str, int]) -> dict[str, Any]:
    """Return the argument `network` of `native.plan` for a network whose groups have `widths`."""
    number = {name: position for position, name in enumerate(architecture.groups)}

    def numbers(groups: Groups) -> list[int]:
        return [number[name] for name in groups]

    return {
        "groups": [widths[name] for name in architecture.groups],
        "image_channels": IMAGE_CHANNELS,
        "streams": [numbers(groups) for groups in streams(architecture)],
        "inner": [numbers(inner_groups(block)) for block in architecture.blocks],
        "units": [
            (unit.kind, unit.block, unit.when, numbers(unit.source), numbers(unit.target), unit.kernel, unit.norm)
            for unit in units(architecture)
        ],
    }
