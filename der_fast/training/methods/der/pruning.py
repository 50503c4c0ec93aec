"""How masks are made binary within a parameter budget."""

from __future__ import annotations

import torch
from torch import Tensor

from der_fast.compaction.plan import with_floor
from der_fast.compaction.program import live_widths, lost_branch
from der_fast.compaction.rounding import round_channels
from der_fast.config.schema import MasksConfig
from der_fast.model.layout import MaskLayout
from der_fast.model.masks import ChannelMasks
from der_fast.training.methods.der.sparsity import budget_threshold


def kept_share(layout: MaskLayout, keep: Tensor) -> float:
    """Return the share of an extractor's parameters that remain with the kept channels (boolean, (C,)), in [0, 1]."""
    architecture = layout.architecture
    return architecture.parameters(live_widths(architecture, layout.widths(keep.cpu()))) / architecture.parameters()


def final_keep(masks: ChannelMasks, config: MasksConfig) -> Tensor:
    """Return a step's final binary masks, boolean (C,) on the CPU: e_c > 0, and never fewer than the floor.

    If one inner convolution of a block keeps nothing, the block's others go too: nothing that they compute depends on the image.
    """
    layout = masks.layout
    keep = with_floor(layout, masks.logits.detach().cpu(), masks.keep().cpu(), config.floor)
    widths = layout.widths(keep)
    for block in layout.architecture.blocks:
        if lost_branch(layout.architecture, block, widths):
            for conv in block.convs[:-1]:
                keep[layout.slice_of(conv.target)] = False
    return keep


def _cut(masks: ChannelMasks, config: MasksConfig) -> tuple[float, Tensor]:
    """Return the threshold τ ≥ 0 that meets the budget, 0 without a target or if it is met, and the weights w (C,) of τ."""
    weights = masks.layout.prices().pow(config.price_power)
    if config.target_params is None:
        return 0.0, weights
    return max(budget_threshold(masks.layout, masks.logits.detach().cpu(), config), 0.0), weights


def thresholds(masks: ChannelMasks, config: MasksConfig) -> Tensor:
    """Return what the logits of every group must exceed to stay when the budget is met, τ·w, (G,) float64 on the CPU."""
    threshold, weights = _cut(masks, config)
    return threshold * masks.layout.per_group(weights)


@torch.no_grad()
def meet_budget(masks: ChannelMasks, config: MasksConfig) -> None:
    """Lower the logits so that keeping e_c > 0 leaves at most the target share; does nothing without a target or if it is met."""
    threshold, weights = _cut(masks, config)
    if threshold <= 0:
        return
    logits = masks.logits.detach().cpu()
    keep = logits / weights > threshold
    lowered = logits - threshold * weights
    # Rounding must not move a channel across zero: the budget was counted with the quotient.
    lowered = torch.where(keep, lowered.clamp(min=torch.finfo(lowered.dtype).tiny), lowered.clamp(max=0.0))
    # Not clamped: clamped logits can be equal, and then chance would decide which of them the floor keeps.
    masks.logits.copy_(lowered)


@torch.no_grad()
def binarise(masks: ChannelMasks, config: MasksConfig) -> Tensor:
    """Decide which channels stay, boolean (C,) on the CPU, and write that into the logits: then a channel is kept iff e_c > 0."""
    meet_budget(masks, config)
    logits = masks.logits.detach().cpu()
    keep = round_channels(masks.layout, logits, final_keep(masks, config), config.multiple, config.floor)
    masks.logits.copy_(torch.where(keep, logits.clamp(min=torch.finfo(logits.dtype).tiny), logits.clamp(max=0.0)))
    return keep
