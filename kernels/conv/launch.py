"""Cuts a convolution into tiles: a default for its shape, and the candidates that are worth timing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from der_fast.kernels.conv.boxes import applies, box, splits
from der_fast.kernels.conv.boxes import tiles as boxes_of
from der_fast.kernels.conv.shape import ConvShape, unit_of
from der_fast.kernels.device import H100_MULTIPROCESSORS

DIRECTIONS = ("forward", "dgrad", "wgrad")
# Shared memory of a block on every GPU from compute capability 8.0, less some room for the compiler.
SHARED = 98304
# The fewest reduction steps for one part of a wgrad, so that filling the pipeline does not dominate.
STEPS_PER_PART = 4
# How many candidates `likely` returns: compiling one takes a second or two, and a network has dozens of layers and directions.
LIKELY, LIKELY_BOXED = 4, 2
# CUDA's limit for the second axis of a launch.
MOST_PARTS = 65535


@dataclass(frozen=True)
class ConvTiles:
    """Tile and launch parameters of one kernel; blocks and warps are powers of two.

    The underlying matrix product: forward has rows N·H'·W', columns K and reduces over taps × C; dgrad has rows N·H·W, columns C and
    reduces over taps × K; wgrad has rows K, columns taps × C and reduces over N·H'·W'.

    Attributes:
        block_m, block_n, block_k: rows, columns and reduction of one step, each at least 16.
        num_warps, num_stages: of the launch.
        group: blocks of rows within which concurrent programs share columns.
        flat: cut taps × channels as one index, so that a tile may span taps; otherwise each tap is cut separately.
        boxed: load tiles as boxes of pixels by tensor descriptors, where `boxes.applies`; `group` and `flat` have no meaning then.
        split: equal parts of the reduction of a boxed kernel, a divisor of its number of steps.

    Raises:
        ValueError: a number that the kernels do not support.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 3
    group: int = 1
    flat: bool = False
    boxed: bool = False
    split: int = 1

    def __post_init__(self) -> None:
        for name, least, most in (("block_m", 16, 256), ("block_n", 16, 256), ("block_k", 16, 256), ("num_warps", 1, 16)):
            value = getattr(self, name)
            if not least <= value <= most or value & (value - 1):
                raise ValueError(f"{name} must be a power of two from {least} to {most}, not {value}")
        if self.num_stages < 1 or self.group < 1:
            raise ValueError(f"num_stages and group must be at least 1, not {self.num_stages} and {self.group}")
        if self.split < 1 or (self.split > 1 and not self.boxed):
            raise ValueError(f"split must be at least 1, and 1 unless tiles are boxed, not {self.split}: conv_wgrad has its own argument")

    @property
    def resident(self) -> int:
        """Blocks of a boxed kernel that a multiprocessor of an H100 holds, which its registers decide."""
        return max(1, 8 // self.num_warps)

    @property
    def name(self) -> str:
        """A short word for each number: under it, measured choices are remembered."""
        sizes = f"{self.block_m}x{self.block_n}x{self.block_k} warps {self.num_warps} stages {self.num_stages}"
        return f"{sizes} boxed split {self.split}" if self.boxed else f"{sizes} group {self.group}{' flat' if self.flat else ''}"

    def shared(self, itemsize: int, transformed: bool) -> int:
        """Return roughly how many bytes of shared memory the tiles in flight take; a transformed operand may have two sources."""
        return (self.block_m * (1 + transformed) + self.block_n) * self.block_k * itemsize * self.num_stages


@dataclass(frozen=True)
class _Gemm:
    """Rows × columns over a depth; `period` is the number of channels per tap on the axis that holds taps."""

    rows: int
    columns: int
    depth: int
    period: int


def default_config(
    direction: str,
    shape: ConvShape,
    dtype: torch.dtype = torch.bfloat16,
    *,
    transformed: bool = False,
    processors: int = H100_MULTIPROCESSORS,
) -> ConvTiles:
    """Return the tiles for a shape that has not been timed.

    Wide tiles re-read less. They shrink where columns would need much padding, or where there would be fewer tiles than multiprocessors.
    A transformed operand passes through registers. With half the depth two blocks fit on a multiprocessor, except in dgrad and wgrad with
    tiles of 128 × 128 (`resident`). There dgrad takes the whole depth: compiled for 9.0, `wgmma` then stays in flight while the next
    operand is formed (bench/results/machine-code.jsonl).

    Args:
        direction: 'forward', 'dgrad' or 'wgrad'.
        shape: of the convolution.
        dtype: of the activations.
        transformed: whether there is a prologue or a g_affine.
        processors: multiprocessors of the GPU.

    Raises:
        ValueError: an unknown direction.
    """
    gemm = _gemm(direction, shape)
    block_n = _width(gemm.columns)
    deep = dtype.itemsize == 2 and not transformed
    if transformed and dtype.itemsize == 4:
        # Wider ones spill.
        block_n = min(64, block_n)
    if direction == "wgrad":
        # The reduction is split until the GPU is full, so the tiles need not shrink. A product of warp groups has 64 rows.
        chosen = ConvTiles(max(64, _width(gemm.rows)), block_n, 64 if deep else 32, flat=gemm.period % block_n != 0)
    else:
        # An operand that is formed keeps its addresses in registers, one for every few bytes: 128 rows of them spill.
        addresses = dtype.itemsize == 4 or (direction == "dgrad" and unit_of(gemm.period) * dtype.itemsize < 16)
        block_m = 64 if transformed and addresses else 128
        if _tiles(gemm, block_m, block_n) < processors:
            block_m = 64
        if _tiles(gemm, block_m, block_n) < processors and block_n == 128:
            block_n = 64
        alone = dtype.itemsize == 2 and resident(direction, ConvTiles(block_m, block_n, 32), transformed) == 1
        block_k = 64 if (deep or alone) and gemm.period % 64 == 0 else 32
        chosen = ConvTiles(block_m, block_n, block_k, flat=gemm.period % block_k != 0)
    return _fitted(chosen, gemm, dtype, transformed)


def candidates(
    direction: str,
    shape: ConvShape,
    dtype: torch.dtype = torch.bfloat16,
    *,
    transformed: bool = False,
    processors: int = H100_MULTIPROCESSORS,
    capability: tuple[int, int] = (8, 0),
) -> list[ConvTiles]:
    """Return the tiles worth timing, the default first, then those that differ from it in one number, without repetition.

    Tiles that are loaded by descriptors come last, where the GPU's compute capability, the shape and the dtype allow them and nothing is
    transformed; they are never the default. Arguments and errors as in `default_config`.
    """
    first = default_config(direction, shape, dtype, transformed=transformed, processors=processors)
    gemm = _gemm(direction, shape)
    found = [first, *(_fitted(config, gemm, dtype, transformed) for config in _variants(direction, first, gemm))]
    if direction != "wgrad" and not transformed and applies(shape, dtype, capability):
        found.extend(_boxed(direction, shape, gemm, processors))
    return list(dict.fromkeys(found))


def likely(
    direction: str,
    shape: ConvShape,
    dtype: torch.dtype = torch.bfloat16,
    *,
    transformed: bool = False,
    processors: int = H100_MULTIPROCESSORS,
    capability: tuple[int, int] = (8, 0),
) -> list[ConvTiles]:
    """Return the first candidates of each kind, for a measurement that somebody waits for; arguments and errors as in `default_config`."""
    found = candidates(direction, shape, dtype, transformed=transformed, processors=processors, capability=capability)
    plain, boxed = ([config for config in found if config.boxed == kind] for kind in (False, True))
    return plain[:LIKELY] + boxed[:LIKELY_BOXED]


def resident(direction: str, config: ConvTiles, transformed: bool) -> int:
    """Return how many blocks of 9.0's code fit on a multiprocessor; beside 128 × 128 sums, dgrad and wgrad form their operand alone."""
    return 1 if transformed and direction != "forward" and config.block_m * config.block_n > 128 * 64 else 2


def default_split(shape: ConvShape, config: ConvTiles, processors: int = H100_MULTIPROCESSORS, *, transformed: bool = False) -> int:
    """Return how many parts to cut wgrad's reduction into: as many blocks as run at a time, none with too few steps."""
    gemm = _gemm("wgrad", shape)
    steps = _blocks(gemm.depth, config.block_k)
    blocks = processors * resident("wgrad", config, transformed)
    return max(1, min(blocks // wgrad_tiles(shape, config), steps // STEPS_PER_PART))


def wgrad_tiles(shape: ConvShape, config: ConvTiles) -> int:
    """Return the number of tiles of the weight's gradient."""
    across = _blocks(shape.taps * shape.channels, config.block_n) if config.flat else shape.taps * _blocks(shape.channels, config.block_n)
    return _blocks(shape.filters, config.block_m) * across


def _gemm(direction: str, shape: ConvShape) -> _Gemm:
    if direction == "forward":
        return _Gemm(shape.out_rows, shape.filters, shape.taps * shape.channels, shape.channels)
    if direction == "dgrad":
        return _Gemm(shape.in_rows, shape.channels, shape.taps * shape.filters, shape.filters)
    if direction == "wgrad":
        return _Gemm(shape.filters, shape.taps * shape.channels, shape.out_rows, shape.channels)
    raise ValueError(f"direction must be one of {', '.join(DIRECTIONS)}, not {direction!r}")


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def _tiles(gemm: _Gemm, block_m: int, block_n: int) -> int:
    return _blocks(gemm.rows, block_m) * _blocks(gemm.columns, block_n)


def _width(columns: int) -> int:
    """Return the block that wastes least: padded columns, times the cost of re-reading the other operand in narrow tiles."""
    return min((128, 64, 32), key=lambda block: _blocks(columns, block) * block * (1 + 32 / block))


def _fitted(config: ConvTiles, gemm: _Gemm, dtype: torch.dtype, transformed: bool) -> ConvTiles:
    """Return the config with the warps that its registers need and the stages that fit into shared memory."""
    # Channels that cannot be read in vectors need an address each.
    many = config.block_m * config.block_n >= 128 * 64 or unit_of(gemm.period) * dtype.itemsize < 4 or (transformed and dtype.itemsize == 4)
    stages = config.num_stages
    while stages > 1 and replace(config, num_stages=stages).shared(dtype.itemsize, transformed) > SHARED:
        stages -= 1
    return replace(config, num_warps=8 if many else 4, num_stages=stages)


def _boxed(direction: str, shape: ConvShape, gemm: _Gemm, processors: int) -> Iterator[ConvTiles]:
    """Yield boxed tiles, and where they are few also with a split sum."""
    block_k = 64 if gemm.period > 32 else 32
    steps = shape.taps * _blocks(gemm.period, block_k)
    # A fourth stage of dgrad leaves no room for two blocks, because its epilogue loads a tile too.
    many = ((128, 64, 4),) if direction == "forward" else ()
    for block_m, block_n, stages in ((128, 64, 3), *many, (128, 128, 4), (64, 64, 4)):
        if block_n < 2 * gemm.columns or block_n == 64:
            # A group of four warps has 64 columns.
            one = ConvTiles(block_m, block_n, block_k, num_warps=block_n // 16, num_stages=stages, boxed=True)
            yield one
            count = boxes_of(shape, box(shape, block_m)) * _blocks(gemm.columns, block_n)
            yield from (replace(one, split=split) for split in splits(steps, count, processors)[:1])


def _variants(direction: str, first: ConvTiles, gemm: _Gemm) -> Iterator[ConvTiles]:
    """Yield configs around the first, the nearest first; their stages are reduced to fit later."""
    blocks = []
    for block_m in (128, 64):
        for block_n in (128, 64, 32):
            # Nothing is gained from a block that is padded to twice its columns.
            if block_n < 2 * gemm.columns and block_m < 2 * gemm.rows:
                flat = gemm.period % block_n != 0 if direction == "wgrad" else first.flat
                blocks.append(replace(first, block_m=block_m, block_n=block_n, flat=flat))
    near = [one for one in blocks if one.block_m == first.block_m or one.block_n == first.block_n]
    yield from near
    yield replace(first, group=8)
    yield replace(first, num_stages=4)
    yield replace(first, block_k=32 if first.block_k == 64 else 64)
    yield from blocks
    yield replace(first, flat=not first.flat)
