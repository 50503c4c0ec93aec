"""The compact network as modules: what `pack` folds into an arena, made another way, to compare with."""

from __future__ import annotations

import torch

from der_fast.compaction import CompactionPlan
from der_fast.compaction.fold import lost_branches, lost_output
from der_fast.compaction.slices import gather
from der_fast.model.extractor import Extractor


@torch.no_grad()
def compact(dense: Extractor, plan: CompactionPlan) -> Extractor:
    """Return the network of the kept channels, in evaluation mode, with the same dtype on the same device.

    In evaluation mode it computes what `dense` computes with the binary masks of the plan (the kept features of it). Where a block
    lost its branch but its last convolution still yields a constant, the constant moves into the running mean of the batch-norm
    behind it: right in evaluation mode, and without effect in training mode.

    Args:
        dense: the full network.
        plan: made by `plan` for the same architecture.

    Raises:
        ValueError: the plan belongs to another architecture, or `dense` is not the full network.
    """
    if plan.layout.architecture != dense.architecture or dense.widths != dict(dense.architecture.groups):
        raise ValueError(f"the plan is for the full {plan.layout.architecture.name}, not for this {dense.architecture.name}")
    small = Extractor(dense.architecture, plan.widths).to(dense.stem.weight)
    small.load_state_dict(gather(plan.selection, dense.state_dict()))
    if not (plan.constant or dense.architecture.preactivation):
        places = {description.name: block for description, block in zip(dense.architecture.blocks, small.blocks, strict=True)}
        for lost, block in lost_branches(dense, plan.masked):
            constant = lost_output(lost, block, plan.masked)[plan.kept(lost.target)]
            mean = places[lost.name].norms[-1].running_mean  # type: ignore[union-attr, index]
            mean.sub_(constant.to(mean))
    return small.eval()
