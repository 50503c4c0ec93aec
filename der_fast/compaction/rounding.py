"""Rounding the numbers of kept channels to whole hardware blocks, without keeping more parameters.

Convolution kernels work in blocks of channels (8 on tensor cores, 16 in ONNX Runtime on AVX-512); a width of 18 costs as much there as
one of 32. Masks that keep 16 or 32 instead spend the same parameters where they are used.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from der_fast.compaction.program import live_widths
from der_fast.model.layout import MaskLayout


def block_of(width: int, multiple: int) -> int:
    """Return the block that a group of `width` channels is rounded to: `multiple`, but never more than a quarter of the group."""
    return max(min(multiple, width // 4), 1)


def round_channels(layout: MaskLayout, logits: Tensor, keep: Tensor, multiple: int, floor: float = 0.0) -> Tensor:
    """Return masks whose groups keep whole blocks of channels, and no more parameters than `keep`.

    Every group rounds down, but keeps a block if it had anything. Then groups that lost half a block or more round up instead, the
    largest loss first, as long as the parameters of `keep` allow it. Within a group the channels with the largest logits stay. The
    result has more parameters than `keep` only if the floor and the blocks of nearly empty groups alone exceed it.

    Args:
        layout: the full network's mask layout.
        logits: (C,) mask logits.
        keep: boolean (C,); returned as it is if `multiple` is 1.
        multiple: channels per block.
        floor: share of a stream's channels, in [0, 1], that always stays.
    """
    if multiple <= 1:
        return keep
    architecture, wanted = layout.architecture, layout.widths(keep)
    blocks = {name: block_of(width, multiple) for name, width in architecture.groups.items()}
    least = {name: math.ceil(floor * architecture.width((name,)) - 1e-9) for name in layout.stream_groups()}
    down = {name: _down(count, blocks[name], least.get(name, 0)) for name, count in wanted.items()}
    widths = {name: min(width, architecture.width((name,))) for name, width in down.items()}

    def parameters(of: dict[str, int]) -> int:
        return architecture.parameters(live_widths(architecture, of))

    budget = parameters(wanted)
    lost = {name: (wanted[name] - width) / blocks[name] for name, width in widths.items()}
    for name in sorted((name for name in lost if lost[name] >= 0.5), key=lambda name: -lost[name]):
        larger = widths | {name: min(widths[name] + blocks[name], architecture.width((name,)))}
        if parameters(larger) <= budget:
            widths = larger
    rounded = torch.zeros_like(keep)
    scores = layout.by_group(logits.detach().cpu())
    for name, part in layout.by_group(rounded).items():
        # Kept channels come before all others, whatever their logits: they may have been chosen by price.
        order = torch.argsort(scores[name] + 1e3 * layout.by_group(keep)[name], descending=True, stable=True)
        part[order[: widths[name]]] = True
    return rounded


def _down(count: int, block: int, least: int) -> int:
    """Round down to whole blocks, but never from something to nothing, and never below `least`."""
    whole = count // block * block
    return max(whole, block if count else 0, math.ceil(least / block) * block)
