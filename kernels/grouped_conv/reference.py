"""A ragged grouped convolution in plain PyTorch, one extractor after another: the definition of correct.

For extractor i with input channels S_i, output channels T_i and residual channels R_i, all of them ranges of concatenated tensors:

    y[:, T_i] = conv(x[:, S_i], W_i) + b_i + h[:, R_i, ::r, ::r]
    a = max(y, 0) where the layer has a ReLU,   features = mean over height and width of a, where it pools

R_i may have fewer channels than T_i: missing channels count as zero (option-A shortcuts), as does a missing W_i (a lost branch).

Layout: x (N, ΣC, H, W), h and the result likewise, with channels-last strides. Products and sums, bias, residual, ReLU and mean in
float32 (float64 with float64), rounded once to the dtype of x; the features stay in float32 (float64). Nothing is saved for backward.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from der_fast.kernels.grouped_conv.layer import GroupedLayer


def grouped_conv_reference(
    x: Tensor, layer: GroupedLayer, *, residual: Tensor | None = None, residual_stride: int = 1, pool: bool = False
) -> Tensor:
    """Return the result (N, outputs, H', W') in channels-last strides, or with `pool` the features (N, outputs)."""
    wide = layer.bias.dtype
    height, width = (-(-side // layer.stride) for side in x.shape[2:])
    out = torch.empty(x.shape[0], layer.outputs, height, width, dtype=wide, device=x.device, memory_format=torch.channels_last)
    for entry in layer.entries:
        here = slice(entry.target, entry.target + entry.outputs)
        y = layer.bias[here, None, None].expand(x.shape[0], -1, height, width).clone()
        if entry.inputs:
            part = x[:, entry.source : entry.source + entry.inputs].to(wide)
            y += F.conv2d(part, layer.weight(entry).to(wide), None, layer.stride, layer.kernel // 2)
        if residual is not None and entry.residual_channels:
            channels = slice(entry.residual, entry.residual + entry.residual_channels)
            y[:, : entry.residual_channels] += residual[:, channels, ::residual_stride, ::residual_stride].to(wide)
        out[:, here] = y.relu() if layer.relu else y
    return out.mean((2, 3)) if pool else out.to(x.dtype)
