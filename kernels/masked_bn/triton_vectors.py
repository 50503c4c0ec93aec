# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""From partial results to per-channel values, in Triton: one small launch in each direction, for one batch-norm or for two.

A program owns BLOCK_C channels of one batch-norm and walks down its partial results, BLOCK_P at a time, always in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from der_fast.kernels.affine import Affine
from der_fast.kernels.compile_case import CompileCase
from der_fast.kernels.masked_bn.norms import Statistics, Sums

# Eight float32 are one sector of 32 bytes.
BLOCK_C = 8


def _block(parts: int) -> int:
    return min(128, max(16, 1 << (parts - 1).bit_length()))


@triton.jit
def _moved(old, new, momentum):
    # As torch.lerp: exact for a momentum of 0 and of 1.
    return tl.where(momentum < 0.5, old + momentum * (new - old), new - (new - old) * (1 - momentum))


@triton.jit
def _finalize(
    partials,
    weight,
    bias,
    mask,
    running_mean,
    running_variance,
    out,
    parts,
    channels,
    momentum,
    eps,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    dtype = out.dtype.element_ty
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < channels
    part = tl.arange(0, BLOCK_P).to(tl.int64)
    # Relative to one of the means, a sum of equal means is exact.
    pivot = tl.load(partials + channels + channel, mask=inside, other=0)
    pivot = tl.where(tl.load(partials + channel, mask=inside, other=0) > 0, pivot, 0.0)[None, :]
    count = tl.zeros((BLOCK_P, BLOCK_C), dtype)
    mean = tl.zeros((BLOCK_P, BLOCK_C), dtype)
    square = tl.zeros((BLOCK_P, BLOCK_C), dtype)
    for start in range(0, parts, BLOCK_P):
        valid = (start + part < parts)[:, None] & inside[None, :]
        offset = partials + (start + part)[:, None] * (3 * channels) + channel[None, :]
        others = tl.load(offset, mask=valid, other=0)
        filled = others > 0
        other_mean = tl.where(filled, tl.load(offset + channels, mask=valid, other=0) - pivot, 0.0)
        other_square = tl.where(filled, tl.load(offset + 2 * channels, mask=valid, other=0), 0.0)
        total = count + others
        share = tl.where(filled, others / tl.maximum(total, 1.0), 0.0)
        away = other_mean - mean
        square += tl.where(filled, other_square + away * away * count * share, 0.0)
        mean += away * share
        count = total
    elements = tl.where(inside, tl.sum(count, 0), 2.0)
    merged = tl.sum(count * mean, 0) / elements
    spread = mean - merged[None, :]
    squares = tl.sum(square + count * spread * spread, 0)
    centre = merged + tl.sum(pivot, 0)
    variance = squares / elements + eps
    # Plain float32 division and square root are approximate on the GPU.
    rstd = 1.0 / tl.sqrt(variance) if dtype == tl.float64 else tl.div_rn(1.0, tl.sqrt_rn(variance))
    gamma = tl.load(weight + channel, mask=inside, other=0)
    scale = gamma * rstd
    shift = tl.load(bias + channel, mask=inside, other=0) - gamma * centre * rstd
    if mask is not None:
        kept = tl.load(mask + channel, mask=inside, other=0)
        scale *= kept
        shift *= kept
    out += channel
    tl.store(out, centre, mask=inside)
    tl.store(out + channels, rstd, mask=inside)
    tl.store(out + 2 * channels, scale, mask=inside)
    tl.store(out + 3 * channels, shift, mask=inside)
    unbiased = squares / (elements - 1)
    tl.store(out + 4 * channels, unbiased, mask=inside)
    if running_mean is not None:
        old_mean = tl.load(running_mean + channel, mask=inside, other=0)
        old_variance = tl.load(running_variance + channel, mask=inside, other=0)
        tl.store(running_mean + channel, _moved(old_mean, centre, momentum), mask=inside)
        tl.store(running_variance + channel, _moved(old_variance, unbiased, momentum), mask=inside)


@triton.jit
def _finalize_kernel(
    partials,
    weight,
    bias,
    mask,
    running_mean,
    running_variance,
    out,
    parts,
    channels,
    momentum,
    partials2,
    weight2,
    bias2,
    mask2,
    running_mean2,
    running_variance2,
    out2,
    parts2,
    channels2,
    momentum2,
    eps,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    if tl.program_id(1) == 0:
        _finalize(partials, weight, bias, mask, running_mean, running_variance, out, parts, channels, momentum, eps, BLOCK_P, BLOCK_C)
    elif partials2 is not None:
        _finalize(
            partials2,
            weight2,
            bias2,
            mask2,
            running_mean2,
            running_variance2,
            out2,
            parts2,
            channels2,
            momentum2,
            eps,
            BLOCK_P,
            BLOCK_C,
        )


@triton.jit
def _coefficients(
    partials, mean, rstd, scale, weight, bias, mask, out, parts, channels, inverse, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):
    dtype = out.dtype.element_ty
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < channels
    part = tl.arange(0, BLOCK_P).to(tl.int64)
    first = tl.zeros((BLOCK_P, BLOCK_C), dtype)
    second = tl.zeros((BLOCK_P, BLOCK_C), dtype)
    for start in range(0, parts, BLOCK_P):
        valid = (start + part < parts)[:, None] & inside[None, :]
        offset = partials + (start + part)[:, None] * (2 * channels) + channel[None, :]
        first += tl.load(offset, mask=valid, other=0)
        second += tl.load(offset + channels, mask=valid, other=0)
    s1 = tl.sum(first, 0)
    s2 = tl.sum(second, 0)
    k0 = tl.load(scale + channel, mask=inside, other=0)
    k1 = -k0 * tl.load(rstd + channel, mask=inside, other=0) * (s2 * inverse)
    k2 = -k0 * (s1 * inverse) - k1 * tl.load(mean + channel, mask=inside, other=0)
    out += channel
    tl.store(out, k0, mask=inside)
    tl.store(out + channels, k1, mask=inside)
    tl.store(out + 2 * channels, k2, mask=inside)
    if mask is not None:
        gamma = tl.load(weight + channel, mask=inside, other=0)
        beta = tl.load(bias + channel, mask=inside, other=0)
        tl.store(out + 5 * channels, gamma * s2 + beta * s1, mask=inside)
        kept = tl.load(mask + channel, mask=inside, other=0)
        s1 *= kept
        s2 *= kept
    tl.store(out + 3 * channels, s2, mask=inside)
    tl.store(out + 4 * channels, s1, mask=inside)


@triton.jit
def _coefficients_kernel(
    partials,
    mean,
    rstd,
    scale,
    weight,
    bias,
    mask,
    out,
    parts,
    channels,
    inverse,
    partials2,
    mean2,
    rstd2,
    scale2,
    weight2,
    bias2,
    mask2,
    out2,
    parts2,
    channels2,
    inverse2,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    if tl.program_id(1) == 0:
        _coefficients(partials, mean, rstd, scale, weight, bias, mask, out, parts, channels, inverse, BLOCK_P, BLOCK_C)
    elif partials2 is not None:
        _coefficients(partials2, mean2, rstd2, scale2, weight2, bias2, mask2, out2, parts2, channels2, inverse2, BLOCK_P, BLOCK_C)


def _launch(kernel, arguments: Sequence[Sequence[object]], partials: Sequence[Tensor], *last: float) -> None:
    """Launch a kernel for every batch-norm, two at a time."""
    for start in range(0, len(partials), 2):
        here = partials[start : start + 2]
        given = [value for one in arguments[start : start + 2] for value in one]
        missing = [None] * ((2 - len(here)) * len(arguments[start]))
        grid = (max(triton.cdiv(one.shape[2], BLOCK_C) for one in here), len(here))
        block = _block(max(len(one) for one in here))
        with torch.cuda.device_of(here[0]):
            kernel[grid](*given, *missing, *last, BLOCK_P=block, BLOCK_C=BLOCK_C, enable_fp_fusion=True)


def finalize(norms: Sequence[Statistics], eps: float) -> list[tuple[Affine, Tensor, Tensor]]:
    """Launch the merge of the statistics; see `passes.finalize`."""
    outs, arguments = [], []
    for norm in norms:
        parts, _, channels = norm.partials.shape
        outs.append(torch.empty(5, channels, dtype=norm.partials.dtype, device=norm.partials.device))
        running = norm.running
        moved = (None, None) if running is None else (running.mean, running.variance)
        momentum = 0.0 if running is None else float(running.momentum)
        arguments.append([norm.partials, norm.weight, norm.bias, norm.mask, *moved, outs[-1], parts, channels, momentum])
    _launch(_finalize_kernel, arguments, [norm.partials for norm in norms], eps)
    return [(Affine(*out.unbind(0)[:4]), out[0], out[4]) for out in outs]


def backward_coefficients(norms: Sequence[Sums]) -> list[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """Launch the sum of the two reductions and what follows from it; see `passes.backward_coefficients`."""
    outs, arguments = [], []
    for norm in norms:
        parts, _, channels = norm.partials.shape
        rows = 5 if norm.mask is None else 6
        outs.append(torch.empty(rows, channels, dtype=norm.partials.dtype, device=norm.partials.device))
        affine = norm.affine.mean, norm.affine.rstd, norm.affine.scale
        inverse = 1.0 / norm.count
        arguments.append([norm.partials, *affine, norm.weight, norm.bias, norm.mask, outs[-1], parts, channels, inverse])
    _launch(_coefficients_kernel, arguments, [norm.partials for norm in norms])
    return [(out[:3], out[3], out[4], None if len(out) == 5 else out[5]) for out in outs]


def compile_cases() -> list[CompileCase]:
    """Return the launches for one batch-norm and for a block's join, for channels that are multiples of 16 and for others."""
    forward = ("partials", "weight", "bias", "mask", "running_mean", "running_variance", "out")
    backward = ("partials", "mean", "rstd", "scale", "weight", "bias", "mask", "out")
    found = []
    for name, kernel, pointers, own, last in (
        ("finalize", _finalize_kernel, forward, "momentum", {"eps": "fp32"}),
        ("coefficients", _coefficients_kernel, backward, "inverse", {}),
    ):
        one = {**dict.fromkeys(pointers, "*fp32"), "parts": "i32", "channels": "i32", own: "fp32"}
        two = {**one, **{f"{argument}2": kind for argument, kind in one.items()}}
        for norms, signature in (("", one), (".join", two)):
            absent = {argument: None for argument in kernel.arg_names if argument not in {**signature, **last}}
            constants = {**absent, "BLOCK_P": 128, "BLOCK_C": BLOCK_C}
            aligned = tuple(argument for argument, kind in signature.items() if kind.startswith("*"))
            for channels, multiples in (("64", ("channels", "channels2")), ("37", ())):
                known = (*aligned, *(argument for argument in multiples if argument in signature))
                case = f"masked_bn.{name}{norms}.{channels}"
                found.append(CompileCase(case, kernel, {**signature, **last}, constants, known))
    return found
