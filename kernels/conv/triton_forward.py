# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Forward convolution as an implicit GEMM: rows (n, h, w) of the output × filters, reduced over (r, s, c); float32 accumulators.

The im2col matrix is never stored: each step loads a (rows × channels) tile of the input at one tap and a tile of the weight. Nothing is
saved for backward. Statistics are those of the stored (rounded) values of a tile: count, mean, and squared deviations from that mean,
so that nothing cancels. Tiles are numbered by rows and each writes its own line, so the result does not depend on the order they run in.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from der_fast.kernels import triton_runtime
from der_fast.kernels.compile_case import CompileCase
from der_fast.kernels.conv.cases import SIZES, cases
from der_fast.kernels.conv.launch import ConvTiles
from der_fast.kernels.conv.shape import ConvShape, unit_of
from der_fast.kernels.conv.triton_tiles import affine_relu, constants, cut, launch, multiply, tile_of, within


@triton.jit
def store_moments(line, stored, live, count, column, filters):
    """Store count, mean and squared deviations from that mean of the live rows of a tile."""
    value = stored.to(tl.float32)
    mean = tl.sum(tl.where(live, value, 0.0), 0) / count
    deviation = tl.where(live, value - mean[None, :], 0.0)
    tl.store(line + column, tl.zeros_like(mean) + count, mask=column < filters)
    tl.store(line + filters + column, mean, mask=column < filters)
    tl.store(line + 2 * filters + column, tl.sum(deviation * deviation, 0), mask=column < filters)


@triton.jit
def _conv_forward_kernel(
    x,
    weight,
    scale,
    shift,
    out,
    partials,
    rows,
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
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.cdiv(filters, BLOCK_N), GROUP)
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    live = row < rows
    top = (row // out_width) % out_height * STRIDE - KERNEL // 2
    left = row % out_width * STRIDE - KERNEL // 2
    image = row // (out_width * out_height)
    origin = ((image.to(tl.int64) * height + top) * width + left) * channels

    depth = KERNEL * KERNEL * channels
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    steps = tl.cdiv(depth, BLOCK_K) if FLAT else KERNEL * KERNEL * tl.cdiv(channels, BLOCK_K)
    late = 0
    for step in range(steps):
        tap, channel, index, wanted = cut(step, channels, KERNEL * KERNEL, BLOCK_K, FLAT)
        r = tap // KERNEL
        s = tap % KERNEL
        inside = live[:, None] & within(top[:, None] + r, left[:, None] + s, height, width)
        a = tl.load(x + origin[:, None] + ((r * width + s) * channels + channel[None, :]), mask=inside & wanted[None, :], other=0.0)
        if scale is not None:
            by = tl.load(scale + channel, mask=wanted, other=0.0)
            plus = tl.load(shift + channel, mask=wanted, other=0.0)
            # Loads run stages ahead. With a separate counter, the mask is computed where it is used instead of being kept in registers.
            tap, _, _, _ = cut(late, channels, KERNEL * KERNEL, BLOCK_K, FLAT)
            late += 1
            a = affine_relu(
                a, by[None, :], plus[None, :], within(top[:, None] + tap // KERNEL, left[:, None] + tap % KERNEL, height, width)
            )
        b = tl.load(weight + column[None, :] * depth + index[:, None], mask=wanted[:, None] & (column < filters)[None, :], other=0.0)
        total = multiply(a, b, total, DOT_F32)

    kept = live[:, None] & (column < filters)[None, :]
    place = row.to(tl.int64)[:, None] * filters + column[None, :]
    stored = total.to(out.dtype.element_ty)
    tl.store(out + place, stored, mask=kept)
    if partials is not None:
        count = tl.minimum(rows - tile_m * BLOCK_M, BLOCK_M)
        store_moments(partials + tile_m.to(tl.int64) * 3 * filters, stored, live[:, None], count, column, filters)


def forward(
    x: Tensor,
    weight: Tensor,
    shape: ConvShape,
    config: ConvTiles,
    *,
    prologue: tuple[Tensor, Tensor] | None,
    statistics: bool,
) -> tuple[Tensor, Tensor | None]:
    """Launch the kernel; arguments as in `conv_forward`, checked."""
    size = (shape.batch, shape.filters, shape.out_height, shape.out_width)
    out = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    tiles = triton.cdiv(shape.out_rows, config.block_m)
    partials = torch.empty((tiles, 3, shape.filters), dtype=torch.float32, device=x.device) if statistics else None
    scale, shift = prologue or (None, None)
    with torch.cuda.device_of(x):
        _conv_forward_kernel[(tiles * triton.cdiv(shape.filters, config.block_n),)](
            x,
            weight,
            scale,
            shift,
            out,
            partials,
            shape.out_rows,
            shape.height,
            shape.width,
            shape.out_height,
            shape.out_width,
            shape.channels // unit_of(shape.channels),
            shape.filters // unit_of(shape.filters),
            **constants(shape, config, triton_runtime.dot_in_float32()),
            **launch(config),
        )
    return out, partials


def compile_cases() -> list[CompileCase]:
    """Return the launches of every shape."""
    chain = {"x": "act", "weight": "act", "out": "act"} | dict.fromkeys(("partials", "scale", "shift"), "fp32")
    return cases(_conv_forward_kernel, "forward", chain, ("x", "weight", "out"), {"rows": lambda shape, *_: shape.out_rows, **SIZES})
