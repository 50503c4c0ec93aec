"""The passes over the activations that are compiled without a GPU, and what the code of each should be made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from der_fast.kernels import compile_case as names
from der_fast.kernels.compile_case import CAPABILITIES, CompileCase, Lack
from der_fast.kernels.device import H100_MULTIPROCESSORS
from der_fast.kernels.masked_bn import launch as choose

ITEMSIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
BATCH = 512
# Channels → side, of a ResNet-18 with a small stem; what pruning makes of its stages, as it comes and in multiples of 8.
WIDTHS = {64: 32, 128: 16, 256: 8, 512: 4, 18: 32, 37: 16, 74: 8, 148: 4, 24: 32, 40: 16, 80: 8, 152: 4}

# float16 and float32 differ in nothing but the bytes of an element: one width of each kind shows it.
EACH_KIND = (64, 37, 40)


def cases(kernel: Any, name: str, pointers: Mapping[str, str], constants: Mapping[str, Any], resident: int = 0) -> list[CompileCase]:
    """Return the launches of one pass.

    Args:
        kernel: of the pass.
        name: of the pass.
        pointers: name → 'act', 'fp32' or 'u8' of every tensor that is there; the others are None.
        constants: RELU or RECOMPUTE, where the kernel takes it.
        resident: blocks per multiprocessor that a reduction counts on; 0 for a pass that writes what it reads.
    """
    return [
        _case(kernel, f"masked_bn.{name}.{dtype}.{channels}", dtype, channels, pointers, constants, resident)
        for channels in WIDTHS
        for dtype in (ITEMSIZES if channels in EACH_KIND else ("bf16",))
    ]


def _case(
    kernel: Any, name: str, dtype: str, channels: int, pointers: Mapping[str, str], constants: Mapping[str, Any], resident: int
) -> CompileCase:
    rows = BATCH * WIDTHS[channels] ** 2
    view = choose.view(rows, channels, foldable="bits" not in pointers or channels % 8 == 0)
    processors = H100_MULTIPROCESSORS
    cut = choose.reduction(view, processors, resident) if resident else choose.elementwise(view, processors)
    sizes = {"rows": view.rows, "width": view.width, "channels": channels, "fold": view.fold, "tiles": cut.tiles}
    sizes = {argument: value for argument, value in sizes.items() if argument in kernel.arg_names}
    fixed = {**constants, "FOLDED": view.fold > 1, "BLOCK_M": cut.block_rows, "BLOCK_C": cut.block_columns}
    tile = cut.block_rows * cut.block_columns * ITEMSIZES[dtype]
    written = [argument for argument in ("out", "gz") if argument in pointers]
    return CompileCase(
        name=name,
        kernel=kernel,
        **names.typed(kernel, pointers, dtype, sizes, fixed),
        num_warps=cut.num_warps,
        resident=resident,
        tile_loads=tile * (list(pointers.values()).count("act") - len(written)),
        tile_stores=tile * len(written),
        wants=(names.WIDE_LOADS, *((names.WIDE_STORES,) if written else ())),
        lacks=tuple(_lacks(dtype, view, channels, pointers, resident)),
    )


def _lacks(dtype: str, view: choose.View, channels: int, pointers: Mapping[str, str], resident: int) -> Iterator[Lack]:
    unaligned = "bits" in pointers and channels % 8 != 0
    if unaligned:
        reason = f"rows of {channels} channels are not folded, because each begins a new byte of bits"
        yield Lack(names.WIDE_LOADS, reason)
        if "out" in pointers or "gz" in pointers:
            yield Lack(names.WIDE_STORES, reason)
    if resident and "shortcut" in pointers:
        # Three running sums, and the bits spread over the tile.
        full = view.width % choose.WIDEST == 0
        where = CAPABILITIES if unaligned or dtype == "fp32" else (90,) if full else ()
        yield Lack(names.RESIDENT, f"its registers leave room for fewer than {resident} blocks", where)
