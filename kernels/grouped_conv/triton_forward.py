# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, allow-incomplete-defs
"""The fused kernel: one program computes one tile of output pixels × output channels of one extractor.

The convolution is a matrix product over k = (row of the kernel, column, input channel), flattened: a block of k may start in one tap and
end in the next, so narrow extractors waste only the end of the last block. Input channels come in eights and start at multiples of eight,
so eight neighbours share k // inputs and have consecutive addresses: 16 bytes per load.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from der_fast.kernels import compile_case as names
from der_fast.kernels import triton_runtime
from der_fast.kernels.compile_case import CompileCase
from der_fast.kernels.device import multiprocessors
from der_fast.kernels.grouped_conv.launch import GroupedTiles, default_config
from der_fast.kernels.grouped_conv.layer import ALIGN, FIELDS, GroupedLayer

_ROW = tl.constexpr(len(FIELDS))
_EIGHT = tl.constexpr(ALIGN)
# Sizes change from layer to layer and batch to batch: none of them is worth a separate kernel.
_SIZES = (
    "images",
    "height",
    "width",
    "out_height",
    "out_width",
    "x_units",
    "out_units",
    "residual_units",
    "residual_height",
    "residual_width",
    "tiles",
    "chunks",
)


@triton.jit
def _row_of(table, tiles):
    """Return the row of this program's extractor and its tiles of pixels and channels; tiles of the same pixels run side by side."""
    program = tl.program_id(0)
    row = table + (program // tiles) * _ROW
    count = tl.load(row + 1)
    place = program - tl.load(row) * tiles
    return row, place // count, place % count


@triton.jit
def _pixels(tile, images, size, chunks, POOL: tl.constexpr, BLOCK_M: tl.constexpr):
    """Return the image and pixel of every row of the tile; with POOL the rows are POOL pixels of one image, then POOL of the next."""
    rows = tl.arange(0, BLOCK_M)
    if POOL > 0:
        image = (tile // chunks) * (BLOCK_M // POOL) + rows // POOL
        pixel = (tile % chunks) * POOL + rows % POOL
    else:
        place = tile * BLOCK_M + rows
        image = place // size
        pixel = place % size
    return image, pixel, (image < images) & (pixel < size)


@triton.jit(do_not_specialize=_SIZES)
def grouped_conv_kernel(
    x,
    weights,
    bias,
    residual,
    out,
    table,
    images,
    height,
    width,
    out_height,
    out_width,
    x_units,
    out_units,
    residual_units,
    residual_height,
    residual_width,
    tiles,
    chunks,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    UNIT: tl.constexpr,
    RELU: tl.constexpr,
    RESIDUAL_STRIDE: tl.constexpr,
    POOL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    DOT_F32: tl.constexpr,
):
    row, tile, tile_n = _row_of(table, tiles)
    # Multiplied here and not on the host, so that the compiler knows what they are multiples of.
    inputs = tl.load(row + 2) * UNIT
    outputs = tl.load(row + 3) * _EIGHT
    source = tl.load(row + 4) * UNIT
    target = tl.load(row + 5) * _EIGHT
    # Offsets of all weights together may exceed 2³¹.
    weight = tl.load(row + 6).to(tl.int64) * _EIGHT
    x_channels = x_units * UNIT

    image, pixel, valid = _pixels(tile, images, out_height * out_width, chunks, POOL, BLOCK_M)
    out_row = pixel // out_width
    out_column = pixel % out_width
    top = out_row * STRIDE - KERNEL // 2
    left = out_column * STRIDE - KERNEL // 2
    # Offsets of activations may exceed 2³¹ too.
    x_rows = x + (((image.to(tl.int64) * height + top) * width + left) * x_channels + source)
    channels = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    wanted = channels < outputs

    length = KERNEL * KERNEL * inputs
    pitch = tl.cdiv(length, _EIGHT) * _EIGHT
    w_columns = weights + (weight + channels * pitch)
    # A lost branch has no inputs. Its loop never runs, but code hoisted out of the loop must not divide by zero.
    divisor = tl.maximum(inputs // UNIT, 1) * UNIT
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for begin in range(0, length, BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K)
        tap = k // divisor
        down = tap // KERNEL
        right = tap % KERNEL
        steps = (down * width + right) * x_channels + k % divisor
        y_in = top[:, None] + down[None, :]
        x_in = left[:, None] + right[None, :]
        inside = (y_in >= 0) & (y_in < height) & (x_in >= 0) & (x_in < width) & (k < length)[None, :] & valid[:, None]
        a = tl.load(x_rows[:, None] + steps[None, :], mask=inside, other=0.0)
        # The pitch is padded with zeros: with a multiple of eight as the limit, the loads stay wide.
        b = tl.load(w_columns[None, :] + k[:, None], mask=(k < pitch)[:, None] & wanted[None, :], other=0.0)
        if DOT_F32:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        sums = tl.dot(a, b, sums, input_precision=PRECISION)

    sums += tl.load(bias + target + channels, mask=wanted, other=0.0)[None, :]
    if RESIDUAL_STRIDE > 0:
        begin_r = tl.load(row + 7) * _EIGHT
        known = channels < tl.load(row + 8) * _EIGHT
        place_r = (image.to(tl.int64) * residual_height + out_row * RESIDUAL_STRIDE) * residual_width + out_column * RESIDUAL_STRIDE
        r_rows = residual + (place_r * (residual_units * _EIGHT) + begin_r)
        added = tl.load(r_rows[:, None] + channels[None, :], mask=valid[:, None] & known[None, :], other=0.0)
        sums += added.to(tl.float32)
    if RELU:
        # Unlike maximum, this passes NaN.
        sums = tl.where(sums < 0, 0.0, sums)
    out_channels = out_units * _EIGHT
    if POOL > 0:
        # One row of partial sums per image and chunk of its pixels, in an order that depends only on shapes.
        slots: tl.constexpr = BLOCK_M // POOL
        sums = tl.where(valid[:, None], sums, 0.0)
        sums = tl.sum(tl.reshape(sums, (slots, POOL, BLOCK_N)), axis=1) / (out_height * out_width)
        slot = (tile // chunks) * slots + tl.arange(0, slots)
        o_rows = out + ((slot.to(tl.int64) * chunks + tile % chunks) * out_channels + target)
        tl.store(o_rows[:, None] + channels[None, :], sums, mask=(slot < images)[:, None] & wanted[None, :])
    else:
        place = (image.to(tl.int64) * out_height + out_row) * out_width + out_column
        o_rows = out + (place * out_channels + target)
        tl.store(o_rows[:, None] + channels[None, :], sums.to(out.dtype.element_ty), mask=valid[:, None] & wanted[None, :])


def grouped_conv_fused(
    x: Tensor, layer: GroupedLayer, residual: Tensor | None, residual_stride: int, pool: bool, tf32: bool, config: GroupedTiles | None
) -> Tensor:
    """Return what `grouped_conv_reference` returns; arguments must already be checked."""
    images, _, height, width = x.shape
    out_height, out_width = (-(-side // layer.stride) for side in (height, width))
    size = out_height * out_width
    config = config or default_config(layer, images * size, multiprocessors(x.device))
    if images * max(size, height * width) + config.block_m >= 2**31:
        raise ValueError(f"x has {images * height * width} pixels; the fused kernel counts fewer than 2³¹: use a smaller batch")
    pooled, chunks, tiles = _cut(images, size, config.block_m, pool)
    if pool:
        out = torch.empty(images, chunks, layer.outputs, dtype=torch.float32, device=x.device)
    else:
        shape = (images, layer.outputs, out_height, out_width)
        out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    table = layer.table(config.block_n)
    if len(table) * tiles >= 2**31:
        raise ValueError(f"{len(table) * tiles} tiles; the fused kernel counts fewer than 2³¹: use a smaller batch or larger tiles")
    there = x if residual is None else residual
    with torch.cuda.device_of(x):
        grouped_conv_kernel[(len(table) * tiles,)](
            x,
            layer.weights,
            layer.bias,
            there,
            out,
            table,
            images,
            height,
            width,
            out_height,
            out_width,
            layer.inputs // layer.align,
            layer.outputs // ALIGN,
            there.shape[1] // ALIGN,
            there.shape[2],
            there.shape[3],
            tiles,
            chunks,
            KERNEL=layer.kernel,
            STRIDE=layer.stride,
            UNIT=layer.align,
            RELU=layer.relu,
            RESIDUAL_STRIDE=0 if residual is None else residual_stride,
            POOL=pooled,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            PRECISION="tf32" if tf32 else "ieee",
            DOT_F32=triton_runtime.dot_in_float32(),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=True,
        )
    if not pool:
        return out
    return out[:, 0] if chunks == 1 else out.sum(1)


def _cut(images: int, size: int, block_m: int, pool: bool) -> tuple[int, int, int]:
    """Return how many pixels of an image a tile sums (0: none), how many chunks of pixels that makes, and the tiles of all images."""
    if not pool:
        return 0, 1, -(-images * size // block_m)
    pooled = min(block_m, triton.next_power_of_2(size))
    chunks = -(-size // pooled)
    return pooled, chunks, -(-images // (block_m // pooled)) * chunks


def _case(name: str, dtype: str, config: GroupedTiles, **constants: object) -> CompileCase:
    signature = dict.fromkeys(("x", "weights", "residual", "out"), f"*{dtype}") | {"bias": "*fp32", "table": "*i32"}
    signature |= dict.fromkeys(_SIZES, "i32")
    if constants.get("POOL"):
        signature["out"] = "*fp32"
    blocks = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}
    usual = {"KERNEL": 3, "STRIDE": 1, "UNIT": ALIGN, "RELU": True, "RESIDUAL_STRIDE": 0, "POOL": 0, "PRECISION": "ieee", "DOT_F32": False}
    fixed = {**usual, **blocks, **constants}
    itemsize = 4 if dtype == "fp32" else 2
    moves = (names.WIDE_LOADS, *(() if constants.get("POOL") else (names.WIDE_STORES,)), names.COPIES)
    products = (names.TENSOR_CORES, names.NO_SCALAR_LOOP, names.ASKED_ASYNCHRONOUS, names.ASYNCHRONOUS)
    return CompileCase(
        name=f"grouped_conv.{name}",
        kernel=grouped_conv_kernel,
        signature=signature,
        constants=fixed,
        aligned=("x", "weights", "bias", "residual", "out", "table"),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        tile_loads=config.block_k * (config.block_m + config.block_n) * itemsize,
        tile_stores=config.block_m * config.block_n * itemsize,
        # Exact products of float32 are not made by tensor cores.
        wants=moves if dtype == "fp32" and fixed["PRECISION"] == "ieee" else (*moves, *products),
        lacks=_lacks(itemsize) if fixed["UNIT"] == 1 else (),
    )


def _lacks(itemsize: int) -> tuple[names.Lack, ...]:
    """Return what a stem lacks."""
    single = f"an image's three channels are loaded one by one, {itemsize} bytes each"
    found = (names.Lack(names.WIDE_LOADS, single),)
    if itemsize >= 4:
        return found
    waits = (
        names.Lack(what, "what is not copied asynchronously is waited for", (90,))
        for what in (names.ASKED_ASYNCHRONOUS, names.ASYNCHRONOUS)
    )
    return (*found, names.Lack(names.COPIES, f"{single}, below an asynchronous copy's 4"), *waits)


def compile_cases() -> list[CompileCase]:
    """Return the launches that a bank of residual networks consists of: widths are in its table, always padded to multiples of 8."""
    wide, usual, narrow = GroupedTiles(128, 128, 64, num_warps=8), GroupedTiles(128, 64, 64, num_warps=8), GroupedTiles(64, 32, 64)
    shallow = GroupedTiles(128, 64, 32, num_warps=8)
    return [
        _case("stem.bf16", "bf16", GroupedTiles(128, 128, 32, num_warps=8), UNIT=1),
        _case("3x3.bf16.wide", "bf16", wide),
        _case("3x3.bf16.residual", "bf16", usual, RESIDUAL_STRIDE=1),
        _case("3x3.bf16.widen", "bf16", usual, RESIDUAL_STRIDE=2),
        _case("3x3.bf16.pool", "bf16", usual, RESIDUAL_STRIDE=1, POOL=16),
        _case("1x1.bf16.stride2", "bf16", narrow, KERNEL=1, STRIDE=2, RELU=False),
        _case("stem.fp16", "fp16", GroupedTiles(128, 128, 32, num_warps=8), UNIT=1),
        _case("3x3.fp16.residual", "fp16", usual, RESIDUAL_STRIDE=1),
        _case("1x1.fp16.stride2", "fp16", narrow, KERNEL=1, STRIDE=2, RELU=False),
        _case("stem.fp32", "fp32", shallow, UNIT=1, PRECISION="tf32"),
        _case("3x3.fp32.widen", "fp32", shallow, RESIDUAL_STRIDE=2, PRECISION="tf32"),
        _case("3x3.fp32.exact", "fp32", shallow, RESIDUAL_STRIDE=1),
    ]
