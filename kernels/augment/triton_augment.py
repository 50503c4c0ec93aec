# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Augmentation in Triton: one launch from resident uint8 images to the network's input; see reference.py and draw.py for what it computes.

A program writes up to BLOCK neighbouring values of one image, N × H × W × 3 in memory, so writes are fully coalesced and reads nearly so.
Each program draws its image's random numbers itself: ten rounds of integer arithmetic cost less than reading them. For Y = N·H·W·3: Y bytes
read, 2Y (bfloat16, float16) or 4Y (float32) written.

The last step is one fused multiply-add; the reference rounds product and sum separately on a processor without one. The two differ by at
most the rounding of the product, 2⁻²⁴·|product|, and of the sum. Everything before it is exact or rounded in the same way.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from der_fast.kernels.augment.draw import Draw, bounds
from der_fast.kernels.compile_case import WIDE_LOADS, WIDE_STORES, CompileCase, Lack

BLOCK = 1024
NUM_WARPS = 4


@triton.jit
def _augment_kernel(
    images,
    index,
    key,
    numbers,
    row,
    col,
    flip,
    brightness,
    out,
    image_count,
    low,
    span,
    scale0,
    scale1,
    scale2,
    shift0,
    shift1,
    shift2,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDING: tl.constexpr,
    FLIP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    VALUES: tl.constexpr = HEIGHT * WIDTH * 3
    BLOCKS: tl.constexpr = (VALUES + BLOCK - 1) // BLOCK
    n = tl.program_id(0) // BLOCKS
    if key is not None:
        number = tl.load(numbers + n)
        stream = tl.load(key + 1)
        x0, x1, x2, x3 = tl.philox(
            tl.load(key), number.to(tl.uint32), (number >> 32).to(tl.uint32), stream.to(tl.uint32), (stream >> 32).to(tl.uint32), 10
        )
        top = (x0.to(tl.uint64) * (2 * PADDING + 1) >> 32).to(tl.int32)
        left = (x1.to(tl.uint64) * (2 * PADDING + 1) >> 32).to(tl.int32)
        mirrored = (x2 >> 31).to(tl.int32) * FLIP
        share = (x3 >> 8).to(tl.int32).to(tl.float64) * 5.9604644775390625e-08
        factor = (share * span + low).to(tl.float32)
    else:
        top = tl.load(row + n).to(tl.int32)
        left = tl.load(col + n).to(tl.int32)
        mirrored = tl.load(flip + n).to(tl.int32)
        factor = tl.load(brightness + n)
    source = n.to(tl.int64)
    if index is not None:
        source = tl.load(index + n)
    known = (source >= 0) & (source < image_count)
    # Not combined with the masks below: the interpreter turns a block & a single boolean into integers.
    readable = tl.where(known, VALUES, 0)

    place = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    c = place % 3
    w = place // 3 % WIDTH
    y = place // 3 // WIDTH + top - PADDING
    x = tl.where(mirrored != 0, WIDTH - 1 - w, w) + left - PADDING
    inside = (y >= 0) & (y < HEIGHT) & (x >= 0) & (x < WIDTH) & (place < readable)
    pixel = tl.load(images + source * VALUES + (y * WIDTH + x) * 3 + c, mask=inside, other=0).to(tl.float32)
    scale = tl.where(c == 0, scale0, tl.where(c == 1, scale1, scale2))
    shift = tl.where(c == 0, shift0, tl.where(c == 1, shift1, shift2))
    value = tl.minimum(pixel * factor, 255.0) * scale + shift
    # A missing image must not look like a black one.
    value = tl.where(known, value, float("nan"))
    tl.store(out + n.to(tl.int64) * VALUES + place, value.to(out.dtype.element_ty), mask=place < VALUES)


def augment_triton(
    images: Tensor,
    *,
    index: Tensor | None,
    key: Tensor | None,
    numbers: Tensor | None,
    draw: Draw | None,
    padding: int,
    jitter: float,
    flip: bool,
    scale: list[float],
    shift: list[float],
    dtype: torch.dtype,
) -> Tensor:
    """Return N × H × W × 3; either `key` int64 (seed, stream) and `numbers` int64 (N,), or `draw`; arguments checked."""
    height, width = int(images.shape[1]), int(images.shape[2])
    row, col, mirrored, brightness = (None,) * 4 if draw is None else draw
    given = numbers if row is None else row
    assert given is not None
    count = len(given)
    out = torch.empty(count, height, width, 3, dtype=dtype, device=images.device)
    if not count:
        return out
    blocks = triton.cdiv(height * width * 3, BLOCK)
    with torch.cuda.device_of(images):
        _augment_kernel[(count * blocks,)](
            images,
            index,
            key,
            numbers,
            row,
            col,
            None if mirrored is None else mirrored.view(torch.uint8),
            None if brightness is None else brightness.to(torch.float32),
            out,
            len(images),
            *bounds(jitter),
            *scale,
            *shift,
            HEIGHT=height,
            WIDTH=width,
            PADDING=padding,
            FLIP=flip,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )
    return out


def compile_cases() -> list[CompileCase]:
    """CIFAR images drawn in the kernel from a resident data set, and photos with given crops."""
    numbers = ["low", "span", *(f"{name}{c}" for name in ("scale", "shift") for c in range(3))]
    drawn, given = ("index", "key", "numbers"), ("row", "col", "flip", "brightness")
    signature = {"images": "*u8", "image_count": "i32", **dict.fromkeys(numbers, "fp32"), **dict.fromkeys((*drawn, *given), "*i64")}
    signature |= {"flip": "*u8", "brightness": "*fp32"}

    def case(name: str, side: int, absent: tuple[str, ...], out: str) -> CompileCase:
        constants = {"HEIGHT": side, "WIDTH": side, "PADDING": 4, "FLIP": True, "BLOCK": BLOCK, **dict.fromkeys(absent)}
        aligned = tuple(argument for argument in ("images", "out") if argument not in absent)
        return CompileCase(
            f"augment.{name}.{out}",
            _augment_kernel,
            {**signature, "out": f"*{out}"},
            constants,
            aligned,
            num_warps=NUM_WARPS,
            tile_loads=BLOCK,
            tile_stores=BLOCK * (4 if out == "fp32" else 2),
            wants=(WIDE_LOADS, WIDE_STORES),
            lacks=(Lack(WIDE_LOADS, "a crop begins at any byte, and a mirrored row runs backward: values are read one by one"),),
        )

    outs = ("bf16", "fp16", "fp32")
    return [*(case("drawn", 32, given, out) for out in outs), *(case("given", 224, drawn, out) for out in outs)]
