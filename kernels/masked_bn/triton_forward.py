# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""The forward passes over the activations in Triton: batch statistics, and scale + shift (+ residual) (+ ReLU).

A program owns `tiles` tiles of (BLOCK_M, BLOCK_C) of a (rows, width) view of the activations (see launch.py). It addresses a tile with a
64-bit offset; offsets inside a tile fit 32 bits. The tiles of a reduction are a stride apart, so that all programs together walk down the
tensor. Passes that write walk up: they start with what the previous pass left in the L2 cache, and leave the tensor's start there for the
next pass.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from der_fast.kernels.compile_case import CompileCase
from der_fast.kernels.device import multiprocessors
from der_fast.kernels.dtypes import accumulator
from der_fast.kernels.masked_bn import launch as choose
from der_fast.kernels.masked_bn.cases import cases
from der_fast.kernels.masked_bn.launch import Launch

# Programs per multiprocessor, as the statistics pass's registers allow.
RESIDENT = 7


@triton.jit
def _statistics_kernel(y, partials, rows, width, channels, fold, tiles, FOLDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    dtype = partials.dtype.element_ty
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    stride = tl.num_programs(0).to(tl.int64) * BLOCK_M
    row = tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = column < width
    offset = row[:, None] * width + column[None, :]
    y += first * width
    # Everything is relative to the program's first row, so that a large mean costs no precision.
    pivot = tl.load(y + column, mask=inside, other=0).to(dtype)
    mean = tl.zeros((BLOCK_M, BLOCK_C), dtype)
    square = tl.zeros((BLOCK_M, BLOCK_C), dtype)
    seen = tl.zeros((BLOCK_M,), tl.int32)
    for tile in range(tiles):
        # Each element of the tile runs Welford's recurrence down its own column; threads synchronise once, after the loop.
        left = tl.minimum(rows - first - tile * stride, BLOCK_M).to(tl.int32)
        valid = (row < left)[:, None] & inside[None, :]
        value = tl.load(y + offset, mask=valid, other=0).to(dtype) - pivot[None, :]
        away = value - mean
        moved = mean + away * (1.0 / (tile + 1))
        square = tl.where(valid, square + away * (value - moved), square)
        mean = tl.where(valid, moved, mean)
        seen += (row < left).to(tl.int32)
        y += stride * width
    count = tl.sum(seen, 0).to(dtype)
    seen = seen.to(dtype)[:, None]
    merged = tl.sum(seen * mean, 0) / count
    spread = mean - merged[None, :]
    total = tl.sum(square + seen * spread * spread, 0)
    group, channel = 0, column
    if FOLDED:
        group, channel = column // channels, column % channels
    out = partials + (tl.program_id(0).to(tl.int64) * fold + group) * (3 * channels) + channel
    tl.store(out, tl.zeros((BLOCK_C,), dtype) + count, mask=inside)
    tl.store(out + channels, pivot + merged, mask=inside)
    tl.store(out + 2 * channels, total, mask=inside)


@triton.jit
def _apply_kernel(
    y,
    scale,
    shift,
    residual,
    residual_scale,
    residual_shift,
    out,
    bits,
    rows,
    width,
    channels,
    tiles,
    RELU: tl.constexpr,
    FOLDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    dtype = scale.dtype.element_ty
    first = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64) * tiles * BLOCK_M
    left = tl.minimum(rows - first, tiles * BLOCK_M).to(tl.int32)
    row = tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = column < width
    channel = column
    if FOLDED:
        channel = column % channels
    factor = tl.load(scale + channel, mask=inside, other=0)[None, :]
    constant = tl.load(shift + channel, mask=inside, other=0)[None, :]
    if residual_scale is not None:
        residual_factor = tl.load(residual_scale + channel, mask=inside, other=0)[None, :]
        residual_constant = tl.load(residual_shift + channel, mask=inside, other=0)[None, :]
    y += first * width
    out += first * width
    offset = row[:, None] * width + column[None, :]
    if residual is not None:
        residual += first * width
    if bits is not None:
        bytes_per_row = (width + 7) // 8
        byte = tl.program_id(1) * (BLOCK_C // 8) + tl.arange(0, BLOCK_C // 8)
        byte_inside = byte < bytes_per_row
        byte_offset = row[:, None] * bytes_per_row + byte[None, :]
        bits += first * bytes_per_row
    for tile in range(tiles):
        row_inside = (row < left - tile * BLOCK_M)[:, None]
        valid = row_inside & inside[None, :]
        z = tl.load(y + offset, mask=valid, other=0).to(dtype) * factor + constant
        if residual is not None:
            added = tl.load(residual + offset, mask=valid, other=0).to(dtype)
            if residual_scale is not None:
                added = added * residual_factor + residual_constant
            z += added
        if bits is not None:
            flags = tl.where(z <= 0, 0, 1).to(tl.int32) << (column % 8)[None, :]
            packed = tl.sum(tl.reshape(flags, (BLOCK_M, BLOCK_C // 8, 8)), 2)
            tl.store(bits + byte_offset, packed.to(tl.uint8), mask=row_inside & byte_inside[None, :])
            bits += BLOCK_M * bytes_per_row
        if RELU:
            # Not a maximum: NaN must stay NaN.
            z = tl.where(z <= 0, 0.0, z)
        tl.store(out + offset, z.to(out.dtype.element_ty), mask=valid)
        y += BLOCK_M * width
        out += BLOCK_M * width
        if residual is not None:
            residual += BLOCK_M * width


def statistics(y: Tensor, launch: Launch | None) -> Tensor:
    """Launch the statistics pass; see `passes.statistics`."""
    channels = y.shape[1]
    view = choose.view(y.numel() // channels, channels)
    cut = launch or choose.reduction(view, multiprocessors(y.device), RESIDENT)
    programs, blocks = choose.grid(view, cut)
    partials = torch.empty(programs * view.fold, 3, channels, dtype=accumulator(y.dtype), device=y.device)
    with torch.cuda.device_of(y):
        _statistics_kernel[(programs, blocks)](
            y,
            partials,
            view.rows,
            view.width,
            channels,
            view.fold,
            cut.tiles,
            FOLDED=view.fold > 1,
            BLOCK_M=cut.block_rows,
            BLOCK_C=cut.block_columns,
            num_warps=cut.num_warps,
            enable_fp_fusion=True,
        )
    return partials


def apply(
    y: Tensor,
    affine: tuple[Tensor, Tensor],
    residual: Tensor | None,
    residual_affine: tuple[Tensor, Tensor] | None,
    relu: bool,
    keep_bits: bool,
    launch: Launch | None,
) -> tuple[Tensor, Tensor | None]:
    """Launch the scale-and-shift pass; see `passes.apply`."""
    channels = y.shape[1]
    rows = y.numel() // channels
    # Every row of bits starts with a new byte, so rows can only be folded where they share no byte.
    view = choose.view(rows, channels, foldable=not keep_bits or channels % 8 == 0)
    cut = launch or choose.elementwise(view, multiprocessors(y.device))
    out = torch.empty_like(y, memory_format=torch.channels_last)
    bits = torch.empty(rows, -(-channels // 8), dtype=torch.uint8, device=y.device) if keep_bits else None
    with torch.cuda.device_of(y):
        _apply_kernel[choose.grid(view, cut)](
            y,
            *affine,
            residual,
            *(residual_affine or (None, None)),
            out,
            bits,
            view.rows,
            view.width,
            channels,
            cut.tiles,
            RELU=relu,
            FOLDED=view.fold > 1,
            BLOCK_M=cut.block_rows,
            BLOCK_C=cut.block_columns,
            num_warps=cut.num_warps,
            enable_fp_fusion=True,
        )
    return out, bits


def compile_cases() -> list[CompileCase]:
    """Return the launches of a training step's forward pass."""
    tensors = {"y": "act", "scale": "fp32", "shift": "fp32", "out": "act"}
    joined = {**tensors, "residual": "act", "residual_scale": "fp32", "residual_shift": "fp32", "bits": "u8"}
    return [
        *cases(_statistics_kernel, "statistics", {"y": "act", "partials": "fp32"}, {}, RESIDENT),
        *cases(_apply_kernel, "apply", tensors, {"RELU": True}),
        *cases(_apply_kernel, "apply.shortcut.bits", joined, {"RELU": True}),
    ]
