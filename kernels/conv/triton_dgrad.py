# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Gradient of a convolution's input as an implicit GEMM: rows (n, i, j) of the input × channels, reduced over (r, s, k).

Stride 1 is a convolution with the flipped kernel. Stride 2 is decomposed by parity: the pixels (i, j) with i % 2 = p, j % 2 = q receive
only the taps with (i + R//2 − r) % 2 = 0 and (j + R//2 − s) % 2 = 0. The four classes get 1, 2, 2 and 4 taps of a 3×3 kernel; of a 1×1
kernel one class gets the only tap and three get none. So no product with a zero is computed. Each class is a separate GEMM; one launch runs
all four, the class with the most taps first. Nothing is saved; the incoming gradient may be formed on load. While the tile is in registers,
the shortcut's gradient is added, the ReLU before the convolution applied, and the two sums of the batch-norm before that taken; of two
batch-norms where a projection joins there. Partials are numbered by class and tile: the same bits every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from der_fast.kernels import triton_runtime
from der_fast.kernels.affine import VECTORS
from der_fast.kernels.compile_case import CompileCase
from der_fast.kernels.conv.cases import SIZES, Size, cases, joined_cases
from der_fast.kernels.conv.join import Join
from der_fast.kernels.conv.launch import ConvTiles
from der_fast.kernels.conv.shape import ConvShape, unit_of
from der_fast.kernels.conv.triton_tiles import constants, cut, formed_gradient, launch, multiply, tile_of, within


@triton.jit
def _store_sums(g_z, values, mean, rstd, line, column, channels):
    """Store S1 = Σ g_z and S2 = Σ g_z·x̂ of a tile."""
    there = column < channels
    wide = g_z.to(tl.float32)
    centre = tl.load(mean + column, mask=there, other=0.0)[None, :]
    normalised = (values - centre) * tl.load(rstd + column, mask=there, other=0.0)[None, :]
    tl.store(line + column, tl.sum(wide, 0), mask=there)
    tl.store(line + channels + column, tl.sum(wide * normalised, 0), mask=there)


@triton.jit
def through_relu(gradient, before, kept, mean, rstd, scale, shift, line, column, channels):
    """Return the gradient where the ReLU was open, and store its sums S1 and S2."""
    there = column < channels
    by = tl.load(scale + column, mask=there, other=0.0)[None, :]
    plus = tl.load(shift + column, mask=there, other=0.0)[None, :]
    # Not `> 0`: PyTorch's ReLU passes the gradient of a NaN, so that divergence stays visible.
    shut = before * by + plus <= 0
    gradient = tl.where(kept, tl.where(shut, 0.0, gradient), 0.0)
    _store_sums(gradient, before, mean, rstd, line, column, channels)
    return gradient


@triton.jit
def _shut(bits, pixel, live, first, channels, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return where the stored bits say that the ReLU was shut, for a tile whose first column is `first`, a multiple of 8."""
    byte = first // 8 + tl.arange(0, BLOCK_N // 8)
    per_row = (channels + 7) // 8
    packed = tl.load(bits + pixel[:, None] * per_row + byte[None, :], mask=live[:, None] & (byte < per_row)[None, :], other=0)
    spread = tl.broadcast_to(packed.to(tl.int32)[:, :, None], (BLOCK_M, BLOCK_N // 8, 8))
    return (tl.reshape(spread, (BLOCK_M, BLOCK_N)) >> (tl.arange(0, BLOCK_N) % 8)[None, :]) & 1 == 0


@triton.jit
def _conv_dgrad_kernel(
    g,
    y,
    coefficients,
    weight,
    y_in,
    mean,
    rstd,
    scale,
    shift,
    bits,
    added,
    shortcut,
    shortcut_mean,
    shortcut_rstd,
    out,
    partials,
    shortcut_partials,
    batch,
    height,
    width,
    out_height,
    out_width,
    channel_units,
    filter_units,
    tiles,
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
    tiles_n = tl.cdiv(channels, BLOCK_N)
    # Classes run from last to first, since the last has the most work.
    parity = 0 if STRIDE == 1 else STRIDE * STRIDE - 1 - tl.program_id(0) // (tiles * tiles_n)
    tile_m, tile_n = tile_of(tl.program_id(0) % (tiles * tiles_n), tiles, tiles_n, GROUP)
    p = parity // STRIDE
    q = parity % STRIDE
    class_height = tl.cdiv(height - p, STRIDE)
    class_width = tl.cdiv(width - q, STRIDE)
    rows = batch * class_height * class_width
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    live = row < rows
    # An image of one pixel has classes without pixels.
    across = tl.maximum(class_width, 1)
    down = tl.maximum(class_height, 1)
    i = (row // across) % down
    j = row % across
    image = (row // (across * down)).to(tl.int64)

    # i·S + p = h·S + r − R//2 with r = first + S·t gives h = i + from − t.
    first_r = (p + KERNEL // 2) % STRIDE
    first_s = (q + KERNEL // 2) % STRIDE
    taps_r = (KERNEL - first_r + STRIDE - 1) // STRIDE
    taps_s = (KERNEL - first_s + STRIDE - 1) // STRIDE
    top = i + (p + KERNEL // 2 - first_r) // STRIDE
    left = j + (q + KERNEL // 2 - first_s) // STRIDE
    origin = ((image * out_height + top) * out_width + left) * filters

    taps = taps_r * taps_s
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    late = 0
    for step in range(tl.cdiv(taps * filters, BLOCK_K) if FLAT else taps * tl.cdiv(filters, BLOCK_K)):
        tap, filter, _, wanted = cut(step, filters, taps, BLOCK_K, FLAT)
        inside = live[:, None] & within(top[:, None] - tap // taps_s, left[:, None] - tap % taps_s, out_height, out_width)
        place = origin[:, None] + (filter[None, :] - (tap // taps_s * out_width + tap % taps_s) * filters)
        a = tl.load(g + place, mask=inside & wanted[None, :], other=0.0)
        if coefficients is not None:
            b = tl.load(y + place, mask=inside & wanted[None, :], other=0.0)
            k0 = tl.load(coefficients + filter, mask=wanted, other=0.0)
            k1 = tl.load(coefficients + filters + filter, mask=wanted, other=0.0)
            k2 = tl.load(coefficients + 2 * filters + filter, mask=wanted, other=0.0)
            # Loads run stages ahead. With a separate counter, the mask is computed where it is used instead of being kept in registers.
            then, _, _, _ = cut(late, filters, taps, BLOCK_K, FLAT)
            late += 1
            inside = within(top[:, None] - then // taps_s, left[:, None] - then % taps_s, out_height, out_width)
            a = tl.where(inside, formed_gradient(a, b, k0[None, :], k1[None, :], k2[None, :]), 0.0).to(a.dtype)
        of_weight = tl.trans(tap) if FLAT else tap
        r = first_r + STRIDE * (of_weight // taps_s)
        s = first_s + STRIDE * (of_weight % taps_s)
        line = (filter[:, None] * (KERNEL * KERNEL) + r * KERNEL + s) * channels
        kept = wanted[:, None] & (column < channels)[None, :]
        total = multiply(a, tl.load(weight + line + column[None, :], mask=kept, other=0.0), total, DOT_F32)

    kept = live[:, None] & (column < channels)[None, :]
    pixel = (image * height + i * STRIDE + p) * width + j * STRIDE + q
    place = pixel[:, None] * channels + column[None, :]
    if added is not None:
        total += tl.load(added + place, mask=kept, other=0.0).to(tl.float32)
    stored = total.to(out.dtype.element_ty)
    if partials is not None:
        line = (parity * tiles + tile_m).to(tl.int64) * 2 * channels
        before = tl.load(y_in + place, mask=kept, other=0.0).to(tl.float32)
        if bits is None:
            stored = through_relu(stored, before, kept, mean, rstd, scale, shift, partials + line, column, channels)
        else:
            shut = _shut(bits, pixel, live, tile_n * BLOCK_N, channels, BLOCK_M, BLOCK_N)
            stored = tl.where(kept, tl.where(shut, 0.0, stored), 0.0)
            _store_sums(stored, before, mean, rstd, partials + line, column, channels)
        if shortcut is not None:
            values = tl.load(shortcut + place, mask=kept, other=0.0).to(tl.float32)
            _store_sums(stored, values, shortcut_mean, shortcut_rstd, shortcut_partials + line, column, channels)
    tl.store(out + place, stored, mask=kept)


def dgrad(
    g: Tensor,
    weight: Tensor,
    shape: ConvShape,
    config: ConvTiles,
    *,
    g_affine: tuple[Tensor, Tensor] | None,
    added: Tensor | None,
    join: Join | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Launch the kernel; arguments as in `conv_dgrad_joined`, checked. Without a join there are no sums."""
    size = (shape.batch, shape.channels, shape.height, shape.width)
    out = torch.empty(size, dtype=g.dtype, device=g.device, memory_format=torch.channels_last)
    tiles = triton.cdiv(class_rows(shape), config.block_m)
    classes = shape.stride**2
    k, y = g_affine or (None, None)
    affine = None if join is None else join.affine
    shortcut, other = (None, None) if join is None else join.shortcut or (None, None)

    def sums(wanted: bool) -> Tensor | None:
        return torch.empty((classes * tiles, 2, shape.channels), dtype=torch.float32, device=g.device) if wanted else None

    partials, shortcut_partials = sums(join is not None), sums(shortcut is not None)
    with torch.cuda.device_of(g):
        _conv_dgrad_kernel[(classes * tiles * triton.cdiv(shape.channels, config.block_n),)](
            g,
            y,
            k,
            weight,
            None if join is None else join.y,
            *(None if affine is None else getattr(affine, name) for name in VECTORS),
            None if join is None else join.bits,
            added,
            shortcut,
            None if other is None else other.mean,
            None if other is None else other.rstd,
            out,
            partials,
            shortcut_partials,
            shape.batch,
            shape.height,
            shape.width,
            shape.out_height,
            shape.out_width,
            shape.channels // unit_of(shape.channels),
            shape.filters // unit_of(shape.filters),
            tiles,
            **constants(shape, config, triton_runtime.dot_in_float32()),
            **launch(config),
        )
    return out, partials, shortcut_partials


def class_rows(shape: ConvShape) -> int:
    """Return the pixels of the largest parity class."""
    return shape.batch * shape.out_height * shape.out_width


def compile_cases() -> list[CompileCase]:
    """Return the launches of every shape."""
    vectors = ("coefficients", "partials", "mean", "rstd", "scale", "shift")
    chain = dict.fromkeys(("g", "weight", "out", "y", "y_in"), "act") | dict.fromkeys(vectors, "fp32")
    sizes: dict[str, Size] = {
        "batch": lambda shape, *_: shape.batch,
        "tiles": lambda shape, config, _: int(triton.cdiv(class_rows(shape), config.block_m)),
        **SIZES,
    }
    found = cases(_conv_dgrad_kernel, "dgrad", chain, ("g", "weight", "out"), sizes)
    # The end of a block with a projection, which has most to load.
    joined = {name: kind for name, kind in chain.items() if name not in ("scale", "shift")}
    joined |= {"bits": "u8", "added": "act", "shortcut": "act"}
    joined |= dict.fromkeys(("shortcut_mean", "shortcut_rstd", "shortcut_partials"), "fp32")
    return [*found, *joined_cases(_conv_dgrad_kernel, joined, sizes)]
