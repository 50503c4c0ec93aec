"""Convolution with the operations fused before and after it, in plain PyTorch: the definition of correct.

With a = x without prologue, a = ReLU(x·scale + shift) with it (rounded to x's dtype), p = R // 2 and a = 0 outside the image:

    forward  y[n,h,w,k]  = Σ_{r,s,c} a[n, h·S + r − p, w·S + s − p, c] · w[k,r,s,c]
    dgrad    dx[n,i,j,c] = Σ_{r,s,k} g[n, (i + p − r)/S, (j + p − s)/S, k] · w[k,r,s,c]   where both quotients are whole and inside
    wgrad    dw[k,r,s,c] = Σ_{n,h,w} g[n,h,w,k] · a[n, h·S + r − p, w·S + s − p, c]

Where the gradient is that of a batch-norm's output, g = k0·g_z + k1·y + k2 per channel (rounded to g_z's dtype) and never stored.

Layout: activations (N, C, H, W) with channels_last strides, weights (K, C, R, R) likewise. Affine maps, statistics and their sums are
computed in float32 (float64 for float64 input); the convolution itself runs in x's dtype as eager PyTorch's does, so that wgrad in bfloat16
is rounded to bfloat16 once. Bytes moved: folder's README.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from der_fast.kernels.affine import Affine
from der_fast.kernels.bits import unpack_bits
from der_fast.kernels.conv.join import Join
from der_fast.kernels.conv.strided import convolve, convolve_backward


def conv_forward_reference(
    x: Tensor,
    weight: Tensor,
    *,
    stride: int,
    prologue: tuple[Tensor, Tensor] | None,
    statistics: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return y (N, K, H', W') and, with `statistics`, one block of partials (1, 3, K): count, mean and M2 of y as stored."""
    out = convolve(_activation(x, prologue), weight, stride, weight.shape[2] // 2)
    out = out.contiguous(memory_format=torch.channels_last)
    return out, _moments(out) if statistics else None


def conv_dgrad_reference(
    g: Tensor,
    weight: Tensor,
    input_hw: tuple[int, int],
    *,
    stride: int,
    g_affine: tuple[Tensor, Tensor] | None,
    epilogue: tuple[Tensor, Affine] | None,
) -> tuple[Tensor, Tensor | None]:
    """Return the gradient of the input; with `epilogue`, that of z = y_in·scale + shift before the ReLU, and its sums (1, 2, C)."""
    batch, (_, channels, kernel, _) = g.shape[0], weight.shape
    like = g.new_empty((batch, channels, *input_hw)).to(memory_format=torch.channels_last)
    out, _ = convolve_backward(_gradient(g, g_affine), like, weight, stride, kernel // 2, (True, False))
    out = out.contiguous(memory_format=torch.channels_last)
    if epilogue is None:
        return out, None
    join = Join(*epilogue)
    out = _through_relu(out, join)
    return out, _sums(out, *epilogue)


def conv_dgrad_joined_reference(
    g: Tensor,
    weight: Tensor,
    input_hw: tuple[int, int],
    *,
    stride: int,
    g_affine: tuple[Tensor, Tensor] | None,
    added: Tensor,
    join: Join,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return g_z = (dx + added)·1[the join's ReLU passed], its sums (1, 2, C), and those at the shortcut's batch-norm or None."""
    out, _ = conv_dgrad_reference(g, weight, input_hw, stride=stride, g_affine=g_affine, epilogue=None)
    out = _through_relu((_wide(out) + _wide(added)).to(g.dtype), join)
    return out, _sums(out, join.y, join.affine), None if join.shortcut is None else _sums(out, *join.shortcut)


def conv_wgrad_reference(
    x: Tensor,
    g: Tensor,
    kernel: int,
    *,
    stride: int,
    prologue: tuple[Tensor, Tensor] | None,
    g_affine: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Return the gradient of the weight (K, C, R, R), float32 (float64 for float64 input), channels_last strides."""
    like = x.new_empty((g.shape[1], x.shape[1], kernel, kernel)).to(memory_format=torch.channels_last)
    _, out = convolve_backward(_gradient(g, g_affine), _activation(x, prologue), like, stride, kernel // 2, (False, True))
    return _wide(out).contiguous(memory_format=torch.channels_last)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _per_channel(vector: Tensor) -> Tensor:
    return vector.reshape(1, -1, 1, 1)


def _activation(x: Tensor, prologue: tuple[Tensor, Tensor] | None) -> Tensor:
    if prologue is None:
        return x
    scale, shift = prologue
    return (_wide(x) * _per_channel(scale) + _per_channel(shift)).relu().to(x.dtype)


def _gradient(g: Tensor, g_affine: tuple[Tensor, Tensor] | None) -> Tensor:
    if g_affine is None:
        return g
    k, y = g_affine
    return (_per_channel(k[0]) * _wide(g) + _per_channel(k[1]) * _wide(y) + _per_channel(k[2])).to(g.dtype)


def _through_relu(gradient: Tensor, join: Join) -> Tensor:
    if join.bits is None:
        # Not `> 0`: PyTorch's ReLU passes the gradient of a NaN.
        shut = _wide(join.y) * _per_channel(join.affine.scale) + _per_channel(join.affine.shift) <= 0
    else:
        batch, channels, height, width = gradient.shape
        shut = ~unpack_bits(join.bits, channels).reshape(batch, height, width, channels).permute(0, 3, 1, 2)
    return torch.where(shut, 0, gradient)


def _sums(g_z: Tensor, y: Tensor, affine: Affine) -> Tensor:
    normalised = (_wide(y) - _per_channel(affine.mean)) * _per_channel(affine.rstd)
    return torch.stack([_wide(g_z).sum((0, 2, 3)), (_wide(g_z) * normalised).sum((0, 2, 3))])[None]


def _moments(y: Tensor) -> Tensor:
    wide = _wide(y)
    variance, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
    count = y.numel() // y.shape[1]
    return torch.stack([torch.full_like(mean, count), mean, variance * count])[None]
