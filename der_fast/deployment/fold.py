"""Batch-norm folded into the convolutions of a compact extractor."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from der_fast.compaction.program import lost_branch, program
from der_fast.model.architecture import Block
from der_fast.model.extractor import Convolution, Extractor, MaskedBatchNorm, ResidualBlock

_EPS = 1e-5


@torch.no_grad()
def fold(extractor: Extractor) -> dict[str, Tensor]:
    """Return the folded weights that `program(architecture, widths)` names, float32 on the CPU, computed in double precision.

    Args:
        extractor: compact, or the full network where nothing is masked.
    """
    ops = program(extractor.architecture, extractor.widths)
    found = _fold(extractor) if ops else {}
    names = [name for op in ops for name in op.tensors()]
    return {name: found[name].float().cpu().contiguous() for name in names}


def _fold(net: Extractor) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {"stem.weight": net.stem.weight.double()}
    scale, shift = _affine(net.norm)
    if net.architecture.preactivation:
        out["norm.scale"], out["norm.shift"] = scale, shift
    else:
        out["stem.weight"], out["stem.bias"] = out["stem.weight"] * scale[:, None, None, None], shift
    for description, block in zip(net.architecture.blocks, net.blocks, strict=True):
        assert isinstance(block, ResidualBlock)
        _fold_block(out, net, description, block)
    return out


def _fold_block(out: dict[str, Tensor], net: Extractor, block: Block, modules: ResidualBlock) -> None:
    weights = [cast(Convolution, module).weight.double() for module in modules.convs]
    affine = [_affine(cast(MaskedBatchNorm, norm)) for norm in modules.norms]
    names = [f"{block.name}.{conv.name}" for conv in block.convs]
    if modules.shortcut is not None:
        name = f"{block.name}.shortcut"
        out[f"{name}.weight"] = modules.shortcut.weight.double()
        if modules.shortcut_norm is not None:
            scale, out[f"{name}.bias"] = _affine(modules.shortcut_norm)
            out[f"{name}.weight"] = out[f"{name}.weight"] * scale[:, None, None, None]
    if net.architecture.preactivation:
        out[f"{block.name}.norm.scale"], out[f"{block.name}.norm.shift"] = affine.pop(0)
        affine.append((torch.ones(weights[-1].shape[0], dtype=torch.float64, device=weights[-1].device), torch.zeros(())))
    elif lost_branch(net.architecture, block, net.widths):
        out[f"{names[-1]}.bias"] = _constant(weights, affine)
        return
    for name, weight, (scale, shift) in zip(names, weights, affine, strict=True):
        out[f"{name}.weight"], out[f"{name}.bias"] = weight * scale[:, None, None, None], shift


def _constant(weights: list[Tensor], affine: list[tuple[Tensor, Tensor]]) -> Tensor:
    """What the branch yields whose inner groups are lost, all of them: batch-norm of zeros."""
    value = torch.zeros(0)
    for weight, (scale, shift) in zip(weights, affine, strict=True):
        value = shift if weight.shape[1] == 0 or not value.numel() else weight.sum((2, 3)) @ value.relu() * scale + shift
    return value


def _affine(norm: MaskedBatchNorm) -> tuple[Tensor, Tensor]:
    scale = norm.weight.double() / (norm.running_var.double() + _EPS).sqrt()
    return scale, norm.bias.double() - norm.running_mean.double() * scale
