# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""What the three convolution kernels share: the order of tiles, and one step of the matrix product."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from der_fast.kernels.compile_case import CompileCase
from der_fast.kernels.conv.launch import ConvTiles
from der_fast.kernels.conv.shape import ConvShape, unit_of


@triton.jit
def tile_of(program, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Return (m, n) of a program: within GROUP blocks of rows, programs that run together share rows and columns in L2."""
    per_group = GROUP * tiles_n
    first = (program // per_group) * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    within = program % per_group
    return first + within % height, within // height


@triton.jit
def cut(step, channels, taps, BLOCK: tl.constexpr, FLAT: tl.constexpr):
    """Return (tap, channel, tap·channels + channel, whether it exists) of one block of taps × channels.

    The tap is one number or, where blocks span taps, one number per column, of shape (1, BLOCK).
    """
    if FLAT:
        index = step * BLOCK + tl.arange(0, BLOCK)
        tap = (index // channels)[None, :]
        channel = index % channels
        wanted = index < taps * channels
    else:
        blocks = tl.cdiv(channels, BLOCK)
        tap = step // blocks
        channel = (step % blocks) * BLOCK + tl.arange(0, BLOCK)
        index = tap * channels + channel
        wanted = channel < channels
    return tap, channel, index, wanted


@triton.jit
def within(i, j, height, width):
    """Return whether positions lie inside the image."""
    return (i >= 0) & (i < height) & (j >= 0) & (j < width)


@triton.jit
def multiply(a, b, total, DOT_F32: tl.constexpr):
    """Return total + a·b, accumulated in float32."""
    if DOT_F32:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def affine_relu(value, scale, shift, inside):
    """Return ReLU(value·scale + shift) in value's dtype, and 0 where not `inside`: padding applies to the activation, not to its input.

    Channels beyond the last have scale and shift 0, so `inside` may be one column, which takes far fewer registers than a full tile.
    """
    wide = value.to(tl.float32) * scale + shift
    # A NaN must reach the loss, where divergence is noticed.
    wide = tl.maximum(wide, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(inside, wide, 0.0).to(value.dtype)


@triton.jit
def formed_gradient(g, y, k0, k1, k2):
    """Return k0·g + k1·y + k2 in float32; this is not 0 where g and y are padding."""
    return k0 * g.to(tl.float32) + k1 * y.to(tl.float32) + k2


def constants(shape: ConvShape, config: ConvTiles, dot_in_float32: bool) -> dict[str, Any]:
    """Return the compile-time arguments that all three kernels take."""
    return {
        "KERNEL": shape.kernel,
        "STRIDE": shape.stride,
        "CHANNEL_UNIT": unit_of(shape.channels),
        "FILTER_UNIT": unit_of(shape.filters),
        "FLAT": config.flat,
        "DOT_F32": dot_in_float32,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP": config.group,
    }


def launch(config: ConvTiles) -> dict[str, Any]:
    """Return the launch options."""
    return {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}


def compile_cases() -> list[CompileCase]:
    """Return an empty list: these functions are compiled as parts of the other kernels in this folder."""
    return []
