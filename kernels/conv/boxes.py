"""Which convolutions can load their tiles as boxes of pixels by a tensor descriptor, and the box that covers an image with least waste."""

from __future__ import annotations

import functools

import torch

from der_fast.kernels.conv.shape import ConvShape

# On older GPUs a descriptor is slow arithmetic; for 10.0, Triton 3.9 does not compile tiles of 128 × 128.
CAPABILITY = (9, 0)
DTYPES = (torch.bfloat16, torch.float16)
# A descriptor's strides are whole multiples of 16 bytes, here in channels of two bytes.
UNIT = 8
# The fewest reduction steps for one part of a split sum, so that filling the pipeline does not dominate.
STEPS_PER_PART = 4


def applies(shape: ConvShape, dtype: torch.dtype, capability: tuple[int, int]) -> bool:
    """Return whether the boxed kernel computes this convolution, forward and dgrad alike.

    It does on compute capability 9.0, in bfloat16 and float16, for stride 1 and channels and filters that are multiples of 8. A step of
    2 between pixels is not a box.
    """
    fits = shape.stride == 1 and shape.channels % UNIT == 0 and shape.filters % UNIT == 0
    return fits and dtype in DTYPES and capability == CAPABILITY


@functools.cache
def box(shape: ConvShape, pixels: int) -> tuple[int, int, int]:
    """Return images, rows and columns of a tile, powers of two whose product is `pixels`: the least padding, then the most columns.

    Wide rows come before several images, because what is copied lies together then.
    """
    powers = [2**power for power in range(pixels.bit_length())]
    boxes = [(pixels // (rows * columns), rows, columns) for columns in powers for rows in powers if rows * columns <= pixels]
    return min(boxes, key=lambda one: (tiles(shape, one), one[0], -one[2]))


def tiles(shape: ConvShape, size: tuple[int, int, int]) -> int:
    """Return how many boxes of that size cover the output."""
    images, rows, columns = size
    return -(-shape.batch // images) * -(-shape.height // rows) * -(-shape.width // columns)


def splits(steps: int, count: int, processors: int) -> list[int]:
    """Return into how many equal parts to cut a sum of `steps` steps where `count` tiles leave multiprocessors idle, most parts first.

    Only divisors of `steps`, so that no part runs past the end; 1 is not among them.
    """
    most = min(processors // count, steps // STEPS_PER_PART)
    return [parts for parts in range(most, 1, -1) if steps % parts == 0]
