# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""From partial results to per-channel values, in Triton: one small launch in each direction.

A program owns BLOCK_C channels and walks down the partial results, BLOCK_P at a time, always in the same order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from der_fast.kernels.affine import Affine
from der_fast.kernels.compile_case import CompileCase

# Eight float32 are one sector of 32 bytes.
BLOCK_C = 8


def _block(parts: int) -> int:
    return min(128, max(16, 1 << (parts - 1).bit_length()))


@triton.jit
def _finalize_kernel(partials, weight, bias, mask, out, parts, channels, eps, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    dtype = out.dtype.element_ty
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < channels
    part = tl.arange(0, BLOCK_P).to(tl.int64)
    # Relative to one of the means, a sum of equal means is exact.
    pivot = tl.load(partials + channels + channel, mask=inside, other=0)
    pivot = tl.where(tl.load(partials + channel, mask=inside, other=0) > 0, pivot, 0.0)[None, :]
    count = tl.zeros((BLOCK_P, BLOCK_C), dtype)
    mean = tl.zeros((BLOCK_P, BLOCK_C), dtype)
    square = tl.zeros((BLOCK_P, BLOCK_C), dtype)
    for start in range(0, parts, BLOCK_P):
        valid = (start + part < parts)[:, None] & inside[None, :]
        offset = partials + (start + part)[:, None] * (3 * channels) + channel[None, :]
        others = tl.load(offset, mask=valid, other=0)
        filled = others > 0
        other_mean = tl.where(filled, tl.load(offset + channels, mask=valid, other=0) - pivot, 0.0)
        other_square = tl.where(filled, tl.load(offset + 2 * channels, mask=valid, other=0), 0.0)
        total = count + others
        share = tl.where(filled, others / tl.maximum(total, 1.0), 0.0)
        away = other_mean - mean
        square += tl.where(filled, other_square + away * away * count * share, 0.0)
        mean += away * share
        count = total
    elements = tl.where(inside, tl.sum(count, 0), 2.0)
    merged = tl.sum(count * mean, 0) / elements
    spread = mean - merged[None, :]
    squares = tl.sum(square + count * spread * spread, 0)
    centre = merged + tl.sum(pivot, 0)
    variance = squares / elements + eps
    # Plain float32 division and square root are approximate on the GPU.
    rstd = 1.0 / tl.sqrt(variance) if dtype == tl.float64 else tl.div_rn(1.0, tl.sqrt_rn(variance))
    gamma = tl.load(weight + channel, mask=inside, other=0)
    scale = gamma * rstd
    shift = tl.load(bias + channel, mask=inside, other=0) - gamma * centre * rstd
    if mask is not None:
        kept = tl.load(mask + channel, mask=inside, other=0)
        scale *= kept
        shift *= kept
    out += channel
    tl.store(out, centre, mask=inside)
    tl.store(out + channels, rstd, mask=inside)
    tl.store(out + 2 * channels, scale, mask=inside)
    tl.store(out + 3 * channels, shift, mask=inside)
    tl.store(out + 4 * channels, squares / (elements - 1), mask=inside)


@triton.jit
def _coefficients_kernel(
    partials, mean, rstd, scale, weight, bias, mask, out, parts, channels, inverse, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):
    dtype = out.dtype.element_ty
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < channels
    part = tl.arange(0, BLOCK_P).to(tl.int64)
    first = tl.zeros((BLOCK_P, BLOCK_C), dtype)
    second = tl.zeros((BLOCK_P, BLOCK_C), dtype)
    for start in range(0, parts, BLOCK_P):
        valid = (start + part < parts)[:, None] & inside[None, :]
        offset = partials + (start + part)[:, None] * (2 * channels) + channel[None, :]
        first += tl.load(offset, mask=valid, other=0)
        second += tl.load(offset + channels, mask=valid, other=0)
    s1 = tl.sum(first, 0)
    s2 = tl.sum(second, 0)
    k0 = tl.load(scale + channel, mask=inside, other=0)
    k1 = -k0 * tl.load(rstd + channel, mask=inside, other=0) * (s2 * inverse)
    k2 = -k0 * (s1 * inverse) - k1 * tl.load(mean + channel, mask=inside, other=0)
    out += channel
    tl.store(out, k0, mask=inside)
    tl.store(out + channels, k1, mask=inside)
    tl.store(out + 2 * channels, k2, mask=inside)
    if mask is not None:
        gamma = tl.load(weight + channel, mask=inside, other=0)
        beta = tl.load(bias + channel, mask=inside, other=0)
        tl.store(out + 5 * channels, gamma * s2 + beta * s1, mask=inside)
        kept = tl.load(mask + channel, mask=inside, other=0)
        s1 *= kept
        s2 *= kept
    tl.store(out + 3 * channels, s2, mask=inside)
    tl.store(out + 4 * channels, s1, mask=inside)


def finalize(partials: Tensor, weight: Tensor, bias: Tensor, mask: Tensor | None, eps: float) -> tuple[Affine, Tensor, Tensor]:
    """Launch the merge of the statistics; see `passes.finalize`."""
    parts, _, channels = partials.shape
    out = torch.empty(5, channels, dtype=partials.dtype, device=partials.device)
    with torch.cuda.device_of(partials):
        _finalize_kernel[(triton.cdiv(channels, BLOCK_C),)](
            partials, weight, bias, mask, out, parts, channels, eps, BLOCK_P=_block(parts), BLOCK_C=BLOCK_C, enable_fp_fusion=True
        )
    mean, rstd, scale, shift, var = out.unbind(0)
    return Affine(mean, rstd, scale, shift), mean, var


def backward_coefficients(
    partials: Tensor, count: float, affine: Affine, weight: Tensor, bias: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Launch the sum of the two reductions and what follows from it; see `passes.backward_coefficients`."""
    parts, _, channels = partials.shape
    out = torch.empty(5 if mask is None else 6, channels, dtype=partials.dtype, device=partials.device)
    with torch.cuda.device_of(partials):
        _coefficients_kernel[(triton.cdiv(channels, BLOCK_C),)](
            partials,
            affine.mean,
            affine.rstd,
            affine.scale,
            weight,
            bias,
            mask,
            out,
            parts,
            channels,
            1.0 / count,
            BLOCK_P=_block(parts),
            BLOCK_C=BLOCK_C,
            enable_fp_fusion=True,
        )
    return out[:3], out[3], out[4], None if mask is None else out[5]


def compile_cases() -> list[CompileCase]:
    """Return both launches, for channels that are multiples of 16 and for others."""
    vectors = dict.fromkeys(("partials", "weight", "bias", "mask", "out"), "*fp32")
    sizes = {"parts": "i32", "channels": "i32"}
    blocks = {"BLOCK_P": 128, "BLOCK_C": BLOCK_C}
    statistics = dict.fromkeys(("mean", "rstd", "scale"), "*fp32")

    def both(name, kernel, signature):
        pointers = tuple(name for name, kind in signature.items() if kind.startswith("*"))
        for channels, aligned in (("64", (*pointers, "channels")), ("37", pointers)):
            yield CompileCase(f"masked_bn.{name}.{channels}", kernel, signature, blocks, aligned)

    return [
        *both("finalize", _finalize_kernel, {**vectors, **sizes, "eps": "fp32"}),
        *both("coefficients", _coefficients_kernel, {**vectors, **statistics, **sizes, "inverse": "fp32"}),
    ]
