"""The networks of the comparisons, written as in tutorials: torch.nn modules, nothing folded, nothing fused."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from der_fast.kernels.conv.strided import convolve
from der_fast.model.architecture import Architecture, Block, Conv


class PlainBlock(nn.Module):
    """A residual block."""

    def __init__(self, block: Block, net: Architecture) -> None:
        super().__init__()
        self.layers = nn.ModuleList(PlainConv(conv, net) for conv in block.convs)
        self.norms = nn.ModuleList(nn.BatchNorm2d(net.width(conv.target)) for conv in block.convs)
        self.stride, self.grow = block.stride, 0 if block.shortcut else net.width(block.target) - net.width(block.source)
        self.shortcut = None
        if block.shortcut:
            self.shortcut = nn.Sequential(PlainConv(block.shortcut, net), nn.BatchNorm2d(net.width(block.target)))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C', H', W')."""
        if self.shortcut is not None:
            residual = self.shortcut(x)
        else:
            residual = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.grow)) if self.grow else x
        for conv, norm in zip(self.layers[:-1], self.norms[:-1], strict=True):
            x = F.relu(norm(conv(x)))
        return F.relu(self.norms[-1](self.layers[-1](x)) + residual)


class PlainConv(nn.Conv2d):
    """A convolution without bias. In training it avoids the kernel that damages the heap on some CPUs (`kernels.conv.strided`)."""

    def __init__(self, conv: Conv, net: Architecture) -> None:
        super().__init__(net.width(conv.source), net.width(conv.target), conv.kernel, conv.stride, conv.kernel // 2, bias=False)
        self.step, self.border = conv.stride, conv.kernel // 2

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, K, H', W')."""
        return convolve(x, self.weight, self.step, self.border) if self.training else super().forward(x)


class PlainFeatures(nn.Module):
    """A ResNet without a classifier."""

    def __init__(self, net: Architecture) -> None:
        super().__init__()
        self.stem = nn.Sequential(PlainConv(net.stem, net), nn.BatchNorm2d(net.width(net.stem.target)), nn.ReLU())
        self.pool = nn.MaxPool2d(3, 2, 1) if net.pool else nn.Identity()
        self.blocks = nn.Sequential(*(PlainBlock(block, net) for block in net.blocks))

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) → (N, F)."""
        out: Tensor = self.blocks(self.pool(self.stem(x))).mean((2, 3))
        return out


class PlainNet(nn.Module):
    """A ResNet with a classifier."""

    def __init__(self, net: Architecture, classes: int) -> None:
        super().__init__()
        self.features = PlainFeatures(net)
        self.head = nn.Linear(net.width(net.features), classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) → (N, classes)."""
        out: Tensor = self.head(self.features(x))
        return out
