"""A feature extractor: the network that a description describes, at any channel widths."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from der_fast.kernels.conv.strided import convolve
from der_fast.kernels.masked_bn import masked_bn
from der_fast.model.architecture import Architecture, Block, Conv, Groups
from der_fast.model.layout import MaskLayout


@dataclass(frozen=True)
class Initialisation:
    """How an extractor starts.

    Args:
        fan: whether the variance of a convolution's weights depends on its inputs or its outputs.
        gain: the weights are drawn from N(0, gain / (channels on that side · kernel area)).
        branches: γ of the batch-norm that ends a residual branch; 1 elsewhere. Of no effect in a network with pre-activation.
    """

    fan: Literal["in", "out"]
    gain: float
    branches: float = 1.0

    def draw(self, weight: Tensor, generator: torch.Generator) -> Tensor:
        """Return new values for a convolution's weight (outputs, inputs, k, k)."""
        fan = (weight[:1] if self.fan == "in" else weight[:, :1]).numel()
        return torch.randn(weight.shape, generator=generator) * math.sqrt(self.gain / max(fan, 1))


# The variance of PyTorch's default. In front of a batch-norm, the scale of a weight does not change the function, only how fast it
# changes: smaller weights learn faster.
INITIALISATION = Initialisation("in", 1 / 3)


class Convolution(nn.Module):
    """A convolution without bias that also accepts zero input or output channels (everything pruned): it then returns zeros."""

    def __init__(self, conv: Conv, inputs: int, outputs: int) -> None:
        super().__init__()
        self.stride, self.padding = conv.stride, conv.kernel // 2
        self.weight = nn.Parameter(torch.empty(outputs, inputs, conv.kernel, conv.kernel))

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.numel() == 0:
            height, width = ((size - 1) // self.stride + 1 for size in x.shape[2:])
            return x.new_zeros(x.shape[0], self.weight.shape[0], height, width)
        return convolve(x, self.weight, self.stride, self.padding)


class MaskedBatchNorm(nn.Module):
    """Batch-norm × mask (+ residual) (+ ReLU); holds γ, β and the running statistics, all (C,) float32."""

    def __init__(self, channels: int, where: slice | None) -> None:
        super().__init__()
        self.where = where
        self.momentum = 0.1
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.running_mean: Tensor
        self.running_var: Tensor
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor, masks: Tensor | None, residual: Tensor | None = None, relu: bool = True) -> Tensor:
        mask = None if masks is None or self.where is None else masks[self.where]
        return masked_bn(
            x,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            mask=mask,
            residual=residual,
            relu=relu,
            training=self.training,
            momentum=self.momentum,
        )


class ResidualBlock(nn.Module):
    """A residual block of an `Architecture`, post- or pre-activation."""

    def __init__(self, block: Block, architecture: Architecture, widths: Mapping[str, int], layout: MaskLayout | None) -> None:
        super().__init__()
        self.preactivation = architecture.preactivation
        self.stride = block.stride
        self.grow = 0 if block.shortcut else architecture.width(block.target, widths) - architecture.width(block.source, widths)
        self.convs = nn.ModuleList(_convolution(conv, architecture, widths) for conv in block.convs)
        self.norms = nn.ModuleList(
            _norm(conv.source if self.preactivation else conv.target, architecture, widths, layout) for conv in block.convs
        )
        self.shortcut = _convolution(block.shortcut, architecture, widths) if block.shortcut else None
        project_norm = block.shortcut is not None and not self.preactivation
        self.shortcut_norm = _norm(block.target, architecture, widths, layout) if project_norm else None

    def forward(self, x: Tensor, masks: Tensor | None) -> Tensor:
        return self._forward_preactivation(x, masks) if self.preactivation else self._forward(x, masks)

    def _forward(self, x: Tensor, masks: Tensor | None) -> Tensor:
        if self.shortcut is not None and self.shortcut_norm is not None:
            residual = self.shortcut_norm(self.shortcut(x), masks, None, False)
        else:
            residual = self.identity(x)
        last = len(self.convs) - 1
        for index, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = norm(conv(x), masks, residual if index == last else None, True)
        return x

    def _forward_preactivation(self, x: Tensor, masks: Tensor | None) -> Tensor:
        active = self.norms[0](x, masks)
        residual = self.identity(x) if self.shortcut is None else self.shortcut(active)
        for index, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            active = conv(active if index == 0 else norm(active, masks))
        out: Tensor = active + residual
        return out

    def identity(self, x: Tensor) -> Tensor:
        """The shortcut without a projection: every stride-th pixel, with zero channels appended."""
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, 0, self.grow)) if self.grow else x


def _convolution(conv: Conv, architecture: Architecture, widths: Mapping[str, int]) -> Convolution:
    return Convolution(conv, architecture.width(conv.source, widths), architecture.width(conv.target, widths))


def _norm(groups: Groups, architecture: Architecture, widths: Mapping[str, int], layout: MaskLayout | None) -> MaskedBatchNorm:
    return MaskedBatchNorm(architecture.width(groups, widths), layout.slice_of(groups) if layout else None)


class Extractor(nn.Module):
    """Maps images (N, 3, H, W) to feature vectors (N, F).

    Args:
        architecture: the description.
        widths: channels of every group after compaction; None builds the full (dense, maskable) network.

    Only the full network takes masks: a compact one has none left.

    Raises:
        ValueError: from `forward`, if masks do not have one entry per channel of the network's groups, or if a compact network gets any.
    """

    def __init__(self, architecture: Architecture, widths: Mapping[str, int] | None = None) -> None:
        super().__init__()
        self.architecture = architecture
        self.widths = dict(architecture.groups if widths is None else widths)
        layout = MaskLayout(architecture) if widths is None else None
        self.maskable = layout.channels if layout else 0
        self.stem = _convolution(architecture.stem, architecture, self.widths)
        outer = architecture.features if architecture.preactivation else architecture.stem.target
        self.norm = _norm(outer, architecture, self.widths, layout)
        self.blocks = nn.ModuleList(ResidualBlock(block, architecture, self.widths, layout) for block in architecture.blocks)

    @property
    def features(self) -> int:
        """Length of the feature vector."""
        return self.architecture.width(self.architecture.features, self.widths)

    def forward(self, images: Tensor, masks: Tensor | None = None) -> Tensor:
        """Return features (N, F); `masks` is the flat mask vector (C,), or None for all ones."""
        self.check_masks(masks)
        x: Tensor = self.stem(images)
        if not self.architecture.preactivation:
            x = self.norm(x, masks)
        if self.architecture.pool:
            x = F.max_pool2d(x, 3, 2, 1) if x.shape[1] else x[:, :, ::2, ::2]
        for block in self.blocks:
            x = block(x, masks)
        if self.architecture.preactivation:
            x = self.norm(x, masks)
        return x.mean((2, 3))

    def check_masks(self, masks: Tensor | None) -> None:
        """Raise ValueError unless masks are None or have one entry per maskable channel of this network."""
        if masks is not None and masks.shape != (self.maskable,):
            wanted = f"have {self.maskable} entries" if self.maskable else "be None because the network is compact"
            raise ValueError(f"masks of {self.architecture.name} must {wanted}, but their shape is {tuple(masks.shape)}")

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> Extractor:
        """Draw convolution weights and reset batch-norm, as `INITIALISATION` says; returns self."""
        for module in self.modules():
            if isinstance(module, Convolution):
                module.weight.copy_(INITIALISATION.draw(module.weight, generator))
            elif isinstance(module, MaskedBatchNorm):
                module.weight.fill_(1)
                module.bias.zero_()
                module.running_mean.zero_()
                module.running_var.fill_(1)
        for module in self.modules():
            if isinstance(module, ResidualBlock) and not module.preactivation:
                nn.init.constant_(module.norms[-1].get_parameter("weight"), INITIALISATION.branches)
        return self
