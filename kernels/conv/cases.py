"""The convolutions that are compiled without a GPU: shapes, and what the code of each should be made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from der_fast.kernels import compile_case as names
from der_fast.kernels.compile_case import CompileCase, Lack
from der_fast.kernels.conv.launch import ConvTiles, default_config, resident
from der_fast.kernels.conv.registers import ALONE, SPILLS
from der_fast.kernels.conv.shape import ConvShape, unit_of
from der_fast.kernels.conv.triton_tiles import constants

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
BATCH = 512


def _square(channels: int, side: int) -> ConvShape:
    return ConvShape(BATCH, channels, side, side, channels, 3, 1)


# A ResNet-18 with a small stem; what pruning makes of its stages, about 28 %, as it comes and in multiples of 8.
STEM = ConvShape(BATCH, 3, 32, 32, 64, 3, 1)
SHORTCUT = ConvShape(BATCH, 64, 32, 32, 128, 1, 2)
SHAPES = {
    "3x64": STEM,
    **{f"{channels}x{channels}": _square(channels, side) for channels, side in ((64, 32), (128, 16), (256, 8), (512, 4))},
    "64x128.stride2": ConvShape(BATCH, 64, 32, 32, 128, 3, 2),
    "64x128.1x1": SHORTCUT,
    **{f"{channels}x{channels}": _square(channels, side) for channels, side in ((18, 32), (37, 16), (74, 8), (148, 4))},
    **{f"{channels}x{channels}": _square(channels, side) for channels, side in ((24, 32), (40, 16), (80, 8), (152, 4))},
}
# float16 differs from bfloat16 in the names of its instructions only, and float32 is for tests: one shape of each kind shows both.
EACH_KIND = ("64x64", "37x37", "40x40")
# What runs without its neighbours' work is compared with cuDNN: one shape of each kind, and those whose tiles differ.
PLAIN = ("3x64", "256x256", "18x18", *EACH_KIND)
# The first layers of blocks: what a dgrad does besides differs from the chain's in what it loads at its end.
JOINED = ("64x64", "128x128", "256x256", "512x512", "64x128.stride2", "40x40")
# A size that a kernel takes, of shape, tiles, and whether an operand is transformed.
Size = Callable[[ConvShape, ConvTiles, bool], int]
# The ones that all three take.
SIZES: dict[str, Size] = {
    "height": lambda shape, *_: shape.height,
    "width": lambda shape, *_: shape.width,
    "out_height": lambda shape, *_: shape.out_height,
    "out_width": lambda shape, *_: shape.out_width,
    "channel_units": lambda shape, *_: shape.channels // unit_of(shape.channels),
    "filter_units": lambda shape, *_: shape.filters // unit_of(shape.filters),
}
# Tensors that a launch may lack, by what they are for; those of the layer before come stored for a stem and a shortcut.
_BEFORE = ("scale", "shift", "y_in", "mean", "rstd")


def cases(
    kernel: Any, direction: str, pointers: Mapping[str, str], plain: tuple[str, ...], values: Mapping[str, Size]
) -> list[CompileCase]:
    """Return the launches of a training step's chain, and those without its neighbours' work.

    Args:
        kernel: of the direction.
        direction: 'forward', 'dgrad' or 'wgrad'.
        pointers: name → 'act' or 'fp32' of every tensor that the chain gives.
        plain: those without which there is no convolution.
        values: name → `Size` of every size that this kernel takes.
    """
    return list(_cases(kernel, direction, pointers, plain, values))


def joined_cases(kernel: Any, pointers: Mapping[str, str], values: Mapping[str, Size]) -> list[CompileCase]:
    """Return the dgrads of a training step's chain that continue through a join; arguments as above."""
    return [_case(kernel, f"conv.dgrad.bf16.{size}.join", "dgrad", SHAPES[size], pointers, "bf16", values) for size in JOINED]


def _cases(
    kernel: Any, direction: str, pointers: Mapping[str, str], plain: tuple[str, ...], values: Mapping[str, Size]
) -> Iterator[CompileCase]:
    for size, shape in SHAPES.items():
        if shape is STEM and direction == "dgrad":
            # Images need no gradient.
            continue
        for dtype in DTYPES if size in EACH_KIND else ("bf16",):
            given = {name: kind for name, kind in pointers.items() if not (shape in (STEM, SHORTCUT) and name in _BEFORE)}
            if "y_in" not in given and direction == "dgrad":
                given.pop("partials", None)
            yield _case(kernel, f"conv.{direction}.{dtype}.{size}.chain", direction, shape, given, dtype, values)
        if size in PLAIN:
            alone = {name: pointers[name] for name in plain}
            yield _case(kernel, f"conv.{direction}.bf16.{size}", direction, shape, alone, "bf16", values)


def _case(
    kernel: Any, name: str, direction: str, shape: ConvShape, pointers: Mapping[str, str], dtype: str, values: Mapping[str, Size]
) -> CompileCase:
    transformed = _transformed(direction, pointers)
    config = default_config(direction, shape, DTYPES[dtype], transformed=transformed)
    itemsize = DTYPES[dtype].itemsize
    sizes = {argument: int(value(shape, config, transformed)) for argument, value in values.items()}
    return CompileCase(
        name=name,
        kernel=kernel,
        **names.typed(kernel, pointers, dtype, sizes, constants(shape, config, False)),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        stack_budget=max(SPILLS.get(name, {}).values(), default=0),
        # What `default_split` counts on, and why `default_config` halves the depth of what is transformed.
        resident=resident(direction, config, transformed) if direction == "wgrad" or (transformed and itemsize == 2) else 0,
        tile_loads=config.block_k * (config.block_m * (1 + ("coefficients" in pointers)) + config.block_n) * itemsize,
        tile_stores=config.block_m * config.block_n * (4 if direction == "wgrad" else itemsize),
        wants=_wants(dtype),
        lacks=tuple(_lacks(name, direction, shape, config, dtype, pointers)),
    )


def _transformed(direction: str, pointers: Mapping[str, str]) -> bool:
    """Return whether an operand is not multiplied as it is stored; dgrad's scale belongs to its epilogue."""
    return "coefficients" in pointers or (direction != "dgrad" and "scale" in pointers)


def _wants(dtype: str) -> tuple[str, ...]:
    moves = (names.WIDE_LOADS, names.WIDE_STORES, names.COPIES)
    # float32 is for tests: its products are exact, which tensor cores are not.
    if dtype == "fp32":
        return moves
    return (names.TENSOR_CORES, names.NO_SCALAR_LOOP, *moves, names.ASKED_ASYNCHRONOUS, names.ASYNCHRONOUS)


def _lacks(name: str, direction: str, shape: ConvShape, config: ConvTiles, dtype: str, pointers: Mapping[str, str]) -> Iterator[Lack]:
    """Yield what is missing today, by the rules that explain it; what the compiler decides case by case is listed by name."""
    itemsize = DTYPES[dtype].itemsize
    # Forward reads x and the weight along channels; dgrad reads g along filters and the weight along channels; wgrad both tensors.
    read = shape.channels if direction == "forward" else min(shape.channels, shape.filters, key=unit_of)
    written = shape.filters if direction == "forward" else shape.channels
    access = unit_of(read) * itemsize
    if access < 16:
        yield Lack(names.WIDE_LOADS, f"rows of {read} channels of {dtype} begin at multiples of {access} bytes only")
    if (stored := unit_of(written) * (4 if direction == "wgrad" else itemsize)) < 16:
        yield Lack(names.WIDE_STORES, f"rows of {written} channels are stored at multiples of {stored} bytes only")
    if access < 4:
        yield Lack(names.COPIES, f"an asynchronous copy has at least 4 bytes, and rows begin at multiples of {access}")
    if dtype != "fp32":
        yield from _products(direction, shape, config, access, pointers)
    if direction == "wgrad" and not _transformed(direction, pointers) and access >= 4:
        yield Lack(names.COPIES, "g is transposed on its way to HMMA: it is loaded into registers instead", (80,))
    if name in SPILLS:
        yield Lack(names.NO_LOCAL, "registers spill", tuple(SPILLS[name]))
    if name in ALONE:
        yield Lack(names.RESIDENT, "its registers leave room for one block", ALONE[name])


def _products(direction: str, shape: ConvShape, config: ConvTiles, access: int, pointers: Mapping[str, str]) -> Iterator[Lack]:
    if access < 4:
        yield Lack(names.ASKED_ASYNCHRONOUS, "operands that are not copied asynchronously are waited for", (90,))
    elif direction == "wgrad" and "scale" in pointers:
        yield Lack(names.ASKED_ASYNCHRONOUS, "x is transformed into shared memory, which Triton waits for", (90,))
    # Some of dgrad's products do stay in flight: those of a 1×1 kernel, and of whole depth unless a join follows.
    apart = direction == "dgrad" and (shape.kernel == 1 or (config.block_k == 64 and "bits" not in pointers))
    formed = _transformed(direction, pointers) and not apart
    if access < 4 or formed:
        reason = "an operand is formed in registers: the assembler waits for every product before they are written again"
        yield Lack(names.ASYNCHRONOUS, reason if formed else "as in the IR", (90,))
