"""The passes that make up `masked_bn`, in plain PyTorch: the definition of correct for each of them.

Activations are (N, C, H, W) in channels-last strides: physically M = N·H·W rows of C. Everything per channel, and every sum, is float32
(float64 for float64 activations). README.md in this folder derives the backward passes and counts the bytes.

The ReLU passes a value unless it is ≤ 0, so that NaN stays NaN; forward and backward test the same z in the accumulator's dtype.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from der_fast.kernels.affine import Affine, affine_of
from der_fast.kernels.bits import pack_bits, unpack_bits
from der_fast.kernels.dtypes import accumulator
from der_fast.kernels.masked_bn.norms import Statistics, Sums

# Rows per entry of the partial sums.
ROWS = 4096

ReluFrom = Literal["none", "recompute"] | Tensor


def rows_of(y: Tensor) -> Tensor:
    """Return (N, C, H, W) as (N·H·W, C); a view where y is channels-last."""
    return y.permute(0, 2, 3, 1).reshape(-1, y.shape[1])


def image_of(rows: Tensor, like: Tensor) -> Tensor:
    """Return (N·H·W, C) as (N, C, H, W) in channels-last strides, with the dtype of `like`."""
    batch, channels, height, width = like.shape
    return rows.to(like.dtype).reshape(batch, height, width, channels).permute(0, 3, 1, 2)


def statistics_reference(y: Tensor) -> Tensor:
    """Return (P, 3, C): count, mean and Σ(y − mean)² of each block of rows."""
    return torch.stack([_statistics_of(block) for block in torch.split(rows_of(y).to(accumulator(y.dtype)), ROWS)])


def _statistics_of(rows: Tensor) -> Tensor:
    # Relative to one of the rows, so that a large mean costs no precision.
    away = rows - rows[0]
    step = away.mean(0)
    return torch.stack([torch.full_like(step, len(rows)), rows[0] + step, (away - step).square().sum(0)])


def finalize_reference(norm: Statistics, eps: float) -> tuple[Affine, Tensor, Tensor]:
    """Merge the partial statistics (Chan et al., 1979) and move the running ones; return the Affine, the mean and the unbiased variance."""
    counts, means, squares = norm.partials.unbind(1)
    filled = counts > 0
    total = counts.sum(0)
    # Relative to one of the means, a sum of equal means is exact.
    pivot = means[filled.to(torch.uint8).argmax(0), torch.arange(means.shape[1], device=means.device)]
    away = torch.where(filled, means - pivot, 0)
    step = (counts * away).sum(0) / total
    square = torch.where(filled, squares + counts * (away - step).square(), 0).sum(0)
    mean, variance = pivot + step, square / (total - 1)
    if norm.running is not None:
        norm.running.mean.lerp_(mean, norm.running.momentum)
        norm.running.variance.lerp_(variance, norm.running.momentum)
    return affine_of(mean, square / total, norm.weight, norm.bias, norm.mask, eps), mean, variance


def apply_reference(
    y: Tensor,
    affine: tuple[Tensor, Tensor],
    residual: Tensor | None,
    residual_affine: tuple[Tensor, Tensor] | None,
    relu: bool,
    keep_bits: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return a = [ReLU](y·scale + shift [+ residual, or its affine image]) and, with `keep_bits`, the bits of z that the ReLU passes."""
    dtype = accumulator(y.dtype)
    z = rows_of(y).to(dtype) * affine[0] + affine[1]
    if residual is not None:
        added = rows_of(residual).to(dtype)
        z = z + (added if residual_affine is None else added * residual_affine[0] + residual_affine[1])
    passes = ~(z <= 0)
    out = torch.where(passes, z, 0) if relu else z
    return image_of(out, y), pack_bits(passes) if keep_bits else None


def gated(g: Tensor, y: Tensor, relu_from: ReluFrom, affine: Affine) -> Tensor:
    """Return g_z = g·1[the ReLU passed z] as (M, C) in the accumulator's dtype."""
    rows = rows_of(g).to(accumulator(y.dtype))
    if isinstance(relu_from, Tensor):
        return torch.where(unpack_bits(relu_from, y.shape[1]), rows, 0)
    if relu_from == "none":
        return rows
    return torch.where(rows_of(y).to(rows.dtype) * affine.scale + affine.shift <= 0, 0, rows)


def backward_reduce_reference(
    g: Tensor, y: Tensor, affine: Affine, relu_from: ReluFrom, shortcut: tuple[Tensor, Affine] | None, write_gz: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return (P, 2, C) partial sums of g_z and g_z·x̂, the same for the shortcut's batch-norm, and g_z."""
    g_z = gated(g, y, relu_from, affine)

    def sums(values: Tensor, norm: Affine) -> Tensor:
        x_hat = (rows_of(values).to(g_z.dtype) - norm.mean) * norm.rstd
        blocks = zip(torch.split(g_z, ROWS), torch.split(g_z * x_hat, ROWS), strict=True)
        return torch.stack([torch.stack([first.sum(0), second.sum(0)]) for first, second in blocks])

    return sums(y, affine), None if shortcut is None else sums(*shortcut), image_of(g_z, g) if write_gz else None


def backward_coefficients_reference(norm: Sums) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return k (3, C) with dy = k0·g_z + k1·y + k2, and dγ, dβ, dm."""
    first, second = norm.partials.sum(0)
    affine, mask = norm.affine, norm.mask
    slope = -affine.scale * affine.rstd * (second / norm.count)
    k = torch.stack([affine.scale, slope, -affine.scale * (first / norm.count) - slope * affine.mean])
    if mask is None:
        return k, second, first, None
    return k, mask * second, mask * first, norm.weight * second + norm.bias * first


def backward_apply_reference(g: Tensor, y: Tensor, k: Tensor, relu_from: ReluFrom, affine: Affine) -> Tensor:
    """Return dy = k0·g_z + k1·y + k2."""
    g_z = gated(g, y, relu_from, affine)
    return image_of(k[0] * g_z + k[1] * rows_of(y).to(g_z.dtype) + k[2], y)
