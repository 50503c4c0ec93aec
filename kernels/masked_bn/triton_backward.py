# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""The backward passes over the activations in Triton: the two reductions, and the gradient of the convolution's output.

Programs are cut as in triton_forward.py. g_z = g·1[the ReLU passed z], recomputed from y·scale + shift or read from the stored bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from der_fast.kernels.affine import Affine
from der_fast.kernels.compile_case import CompileCase
from der_fast.kernels.device import multiprocessors
from der_fast.kernels.dtypes import accumulator
from der_fast.kernels.masked_bn import launch as choose
from der_fast.kernels.masked_bn.cases import cases
from der_fast.kernels.masked_bn.launch import Launch
from der_fast.kernels.masked_bn.reference_passes import ReluFrom

# Programs per multiprocessor, as the reductions' registers allow.
RESIDENT, RESIDENT_WITH_SHORTCUT = 5, 4


@triton.jit
def _passed(bits, row, row_inside, width, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return whether the stored bit is set, for a tile whose first row `bits` points at."""
    byte = tl.program_id(1) * (BLOCK_C // 8) + tl.arange(0, BLOCK_C // 8)
    bytes_per_row = (width + 7) // 8
    packed = tl.load(bits + row[:, None] * bytes_per_row + byte[None, :], mask=row_inside & (byte < bytes_per_row)[None, :], other=0)
    spread = tl.broadcast_to(packed.to(tl.int32)[:, :, None], (BLOCK_M, BLOCK_C // 8, 8))
    return (tl.reshape(spread, (BLOCK_M, BLOCK_C)) >> (tl.arange(0, BLOCK_C) % 8)[None, :]) & 1 != 0


@triton.jit
def _reduce_kernel(
    g,
    y,
    mean,
    rstd,
    scale,
    shift,
    bits,
    shortcut,
    shortcut_mean,
    shortcut_rstd,
    gz,
    partials,
    shortcut_partials,
    rows,
    width,
    channels,
    fold,
    tiles,
    RECOMPUTE: tl.constexpr,
    FOLDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    dtype = partials.dtype.element_ty
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    stride = tl.num_programs(0).to(tl.int64) * BLOCK_M
    row = tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = column < width
    group, channel = 0, column
    if FOLDED:
        group, channel = column // channels, column % channels
    centre = tl.load(mean + channel, mask=inside, other=0)[None, :]
    if RECOMPUTE:
        factor = tl.load(scale + channel, mask=inside, other=0)[None, :]
        constant = tl.load(shift + channel, mask=inside, other=0)[None, :]
    if shortcut is not None:
        shortcut_centre = tl.load(shortcut_mean + channel, mask=inside, other=0)[None, :]
        shortcut += first * width
        third = tl.zeros((BLOCK_M, BLOCK_C), dtype)
    g += first * width
    y += first * width
    if bits is not None:
        bits += first * ((width + 7) // 8)
    if gz is not None:
        gz += first * width
    offset = row[:, None] * width + column[None, :]
    sum1 = tl.zeros((BLOCK_M, BLOCK_C), dtype)
    sum2 = tl.zeros((BLOCK_M, BLOCK_C), dtype)
    for tile in range(tiles):
        left = tl.minimum(rows - first - tile * stride, BLOCK_M).to(tl.int32)
        row_inside = (row < left)[:, None]
        valid = row_inside & inside[None, :]
        # Elements outside are loaded as g = 0 and add nothing.
        gradient = tl.load(g + offset, mask=valid, other=0).to(dtype)
        value = tl.load(y + offset, mask=valid, other=0).to(dtype)
        if bits is not None:
            gradient = tl.where(_passed(bits, row, row_inside, width, BLOCK_M, BLOCK_C), gradient, 0.0)
            bits += stride * ((width + 7) // 8)
        if RECOMPUTE:
            gradient = tl.where(value * factor + constant <= 0, 0.0, gradient)
        sum1 += gradient
        sum2 += gradient * (value - centre)
        if shortcut is not None:
            third += gradient * (tl.load(shortcut + offset, mask=valid, other=0).to(dtype) - shortcut_centre)
            shortcut += stride * width
        if gz is not None:
            tl.store(gz + offset, gradient.to(gz.dtype.element_ty), mask=valid)
            gz += stride * width
        g += stride * width
        y += stride * width
    s1 = tl.sum(sum1, 0)
    place = (tl.program_id(0).to(tl.int64) * fold + group) * (2 * channels) + channel
    tl.store(partials + place, s1, mask=inside)
    tl.store(partials + place + channels, tl.sum(sum2, 0) * tl.load(rstd + channel, mask=inside, other=0), mask=inside)
    if shortcut is not None:
        tl.store(shortcut_partials + place, s1, mask=inside)
        s3 = tl.sum(third, 0) * tl.load(shortcut_rstd + channel, mask=inside, other=0)
        tl.store(shortcut_partials + place + channels, s3, mask=inside)


@triton.jit
def _dy_kernel(
    g,
    y,
    k,
    scale,
    shift,
    bits,
    out,
    rows,
    width,
    channels,
    tiles,
    RECOMPUTE: tl.constexpr,
    FOLDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    dtype = k.dtype.element_ty
    first = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64) * tiles * BLOCK_M
    left = tl.minimum(rows - first, tiles * BLOCK_M).to(tl.int32)
    row = tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = column < width
    channel = column
    if FOLDED:
        channel = column % channels
    k0 = tl.load(k + channel, mask=inside, other=0)[None, :]
    k1 = tl.load(k + channels + channel, mask=inside, other=0)[None, :]
    k2 = tl.load(k + 2 * channels + channel, mask=inside, other=0)[None, :]
    if RECOMPUTE:
        factor = tl.load(scale + channel, mask=inside, other=0)[None, :]
        constant = tl.load(shift + channel, mask=inside, other=0)[None, :]
    g += first * width
    y += first * width
    out += first * width
    if bits is not None:
        bits += first * ((width + 7) // 8)
    offset = row[:, None] * width + column[None, :]
    for tile in range(tiles):
        row_inside = (row < left - tile * BLOCK_M)[:, None]
        valid = row_inside & inside[None, :]
        gradient = tl.load(g + offset, mask=valid, other=0).to(dtype)
        value = tl.load(y + offset, mask=valid, other=0).to(dtype)
        if bits is not None:
            gradient = tl.where(_passed(bits, row, row_inside, width, BLOCK_M, BLOCK_C), gradient, 0.0)
            bits += BLOCK_M * ((width + 7) // 8)
        if RECOMPUTE:
            gradient = tl.where(value * factor + constant <= 0, 0.0, gradient)
        tl.store(out + offset, (k0 * gradient + (k1 * value + k2)).to(out.dtype.element_ty), mask=valid)
        g += BLOCK_M * width
        y += BLOCK_M * width
        out += BLOCK_M * width


def _gate(relu_from: ReluFrom, channels: int) -> tuple[Tensor | None, bool, bool]:
    """Return the bits or None, whether the ReLU is recomputed, and whether rows may be folded."""
    bits = relu_from if isinstance(relu_from, Tensor) else None
    return bits, bits is None and relu_from == "recompute", bits is None or channels % 8 == 0


def backward_reduce(
    g: Tensor,
    y: Tensor,
    affine: Affine,
    relu_from: ReluFrom,
    shortcut: tuple[Tensor, Affine] | None,
    write_gz: bool,
    launch: Launch | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Launch the reductions; see `passes.backward_reduce`."""
    channels = y.shape[1]
    bits, recompute, foldable = _gate(relu_from, channels)
    view = choose.view(y.numel() // channels, channels, foldable)
    cut = launch or choose.reduction(view, multiprocessors(y.device), RESIDENT if shortcut is None else RESIDENT_WITH_SHORTCUT)
    programs, blocks = choose.grid(view, cut)
    partials = torch.empty(programs * view.fold, 2, channels, dtype=accumulator(y.dtype), device=y.device)
    shortcut_partials = None if shortcut is None else torch.empty_like(partials)
    gz = torch.empty_like(g, memory_format=torch.channels_last) if write_gz else None
    with torch.cuda.device_of(y):
        _reduce_kernel[(programs, blocks)](
            g,
            y,
            affine.mean,
            affine.rstd,
            affine.scale,
            affine.shift,
            bits,
            *((None, None, None) if shortcut is None else (shortcut[0], shortcut[1].mean, shortcut[1].rstd)),
            gz,
            partials,
            shortcut_partials,
            view.rows,
            view.width,
            channels,
            view.fold,
            cut.tiles,
            RECOMPUTE=recompute,
            FOLDED=view.fold > 1,
            BLOCK_M=cut.block_rows,
            BLOCK_C=cut.block_columns,
            num_warps=cut.num_warps,
            enable_fp_fusion=True,
        )
    return partials, shortcut_partials, gz


def backward_apply(g: Tensor, y: Tensor, k: Tensor, relu_from: ReluFrom, affine: Affine, launch: Launch | None) -> Tensor:
    """Launch the gradient of the convolution's output; see `passes.backward_apply`."""
    channels = y.shape[1]
    bits, recompute, foldable = _gate(relu_from, channels)
    view = choose.view(y.numel() // channels, channels, foldable)
    cut = launch or choose.elementwise(view, multiprocessors(y.device))
    out = torch.empty_like(y, memory_format=torch.channels_last)
    with torch.cuda.device_of(y):
        _dy_kernel[choose.grid(view, cut)](
            g,
            y,
            k,
            affine.scale,
            affine.shift,
            bits,
            out,
            view.rows,
            view.width,
            channels,
            cut.tiles,
            RECOMPUTE=recompute,
            FOLDED=view.fold > 1,
            BLOCK_M=cut.block_rows,
            BLOCK_C=cut.block_columns,
            num_warps=cut.num_warps,
            enable_fp_fusion=True,
        )
    return out


def compile_cases() -> list[CompileCase]:
    """Return the launches of a training step's backward pass."""
    images, gate = {"g": "act", "y": "act"}, {"scale": "fp32", "shift": "fp32"}
    sums = {**images, "mean": "fp32", "rstd": "fp32", "partials": "fp32"}
    vectors = dict.fromkeys(("shortcut_mean", "shortcut_rstd", "shortcut_partials"), "fp32")
    joined = {**sums, **vectors, "shortcut": "act", "gz": "act", "bits": "u8"}
    applied = {**images, "k": "fp32", "out": "act"}
    recomputed, stored = {"RECOMPUTE": True}, {"RECOMPUTE": False}
    return [
        *cases(_reduce_kernel, "backward_reduce", {**sums, **gate}, recomputed, RESIDENT),
        *cases(_reduce_kernel, "backward_reduce.shortcut.bits", joined, stored, RESIDENT_WITH_SHORTCUT),
        *cases(_dy_kernel, "backward_apply", {**applied, **gate}, recomputed),
        *cases(_dy_kernel, "backward_apply.bits", {**applied, "bits": "u8"}, stored),
    ]
