# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""The sum of a weight gradient's parts in Triton, for up to four convolutions in one launch.

A program owns BLOCK elements of one gradient and adds its parts in their order: no atomics, the same bits on every run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from der_fast.kernels.compile_case import CompileCase, typed
from der_fast.kernels.conv.parts import Parts

# Convolutions per launch: those of a bottleneck block with its projection.
MOST = 4
# Elements per program, and parts that it loads at a time: one after another, every load would wait for memory.
BLOCK, AHEAD = 256, 8


@triton.jit
def _add(parts, out, elements, split, block, BLOCK: tl.constexpr, AHEAD: tl.constexpr):
    place = block * BLOCK + tl.arange(0, BLOCK)
    inside = place < elements
    total = tl.zeros((BLOCK,), tl.float32)
    line = parts + place
    left = tl.zeros((BLOCK,), tl.int32) + split
    for _ in range(0, split, AHEAD):
        for part in tl.static_range(AHEAD):
            total += tl.load(line, mask=inside & (left > part), other=0.0)
            line += elements
        left -= AHEAD
    tl.store(out + place, total, mask=inside)


@triton.jit
def _sum_parts_kernel(
    parts0,
    out0,
    elements0,
    split0,
    parts1,
    out1,
    elements1,
    split1,
    parts2,
    out2,
    elements2,
    split2,
    parts3,
    out3,
    elements3,
    split3,
    BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
):
    block = tl.program_id(0)
    blocks = tl.cdiv(elements0, BLOCK)
    if block < blocks:
        _add(parts0, out0, elements0, split0, block, BLOCK, AHEAD)
    if parts1 is not None:
        block -= blocks
        blocks = tl.cdiv(elements1, BLOCK)
        if (block >= 0) & (block < blocks):
            _add(parts1, out1, elements1, split1, block, BLOCK, AHEAD)
    if parts2 is not None:
        block -= blocks
        blocks = tl.cdiv(elements2, BLOCK)
        if (block >= 0) & (block < blocks):
            _add(parts2, out2, elements2, split2, block, BLOCK, AHEAD)
    if parts3 is not None:
        block -= blocks
        blocks = tl.cdiv(elements3, BLOCK)
        if (block >= 0) & (block < blocks):
            _add(parts3, out3, elements3, split3, block, BLOCK, AHEAD)


def add(pending: Sequence[Parts]) -> None:
    """Launch the sums of 1 to `MOST` gradients; see `conv.add_parts`."""
    blocks, arguments = 0, []
    for one in pending:
        split, elements = one.parts.shape
        blocks += triton.cdiv(elements, BLOCK)
        arguments += [one.parts, one.out, elements, split]
    arguments += [None] * (4 * (MOST - len(pending)))
    with torch.cuda.device_of(pending[0].out):
        _sum_parts_kernel[(blocks,)](*arguments, BLOCK=BLOCK, AHEAD=AHEAD, num_warps=4, num_stages=1, enable_fp_fusion=True)


def compile_cases() -> list[CompileCase]:
    """Return the launches of a stem, and of a basic block with a projection."""
    found = []
    for name, sizes in (("stem", [(1728, 256)]), ("block", [(73728, 52), (147456, 29), (8192, 256)])):
        pointers = {f"{kind}{index}": "fp32" for index in range(len(sizes)) for kind in ("parts", "out")}
        numbers = {
            f"{kind}{index}": value for index, size in enumerate(sizes) for kind, value in zip(("elements", "split"), size, strict=True)
        }
        launched = typed(_sum_parts_kernel, pointers, "fp32", numbers, {"BLOCK": BLOCK, "AHEAD": AHEAD})
        found.append(CompileCase(f"conv.wgrad.sum.{name}", _sum_parts_kernel, **launched, num_warps=4, num_stages=1))
    return found
