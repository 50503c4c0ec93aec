"""Which of an extractor's weights each unit folds, and the constant that a lost branch leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from der_fast.compaction.units import inner_groups
from der_fast.kernels.affine import EPSILON
from der_fast.kernels.compact import Norm
from der_fast.model.architecture import Block, Groups
from der_fast.model.extractor import Convolution, Extractor, MaskedBatchNorm, ResidualBlock

Kept = Callable[[Groups], Tensor]


def norm_of(module: MaskedBatchNorm) -> Norm:
    """Return the module's γ, β and running statistics."""
    return Norm(module.weight.detach(), module.bias.detach(), module.running_mean, module.running_var)


def sources(network: Extractor) -> dict[str, tuple[Tensor | None, Norm | None]]:
    """Return, by the name of a unit, the convolution's weight (None for an affine one) and the batch-norm that is folded in."""
    before = network.architecture.preactivation
    found: dict[str, tuple[Tensor | None, Norm | None]] = {"stem": (_weight(network.stem), None if before else norm_of(network.norm))}
    if before:
        found["norm"] = (None, norm_of(network.norm))
    for description, module in zip(network.architecture.blocks, network.blocks, strict=True):
        block = cast(ResidualBlock, module)
        norms: list[Norm | None] = [norm_of(cast(MaskedBatchNorm, norm)) for norm in block.norms]
        if before:
            found[f"{description.name}.norm"] = (None, norms[0])
            norms = [*norms[1:], None]
        for conv, source, norm in zip(description.convs, block.convs, norms, strict=True):
            found[f"{description.name}.{conv.name}"] = (_weight(cast(Convolution, source)), norm)
        if block.shortcut is not None:
            shortcut_norm = None if block.shortcut_norm is None else norm_of(block.shortcut_norm)
            found[f"{description.name}.shortcut"] = (_weight(block.shortcut), shortcut_norm)
    return found


def _weight(conv: Convolution) -> Tensor:
    return conv.weight.detach()


def lost_branches(network: Extractor, kept: Kept) -> list[tuple[Block, ResidualBlock]]:
    """Return the blocks with an empty inner group, and their modules."""
    pairs = zip(network.architecture.blocks, network.blocks, strict=True)
    return [
        (description, cast(ResidualBlock, block))
        for description, block in pairs
        if any(not bool(kept((name,)).any()) for name in inner_groups(description))
    ]


@torch.no_grad()
def lost_output(description: Block, block: ResidualBlock, kept: Kept) -> Tensor:
    """Return what the last convolution of a post-activation block with a lost branch returns at every position, (K,) float64.

    After the last empty group everything is constant: batch-norm turns the convolution's zeros into β − γμ/√(σ² + ε), and ReLU, mask
    and a 1×1 convolution keep constants constant.

    Args:
        description, block: the block; K channels are those of its target before compaction.
        kept: the binary masks of groups, boolean.
    """
    empty = [not bool(kept(conv.target).any()) for conv in description.convs[:-1]]
    first = len(empty) - empty[::-1].index(True)
    parts = list(zip(description.convs, block.convs, block.norms, strict=True))[first:]
    value = torch.zeros(_weight(cast(Convolution, parts[0][1])).shape[1], dtype=torch.float64)
    for conv, module, norm in parts:
        weight = _weight(cast(Convolution, module)).double().cpu()
        if conv.kernel > 1 and bool(value.any()):
            raise NotImplementedError(
                f"{description.name}.{conv.name}: a {conv.kernel}×{conv.kernel} convolution does not keep constants constant"
            )
        value = weight.sum((2, 3)) @ value
        if conv is not description.convs[-1]:
            scale, shift = scale_and_shift(norm_of(cast(MaskedBatchNorm, norm)))
            value = (value * scale + shift).relu() * kept(conv.target).double()
    return value


def scale_and_shift(norm: Norm) -> tuple[Tensor, Tensor]:
    """Return batch-norm's γ/√(σ² + ε) and β − γμ/√(σ² + ε), float64 on the CPU."""
    scale = norm.weight.double().cpu() / (norm.variance.double().cpu() + EPSILON).sqrt()
    return scale, norm.bias.double().cpu() - scale * norm.mean.double().cpu()
