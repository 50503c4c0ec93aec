# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Channel masks in Triton: one launch forward, one backward; see reference.py for the equations and structure.py for the tables.

Forward: a single program, because L_S depends on every mask. Its stages pass their results on through `work` in global memory (row sums,
group sums, sides) with a barrier in between, so every sum has the same order in every run; nothing is atomic. Backward: a program per row.
Masks are computed in the logits' dtype, sums over groups and convolutions in float64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from der_fast.kernels.channel_masks.structure import ROW, MaskStructure
from der_fast.kernels.compile_case import CompileCase

FORWARD_WARPS = 16
# How many of a group's users are summed at a time; a ResNet-18's stream has about ten, a ResNet-152's about seventy.
USERS = 128


@triton.jit
def _forward_kernel(
    logits,
    scale,
    rows,
    row_offsets,
    convs,
    masks,
    loss,
    work,
    row_count,
    group_count,
    conv_count,
    full,
    ROW: tl.constexpr,
    SPAN: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    CONV_BLOCK: tl.constexpr,
):
    factor = tl.load(scale)
    for first in range(0, row_count, ROW_BLOCK):
        row = first + tl.arange(0, ROW_BLOCK)
        begin = tl.load(rows + 3 * row, mask=row < row_count, other=0)
        end = tl.load(rows + 3 * row + 1, mask=row < row_count, other=0)
        channel = begin[:, None] + tl.arange(0, ROW)[None, :]
        inside = channel < end[:, None]
        x = tl.load(logits + channel, mask=inside, other=0.0) * factor
        # The power never exceeds one, so nothing overflows, and NaN stays NaN.
        power = tl.exp(-tl.abs(x))
        mask = tl.where(x >= 0, 1.0, power) / (1.0 + power)
        # 2⁻²⁴, as in reference.py.
        mask = tl.where(mask < 5.9604644775390625e-08, 0.0, mask)
        tl.store(masks + channel, mask, mask=inside)
        row_sum = tl.sum(tl.where(inside, mask, 0.0), 1)
        tl.store(work + row, row_sum.to(tl.float64), mask=row < row_count)
    tl.debug_barrier()

    group = tl.arange(0, GROUP_BLOCK)
    sums = work + row_count
    begin = tl.load(row_offsets + group, mask=group < group_count, other=0)
    end = tl.load(row_offsets + group + 1, mask=group < group_count, other=0)
    row = begin[:, None] + tl.arange(0, GROUP_ROWS)[None, :]
    group_sum = tl.sum(tl.load(work + row, mask=row < end[:, None], other=0.0), 1)
    tl.store(sums + group, group_sum, mask=group < group_count)
    tl.debug_barrier()

    conv = tl.arange(0, CONV_BLOCK)
    sides = sums + group_count
    there = conv < conv_count
    entry = convs + conv * (2 + 2 * SPAN)
    reads = tl.load(entry, mask=there, other=0).to(tl.float64)
    area = tl.load(entry + 1, mask=there, other=0).to(tl.float64)
    writes = tl.zeros([CONV_BLOCK], tl.float64)
    for part in tl.static_range(SPAN):
        read = tl.load(entry + 2 + part, mask=there, other=-1)
        written = tl.load(entry + 2 + SPAN + part, mask=there, other=-1)
        reads += tl.load(sums + read, mask=read >= 0, other=0.0)
        writes += tl.load(sums + written, mask=written >= 0, other=0.0)
    tl.store(sides + conv, reads, mask=there)
    tl.store(sides + conv_count + conv, writes, mask=there)
    tl.store(loss, (tl.sum(area * reads * writes, 0) / full).to(loss.dtype.element_ty))


@triton.jit
def _backward_kernel(
    logits,
    grad_masks,
    grad_loss,
    sides,
    rows,
    convs,
    user_offsets,
    users,
    gradient,
    conv_count,
    full,
    ROW: tl.constexpr,
    SPAN: tl.constexpr,
    USERS: tl.constexpr,
):
    row = tl.program_id(0)
    channel = tl.load(rows + 3 * row) + tl.arange(0, ROW)
    inside = channel < tl.load(rows + 3 * row + 1)
    group = tl.load(rows + 3 * row + 2)
    e = tl.load(logits + channel, mask=inside, other=0.0)
    arriving = tl.zeros_like(e)
    if grad_masks is not None:
        arriving += tl.load(grad_masks + channel, mask=inside, other=0.0)
    if grad_loss is not None:
        last = tl.load(user_offsets + group + 1)
        slope = tl.zeros([USERS], tl.float64)
        for first in range(tl.load(user_offsets + group), last, USERS):
            position = first + tl.arange(0, USERS)
            user = tl.load(users + position, mask=position < last, other=0)
            conv = tl.where(user < conv_count, user, user - conv_count)
            area = tl.load(convs + conv * (2 + 2 * SPAN) + 1, mask=position < last, other=0)
            slope += area.to(tl.float64) * tl.load(sides + user, mask=position < last, other=0.0)
        arriving += (tl.sum(slope, 0) / full).to(e.dtype) * tl.load(grad_loss)
    power = tl.exp(-tl.abs(e))
    tl.store(gradient + channel, arriving * (power / ((1.0 + power) * (1.0 + power))), mask=inside)


def _forward_constants(structure: MaskStructure, itemsize: int) -> dict[str, int]:
    """Return block sizes: 16 single or 8 double numbers per thread in the stage over channels, everything at once in the others."""
    power = triton.next_power_of_2
    most = max(1, -(-max(structure.widths) // ROW))
    return {
        "ROW": ROW,
        "SPAN": structure.span,
        "ROW_BLOCK": min(power(len(structure.rows)), 256 // itemsize),
        "GROUP_BLOCK": power(len(structure.widths)),
        "GROUP_ROWS": power(most),
        "CONV_BLOCK": power(len(structure.convolutions)),
    }


def forward(logits: Tensor, scale: Tensor, structure: MaskStructure, masks: Tensor, loss: Tensor, work: Tensor) -> None:
    """Fill masks (C,), loss () and work (R + G + 2L,) float64; one launch on the current stream."""
    with torch.cuda.device_of(logits):
        _forward_kernel[(1,)](
            logits,
            scale,
            structure.rows,
            structure.row_offsets,
            structure.convs,
            masks,
            loss,
            work,
            len(structure.rows),
            len(structure.widths),
            len(structure.convolutions),
            structure.full,
            **_forward_constants(structure, logits.element_size()),
            num_warps=FORWARD_WARPS,
            enable_fp_fusion=True,
        )


def backward(
    logits: Tensor, grad_masks: Tensor | None, grad_loss: Tensor | None, sides: Tensor, structure: MaskStructure, gradient: Tensor
) -> None:
    """Fill the gradient (C,) from those of the masks (C,) and of the loss (), either of which may be None; one launch."""
    with torch.cuda.device_of(logits):
        _backward_kernel[(len(structure.rows),)](
            logits,
            grad_masks,
            grad_loss,
            sides,
            structure.rows,
            structure.convs,
            structure.user_offsets,
            structure.users,
            gradient,
            len(structure.convolutions),
            structure.full,
            ROW=ROW,
            SPAN=structure.span,
            USERS=USERS,
            num_warps=1,
            enable_fp_fusion=True,
        )


def compile_cases() -> list[CompileCase]:
    """A network of 160 groups and 150 convolutions with 20,000 channels, in both precisions."""
    blocks = {"ROW": ROW, "SPAN": 3, "GROUP_BLOCK": 256, "GROUP_ROWS": 16, "CONV_BLOCK": 256}
    found = []
    for name, dtype in (("fp32", torch.float32), ("fp64", torch.float64)):
        tables = dict.fromkeys(("rows", "row_offsets", "convs", "user_offsets", "users"), "*i32")
        numbers = dict.fromkeys(("logits", "scale", "masks", "loss", "grad_masks", "grad_loss", "gradient"), f"*{name}")
        counts = dict.fromkeys(("row_count", "group_count", "conv_count", "full"), "i32")
        signature = {**tables, **numbers, **counts, "work": "*fp64", "sides": "*fp64"}
        constants = {**blocks, "ROW_BLOCK": 256 // dtype.itemsize}
        found.append(CompileCase(f"channel_masks.forward.{name}", _forward_kernel, signature, constants, num_warps=FORWARD_WARPS))
        constants = {"ROW": ROW, "SPAN": 3, "USERS": USERS}
        found.append(CompileCase(f"channel_masks.backward.{name}", _backward_kernel, signature, constants, num_warps=1))
    return found
