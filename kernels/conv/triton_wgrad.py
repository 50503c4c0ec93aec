# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Gradient of a convolution's weight as an implicit GEMM: filters × (r, s, c), reduced over the rows (n, h, w) of the output.

The reduction is long and the result small, so it is cut into `split` parts. Each part writes its own float32 copy of the weight's
gradient, and a second kernel (triton_parts.py) adds the copies. Nothing is saved.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from der_fast.kernels import triton_runtime
from der_fast.kernels.compile_case import CompileCase
from der_fast.kernels.conv.cases import SIZES, Size, cases
from der_fast.kernels.conv.launch import ConvTiles, default_split, wgrad_tiles
from der_fast.kernels.conv.shape import ConvShape, unit_of
from der_fast.kernels.conv.triton_tiles import (
    affine_relu,
    constants,
    cut,
    formed_gradient,
    launch,
    multiply,
    tile_of,
    within,
)


@triton.jit
def _conv_wgrad_kernel(
    x,
    g,
    scale,
    shift,
    y,
    coefficients,
    parts,
    rows,
    rows_per_part,
    height,
    width,
    out_height,
    out_width,
    channel_units,
    filter_units,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    CHANNEL_UNIT: tl.constexpr,
    FILTER_UNIT: tl.constexpr,
    FLAT: tl.constexpr,
    DOT_F32: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    channels = channel_units * CHANNEL_UNIT
    filters = filter_units * FILTER_UNIT
    depth = KERNEL * KERNEL * channels
    tiles_n = tl.cdiv(depth, BLOCK_N) if FLAT else KERNEL * KERNEL * tl.cdiv(channels, BLOCK_N)
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(filters, BLOCK_M), tiles_n, GROUP)
    filter = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    tap, channel, index, wanted = cut(tile_n, channels, KERNEL * KERNEL, BLOCK_N, FLAT)
    r = tap // KERNEL - KERNEL // 2
    s = tap % KERNEL - KERNEL // 2
    if scale is not None:
        by = tl.load(scale + channel, mask=wanted, other=0.0)
        plus = tl.load(shift + channel, mask=wanted, other=0.0)
    if coefficients is not None:
        k0 = tl.load(coefficients + filter, mask=filter < filters, other=0.0)
        k1 = tl.load(coefficients + filters + filter, mask=filter < filters, other=0.0)
        k2 = tl.load(coefficients + 2 * filters + filter, mask=filter < filters, other=0.0)

    part = tl.program_id(1)
    begin = part * rows_per_part
    end = tl.minimum(begin + rows_per_part, rows)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    late = begin
    for start in range(begin, end, BLOCK_K):
        row = start + tl.arange(0, BLOCK_K)
        kept = (row < end)[:, None] & (filter < filters)[None, :]
        place = row.to(tl.int64)[:, None] * filters + filter[None, :]
        a = tl.load(g + place, mask=kept, other=0.0)
        if coefficients is not None:
            a = formed_gradient(a, tl.load(y + place, mask=kept, other=0.0), k0[None, :], k1[None, :], k2[None, :])
            a = tl.where((row < end)[:, None], a, 0.0).to(g.dtype.element_ty)
        h = (row // out_width) % out_height * STRIDE
        w = row % out_width * STRIDE
        image = row // (out_width * out_height)
        origin = ((image.to(tl.int64) * height + h) * width + w) * channels
        inside = (row < end)[:, None] & within(h[:, None] + r, w[:, None] + s, height, width)
        place = origin[:, None] + ((r * width + s) * channels + channel[None, :])
        b = tl.load(x + place, mask=inside & wanted[None, :], other=0.0)
        if scale is not None:
            # Loads run stages ahead. With a separate counter, the mask is computed where it is used instead of being kept in registers.
            row = late + tl.arange(0, BLOCK_K)
            late += BLOCK_K
            h = (row // out_width) % out_height * STRIDE
            w = row % out_width * STRIDE
            inside = (row < end)[:, None] & within(h[:, None] + r, w[:, None] + s, height, width)
            b = affine_relu(b, by[None, :], plus[None, :], inside)
        total = multiply(tl.trans(a), b, total, DOT_F32)

    place = (part.to(tl.int64) * filters + filter)[:, None] * depth + index[None, :]
    tl.store(parts + place, total, mask=(filter < filters)[:, None] & wanted[None, :])


def wgrad(
    x: Tensor,
    g: Tensor,
    shape: ConvShape,
    config: ConvTiles,
    split: int,
    *,
    prologue: tuple[Tensor, Tensor] | None,
    g_affine: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor | None]:
    """Launch the kernel; arguments as in `conv_wgrad`, checked. Return the gradient and, if it is not written yet, its parts."""
    steps = triton.cdiv(shape.out_rows, config.block_k)
    steps_per_part = triton.cdiv(steps, split)
    split = triton.cdiv(steps, steps_per_part)
    size = (shape.filters, shape.channels, shape.kernel, shape.kernel)
    out = torch.empty(size, dtype=torch.float32, device=x.device, memory_format=torch.channels_last)
    parts = out if split == 1 else torch.empty((split, out.numel()), dtype=torch.float32, device=x.device)
    scale, shift = prologue or (None, None)
    k, y = g_affine or (None, None)
    with torch.cuda.device_of(x):
        _conv_wgrad_kernel[(wgrad_tiles(shape, config), split)](
            x,
            g,
            scale,
            shift,
            y,
            k,
            parts,
            shape.out_rows,
            steps_per_part * config.block_k,
            shape.height,
            shape.width,
            shape.out_height,
            shape.out_width,
            shape.channels // unit_of(shape.channels),
            shape.filters // unit_of(shape.filters),
            **constants(shape, config, triton_runtime.dot_in_float32()),
            **launch(config),
        )
    return out, None if split == 1 else parts


def compile_cases() -> list[CompileCase]:
    """Return the launches of every shape."""
    chain = dict.fromkeys(("x", "g", "y"), "act") | dict.fromkeys(("parts", "scale", "shift", "coefficients"), "fp32")

    def rows_per_part(shape: ConvShape, config: ConvTiles, transformed: bool) -> int:
        steps = triton.cdiv(shape.out_rows, config.block_k)
        return int(triton.cdiv(steps, default_split(shape, config, transformed=transformed))) * config.block_k

    sizes: dict[str, Size] = {"rows": lambda shape, *_: shape.out_rows, "rows_per_part": rows_per_part, **SIZES}
    return cases(_conv_wgrad_kernel, "wgrad", chain, ("x", "g", "parts"), sizes)
