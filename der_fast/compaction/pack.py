"""From a plan to the smaller network: gather the kept channels of every weight."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from der_fast.compaction.plan import CompactionPlan
from der_fast.model.architecture import Conv, Groups
from der_fast.model.extractor import Convolution, Extractor, MaskedBatchNorm


@torch.no_grad()
def compact(dense: Extractor, plan: CompactionPlan) -> Extractor:
    """Return the network of the kept channels, in evaluation mode, with the same dtype on the same device.

    In evaluation mode it computes what `dense` computes with the binary masks of the plan (the kept features of it).

    Args:
        dense: the full network.
        plan: made by `plan` for the same architecture.

    Raises:
        ValueError: the plan belongs to another architecture, or `dense` is not the full network.
    """
    if plan.layout.architecture != dense.architecture or dense.widths != dict(dense.architecture.groups):
        raise ValueError(f"the plan is for the full {plan.layout.architecture.name}, not for this {dense.architecture.name}")
    small = Extractor(dense.architecture, plan.widths).to(dense.stem.weight)
    for (conv, source), (_, target) in zip(_convolutions(dense), _convolutions(small), strict=True):
        weight = source.weight[_kept(plan, conv.target)]
        target.weight.copy_(weight[:, _kept(plan, conv.source)] if conv.source else weight)
    for (groups, source_norm), (_, norm) in zip(_norms(dense), _norms(small), strict=True):
        rows = _kept(plan, groups)
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(norm, name).copy_(getattr(source_norm, name)[rows])
    return small.eval()


def _kept(plan: CompactionPlan, groups: Groups) -> Tensor:
    return plan.keep[plan.layout.slice_of(groups)].nonzero().squeeze(1)


def _convolutions(network: Extractor) -> Iterator[tuple[Conv, Convolution]]:
    yield network.architecture.stem, network.stem
    for description, block in zip(network.architecture.blocks, network.blocks, strict=True):
        yield from zip(description.convs, block.convs, strict=True)  # type: ignore[arg-type]
        if description.shortcut:
            yield description.shortcut, block.shortcut  # type: ignore[misc]


def _norms(network: Extractor) -> Iterator[tuple[Groups, MaskedBatchNorm]]:
    """Pair every batch-norm with the groups it normalises, in the order of `Architecture.norms` but for its place in the list."""
    before = network.architecture.preactivation
    yield (network.architecture.features if before else network.architecture.stem.target), network.norm
    for description, block in zip(network.architecture.blocks, network.blocks, strict=True):
        for conv, norm in zip(description.convs, block.norms, strict=True):  # type: ignore[arg-type]
            yield (conv.source if before else conv.target), norm
        if block.shortcut_norm is not None:
            yield description.target, block.shortcut_norm  # type: ignore[misc]


@torch.no_grad()
def compaction_error(dense: Extractor, masks: Tensor, small: Extractor, plan: CompactionPlan, images: Tensor) -> float:
    """Return max |difference| / max |feature| between the binary-masked and the compact network, both in evaluation mode.

    It is infinite where either has a feature that is not a number, so that no bound lets it pass.

    Args:
        dense: the full network; its mode is restored.
        masks: (C,) binary masks, float.
        small, plan: the compact network and its plan.
        images: (N, 3, H, W) a real batch.
    """
    training = dense.training
    truth = dense.eval()(images, masks)[:, plan.features.to(images.device)]
    dense.train(training)
    if truth.numel() == 0:
        return 0.0
    error = float((truth - small(images)).abs().max() / truth.abs().max().clamp_min(1e-12))
    return math.inf if math.isnan(error) else error
