# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Forward convolution and its dgrad, stride 1, with tiles that the copy engine of compute capability 9.0 loads by tensor descriptors.

A tile is a box of the image: images × rows × columns × channels. At each tap the box is moved by (−1..1, −1..1); what lies outside the
image arrives as zero, so padding costs neither masks nor address arithmetic. The result is stored by a descriptor too, which leaves out
what overhangs. dgrad is the same kernel: the gradient takes the place of the input, the taps run backwards, and the weight (K, R, R, C) is
read with rows and columns exchanged. The weight is never copied.

* The product is taken transposed, filters × pixels. Both operands then go from shared memory to `wgmma` as they arrive; the other way
  round Triton 3.6 to 3.9 load the reshaped box into registers first, and wait.
* Persistent: one program per block that fits on the GPU, each with every n-th tile. The loops are one (`flatten`), so that the next tile's
  boxes are on their way while a tile is stored.
* Where few tiles leave multiprocessors idle, taps × channels are cut into `split` equal parts. Each writes float32, and a second kernel
  adds the parts in order, rounds, and takes the sums: no atomics, the same bits on every run.
* Statistics and dgrad's epilogue as in the pointer kernels, of the values as stored; a line of partials per box.

Left out: stride 2, and prologue and g_affine. A transformed operand would pass through registers at each of nine taps, and `wgmma` would
wait for it; `masked_bn` transforms once. Left out too is `warp_specialize`, which Triton 3.6 and 3.9 get wrong here (README.md).

Where channels do not fill the last block, the weight's block runs on into the next tap and meets the box's zeros: a weight that is not
finite may then reach outputs of its filter which it would not reach otherwise.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from der_fast.kernels import triton_runtime
from der_fast.kernels.affine import Affine
from der_fast.kernels.compile_case import CompileCase
from der_fast.kernels.conv.boxed_cases import boxed_cases, part_sums
from der_fast.kernels.conv.boxes import box
from der_fast.kernels.conv.boxes import tiles as boxes_of
from der_fast.kernels.conv.launch import ConvTiles
from der_fast.kernels.conv.shape import ConvShape
from der_fast.kernels.conv.triton_dgrad import through_relu
from der_fast.kernels.conv.triton_forward import store_moments
from der_fast.kernels.conv.triton_tiles import launch, multiply
from der_fast.kernels.device import multiprocessors

# Rows and columns of a program of the second kernel.
ROWS, COLUMNS = 32, 64


@triton.jit
def _moments_of_box(line, stored, live, count, column, filters):
    """Store count, mean and squared deviations from that mean of the live pixels; rows of `stored` are filters."""
    value = stored.to(tl.float32)
    mean = tl.sum(tl.where(live, value, 0.0), 1) / count
    deviation = tl.where(live, value - mean[:, None], 0.0)
    tl.store(line + column, tl.zeros_like(mean) + count, mask=column < filters)
    tl.store(line + filters + column, mean, mask=column < filters)
    tl.store(line + 2 * filters + column, tl.sum(deviation * deviation, 1), mask=column < filters)


@triton.jit
def _box_through_relu(gradient, before, live, mean, rstd, scale, shift, line, column, channels):
    """Return the gradient where the ReLU was open, and store its sums S1 and S2; rows of `gradient` are channels."""
    there = column < channels
    by = tl.load(scale + column, mask=there, other=0.0)[:, None]
    plus = tl.load(shift + column, mask=there, other=0.0)[:, None]
    # Not `> 0`: PyTorch's ReLU passes the gradient of a NaN, so that divergence stays visible.
    shut = before * by + plus <= 0
    gradient = tl.where(live, tl.where(shut, 0.0, gradient), 0.0).to(gradient.dtype)
    value = gradient.to(tl.float32)
    centre = tl.load(mean + column, mask=there, other=0.0)[:, None]
    normalised = (before - centre) * tl.load(rstd + column, mask=there, other=0.0)[:, None]
    tl.store(line + column, tl.sum(value, 1), mask=there)
    tl.store(line + channels + column, tl.sum(value * normalised, 1), mask=there)
    return gradient


@triton.jit
def _conv_descriptor_kernel(
    source,
    weight,
    out,
    y_in,
    mean,
    rstd,
    scale,
    shift,
    partials,
    batch,
    height,
    width,
    depth,
    columns,
    KERNEL: tl.constexpr,
    FLIP: tl.constexpr,
    SPLIT: tl.constexpr,
    DOT_F32: tl.constexpr,
    IMAGES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    TAPS: tl.constexpr = KERNEL * KERNEL
    # Otherwise the compiler adds code for sums without terms.
    tl.assume(depth > 0)
    across = tl.cdiv(width, COLUMNS)
    down = tl.cdiv(height, ROWS)
    tiles_n = tl.cdiv(columns, BLOCK_N)
    blocks = tl.cdiv(depth, BLOCK_K)
    steps = TAPS * blocks // SPLIT
    tiles = tl.cdiv(batch, IMAGES) * down * across * tiles_n * SPLIT
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        tile_m = tile // (tiles_n * SPLIT)
        part = tile // tiles_n % SPLIT
        first = tile % tiles_n * BLOCK_N
        n = tile_m // (across * down) * IMAGES
        h = tile_m // across % down * ROWS
        w = tile_m % across * COLUMNS
        total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for step in range(steps):
            tap = (part * steps + step) // blocks
            k = (part * steps + step) % blocks * BLOCK_K
            b = source.load([n, h + tap // KERNEL - KERNEL // 2, w + tap % KERNEL - KERNEL // 2, k])
            b = tl.trans(tl.reshape(b, (BLOCK_M, BLOCK_K)))
            a = tl.trans(weight.load([k, (TAPS - 1 - tap) * columns + first])) if FLIP else weight.load([first, tap * depth + k])
            total = multiply(a, b, total, DOT_F32)

        stored = total.to(out.dtype)
        if partials is not None:
            if not DOT_F32:
                # A move that the assembler cannot see through. Without it, float16's conversions move up among the products, which are then
                # waited for one by one, and 30 registers more are taken.
                stored = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [stored], dtype=stored.dtype, is_pure=False, pack=2)
            pixel = tl.arange(0, BLOCK_M)
            live = (n + pixel // (ROWS * COLUMNS) < batch) & (h + pixel // COLUMNS % ROWS < height) & (w + pixel % COLUMNS < width)
            column = first + tl.arange(0, BLOCK_N)
            if y_in is None:
                count = tl.minimum(batch - n, IMAGES) * tl.minimum(height - h, ROWS) * tl.minimum(width - w, COLUMNS)
                _moments_of_box(partials + tile_m.to(tl.int64) * 3 * columns, stored, live[None, :], count, column, columns)
            else:
                before = tl.trans(tl.reshape(y_in.load([n, h, w, first]), (BLOCK_M, BLOCK_N))).to(tl.float32)
                line = partials + tile_m.to(tl.int64) * 2 * columns
                stored = _box_through_relu(stored, before, live[None, :], mean, rstd, scale, shift, line, column, columns)
        # The parts lie one after another, each with whole boxes of images, so that none overhangs into the next.
        image = part * tl.cdiv(batch, IMAGES) * IMAGES + n
        out.store([image, h, w, first], tl.reshape(tl.trans(stored), (IMAGES, ROWS, COLUMNS, BLOCK_N)))


@triton.jit
def _finish_parts_kernel(
    parts,
    out,
    y_in,
    mean,
    rstd,
    scale,
    shift,
    partials,
    rows,
    columns,
    rows_of_part,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    kept = (row < rows)[:, None] & (column < columns)[None, :]
    place = row.to(tl.int64)[:, None] * columns + column[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    line = row.to(tl.int64)
    for _ in range(SPLIT):
        total += tl.load(parts + (line[:, None] * columns + column[None, :]), mask=kept, other=0.0)
        line += rows_of_part
    stored = total.to(out.dtype.element_ty)
    if partials is not None:
        line = partials + tl.program_id(0).to(tl.int64) * (3 if y_in is None else 2) * columns
        if y_in is None:
            count = tl.minimum(rows - tl.program_id(0) * BLOCK_M, BLOCK_M)
            store_moments(line, stored, (row < rows)[:, None], count, column, columns)
        else:
            before = tl.load(y_in + place, mask=kept, other=0.0).to(tl.float32)
            stored = through_relu(stored, before, kept, mean, rstd, scale, shift, line, column, columns)
    tl.store(out + place, stored, mask=kept)


def forward(x: Tensor, weight: Tensor, shape: ConvShape, config: ConvTiles, *, statistics: bool) -> tuple[Tensor, Tensor | None]:
    """Launch the kernel; arguments as in `conv_forward`, checked, without a prologue."""
    return _convolve(x, weight, shape, config, False, None, 3 if statistics else 0)


def dgrad(
    g: Tensor, weight: Tensor, shape: ConvShape, config: ConvTiles, *, epilogue: tuple[Tensor, Affine] | None
) -> tuple[Tensor, Tensor | None]:
    """Launch the kernel; arguments as in `conv_dgrad`, checked, without a g_affine."""
    turned = replace(shape, channels=shape.filters, filters=shape.channels)
    return _convolve(g, weight, turned, config, True, epilogue, 2 if epilogue else 0)


def _convolve(
    source: Tensor, weight: Tensor, shape: ConvShape, config: ConvTiles, flip: bool, epilogue: tuple[Tensor, Affine] | None, sums: int
) -> tuple[Tensor, Tensor | None]:
    """Return the result (N, filters, H, W) and partials (P, sums, filters), None where `sums` is 0; channels and filters are dgrad's."""
    size, split, device = box(shape, config.block_m), config.split, source.device
    out = torch.empty(
        (shape.batch, shape.filters, shape.height, shape.width), dtype=source.dtype, device=device, memory_format=torch.channels_last
    )
    count = boxes_of(shape, size)
    lines = count if split == 1 else triton.cdiv(shape.out_rows, ROWS)
    partials = torch.empty((lines, sums, shape.filters), dtype=torch.float32, device=device) if sums else None
    y_in, affine = epilogue or (None, None)
    vectors = (None,) * 4 if affine is None else (affine.mean, affine.rstd, affine.scale, affine.shift)
    padded = triton.cdiv(shape.batch, size[0]) * size[0]
    parts = out if split == 1 else torch.empty((split * padded * shape.height * shape.width, shape.filters), device=device)
    tiles = count * triton.cdiv(shape.filters, config.block_n) * split
    on_tile = (None, (None,) * 4, None) if split > 1 else (y_in, vectors, partials)

    def image(tensor: Tensor, batch: int, channels: int, block: int) -> TensorDescriptor:
        height, width = shape.height, shape.width
        strides = [height * width * channels, width * channels, channels, 1]
        return TensorDescriptor(tensor, [batch, height, width, channels], strides, [*size, block])

    wide = shape.taps * (shape.filters if flip else shape.channels)
    narrow = shape.channels if flip else shape.filters
    blocks = [config.block_k, config.block_n] if flip else [config.block_n, config.block_k]
    with torch.cuda.device_of(source):
        _conv_descriptor_kernel[(min(tiles, multiprocessors(device) * config.resident),)](
            image(source, shape.batch, shape.channels, config.block_k),
            TensorDescriptor(weight, [narrow, wide], [wide, 1], blocks),
            image(parts, shape.batch if split == 1 else split * padded, shape.filters, config.block_n),
            None if on_tile[0] is None else image(on_tile[0], shape.batch, shape.filters, config.block_n),
            *on_tile[1],
            on_tile[2],
            shape.batch,
            shape.height,
            shape.width,
            shape.channels,
            shape.filters,
            **_constants(shape, config, flip, triton_runtime.dot_in_float32()),
            **launch(config),
        )
        if split > 1:
            _finish_parts_kernel[(triton.cdiv(shape.out_rows, ROWS), triton.cdiv(shape.filters, COLUMNS))](
                parts,
                out,
                y_in,
                *vectors,
                partials,
                shape.out_rows,
                shape.filters,
                padded * shape.height * shape.width,
                SPLIT=split,
                BLOCK_M=ROWS,
                BLOCK_N=COLUMNS,
                num_warps=4,
                num_stages=1,
                enable_fp_fusion=True,
            )
    return out, partials


def _constants(shape: ConvShape, config: ConvTiles, flip: bool, dot_in_float32: bool) -> dict[str, Any]:
    images, rows, columns = box(shape, config.block_m)
    return {
        "KERNEL": shape.kernel,
        "FLIP": flip,
        "SPLIT": config.split,
        "DOT_F32": dot_in_float32,
        "IMAGES": images,
        "ROWS": rows,
        "COLUMNS": columns,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
    }


def compile_cases() -> list[CompileCase]:
    """Return the launches of every shape, and the sum of the parts."""
    return boxed_cases(_conv_descriptor_kernel, _constants) + part_sums(
        _finish_parts_kernel, {"SPLIT": 2, "BLOCK_M": ROWS, "BLOCK_N": COLUMNS}
    )
