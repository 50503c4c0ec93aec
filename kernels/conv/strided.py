"""PyTorch's convolution and its gradients, without the kernel of its CPU library that writes out of bounds.

On processors with AVX2 but without AVX-512, the weight gradient of a 1×1 convolution with stride 2 and 2–7 input channels damages the heap
(docs/cpu.md). A 1×1 convolution reads only every stride-th pixel, so on the CPU those pixels are extracted first and the stride is 1: the
same products in another order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def convolve(x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """Return the convolution (N, K, H', W') of x (N, C, H, W) and weight (K, C, R, R) in their dtype, differentiable by autograd."""
    if _skips_pixels(x, weight, stride, padding):
        return F.conv2d(x[:, :, ::stride, ::stride], weight)
    return F.conv2d(x, weight, None, stride, padding)


def convolve_backward(g: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int, wanted: Sequence[bool]) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and weight, given the gradient g of `convolve`'s result; undefined where not wanted.

    Args:
        g: (N, K, H', W').
        x, weight: as in `convolve`; either may be uninitialised if no wanted gradient needs its values.
        stride, padding: as in `convolve`.
        wanted: whether the gradients of x and of weight are wanted.
    """
    skips = _skips_pixels(x, weight, stride, padding)
    source = x[:, :, ::stride, ::stride] if skips else x
    step = 1 if skips else stride
    # Called directly, because torch.nn.grad passes dummies with strides of 0, from which the layout is then guessed.
    settings = (None, [step] * 2, [padding] * 2, [1, 1], False, [0, 0], 1, [wanted[0], wanted[1], False])
    for_x, for_weight, _ = torch.ops.aten.convolution_backward(g, source, weight, *settings)
    if skips and wanted[0]:
        everywhere = torch.zeros_like(x)
        everywhere[:, :, ::stride, ::stride] = for_x
        for_x = everywhere
    return for_x, for_weight


def _skips_pixels(x: Tensor, weight: Tensor, stride: int, padding: int) -> bool:
    return stride > 1 and padding == 0 and weight.shape[2:] == (1, 1) and x.device.type == "cpu"
