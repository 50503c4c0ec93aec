"""The networks and steps that der_fast is compared with, written as in public code: one module per layer, one mask per layer.

`bench/subjects/plain.py` has the same networks without masks, like the frozen extractors of public implementations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.subjects.plain import PlainConv
from der_fast.model.architecture import Architecture, Block


class Masks(nn.ParameterDict):
    """One vector of mask logits per channel group."""

    def __init__(self, net: Architecture, generator: torch.Generator) -> None:
        super().__init__()
        for name, width in net.groups.items():
            self[name.replace(".", "_")] = nn.Parameter(2 * torch.rand(width, generator=generator))

    def soft(self, scale: Tensor | float) -> dict[str, Tensor]:
        """Return m = σ(s·e) by group, one operation after another."""
        return {name: torch.sigmoid(scale * logits) for name, logits in self.items()}

    @torch.no_grad()
    def compensate(self, scale: Tensor | float) -> None:
        """Undo the scale in the gradients, group by group, like HAT's published code: the paper's quotient with s·e clamped."""
        for logits in self.values():
            assert logits.grad is not None
            logits.grad *= (torch.cosh((scale * logits).clamp(-50, 50)) + 1) / (scale * (torch.cosh(logits) + 1))

    @torch.no_grad()
    def clamp(self, bound: float) -> None:
        """Clamp the logits, group by group."""
        for logits in self.values():
            logits.clamp_(-bound, bound)


def sparsity(net: Architecture, masks: Mapping[str, Tensor]) -> Tensor:
    """Return L_S, convolution by convolution."""
    soft: list[Tensor] = []
    full = 0
    for conv in net.convs():
        sums = [_norm(groups, masks) for groups in (conv.source, conv.target)]
        soft.append(conv.kernel**2 * sums[0] * sums[1])
        full += conv.kernel**2 * net.width(conv.source) * net.width(conv.target)
    return torch.stack(soft).sum() / full


def _norm(groups: Sequence[str], masks: Mapping[str, Tensor]) -> Tensor:
    vectors = [masks[name.replace(".", "_")] for name in groups]
    return torch.stack([vector.sum() for vector in vectors]).sum() if vectors else next(iter(masks.values())).new_tensor(3.0)


def _mask(x: Tensor, groups: Sequence[str], masks: Mapping[str, Tensor]) -> Tensor:
    vectors = [masks[name.replace(".", "_")] for name in groups]
    mask = vectors[0] if len(vectors) == 1 else torch.cat(vectors)
    return x * mask.to(x.dtype)[:, None, None]


class MaskedBlock(nn.Module):
    """A residual block whose batch-norms are followed by masks."""

    def __init__(self, block: Block, net: Architecture) -> None:
        super().__init__()
        self.block = block
        self.layers = nn.ModuleList(PlainConv(conv, net) for conv in block.convs)
        self.norms = nn.ModuleList(nn.BatchNorm2d(net.width(conv.target)) for conv in block.convs)
        self.shortcut = PlainConv(block.shortcut, net) if block.shortcut else None
        self.shortcut_norm = nn.BatchNorm2d(net.width(block.target)) if block.shortcut else None

    def forward(self, x: Tensor, masks: Mapping[str, Tensor]) -> Tensor:
        """(N, C, H, W) → (N, C', H', W')."""
        residual = x
        if self.shortcut is not None and self.shortcut_norm is not None:
            residual = _mask(self.shortcut_norm(self.shortcut(x)), self.block.target, masks)
        last = len(self.layers) - 1
        for number, (conv, norm, layer) in enumerate(zip(self.layers, self.norms, self.block.convs, strict=True)):
            x = _mask(norm(conv(x)), layer.target, masks)
            x = F.relu(x + residual if number == last else x)
        return x


class MaskedNet(nn.Module):
    """A post-activation ResNet without a classifier; every convolution's batch-norm is multiplied by its group's mask."""

    def __init__(self, net: Architecture) -> None:
        super().__init__()
        self.net = net
        self.stem, self.norm = PlainConv(net.stem, net), nn.BatchNorm2d(net.width(net.stem.target))
        self.blocks = nn.ModuleList(MaskedBlock(block, net) for block in net.blocks)

    def forward(self, x: Tensor, masks: Mapping[str, Tensor]) -> Tensor:
        """(N, 3, H, W) → (N, F)."""
        x = F.relu(_mask(self.norm(self.stem(x)), self.net.stem.target, masks))
        for block in self.blocks:
            x = block(x, masks)
        return x.mean((2, 3))


@torch.no_grad()
def take(net: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy the state of an `Extractor` into a `MaskedNet` or a `PlainFeatures`, whose modules are in the same order.

    Raises:
        ValueError: two shapes differ, so the networks do.
    """
    mine = [(name, value) for name, value in net.state_dict().items() if not name.endswith("num_batches_tracked")]
    for (name, own), (other, value) in zip(mine, weights.items(), strict=True):
        if own.shape != value.shape:
            raise ValueError(f"{name} and {other} have different shapes: {tuple(own.shape)} and {tuple(value.shape)}")
        own.copy_(value)
