"""Gather, batch-norm fold, padding, cast and layout of folded weights in plain PyTorch: the definition of correct.

    scale(i) = γ_i / √(σ²_i + ε)                                     (1 for a weight without batch-norm)
    weight:  W'[k, c, r, s] = scale(row_k) · W[row_k, column_c, r, s]
    scale:   v[k] = scale(row_k)
    shift:   v[k] = β[row_k] − scale(row_k) · μ[row_k]
    copy:    v[k] = source[row_k]

A row or column of -1 is padding and gives exact zeros. Everything is computed in float64 and rounded once, to nearest even, so that every
implementation gives the same bits. In the arena a weight of shape (K, C, R, S) is stored in the order KCRS or KRSC; each tensor starts at
its job's offset, and gaps between tensors are zero. Bytes moved: each kept weight is read once and written once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from der_fast.kernels.affine import EPSILON

WEIGHT, SCALE, SHIFT, COPY = 0, 1, 2, 3
LAYOUTS = ("KCRS", "KRSC")


@dataclass(frozen=True)
class Norm:
    """A batch-norm's γ, β, running mean and variance, each (K,), with the weight's dtype and device."""

    weight: Tensor
    bias: Tensor
    mean: Tensor
    variance: Tensor


@dataclass(frozen=True)
class Job:
    """One tensor of an arena.

    Attributes:
        kind: WEIGHT, SCALE, SHIFT or COPY.
        offset: in bytes, a multiple of 64.
        dtype: of the result: float64, float32, bfloat16 or float16.
        rows: int32 (K',) on the CPU, positions in the source's first dimension, -1 for a zero.
        columns: int32 (C',), the same in the second; WEIGHT only.
        weight: (K, C, R, S) for WEIGHT, (K,) for COPY, float32 or float64, any strides; else None.
        norm: the batch-norm to fold in; None where there is none (WEIGHT) or it is not read (COPY).
    """

    kind: int
    offset: int
    dtype: torch.dtype
    rows: Tensor
    columns: Tensor | None = None
    weight: Tensor | None = None
    norm: Norm | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the result."""
        if self.kind != WEIGHT:
            return (len(self.rows),)
        assert self.weight is not None and self.columns is not None
        return (len(self.rows), len(self.columns), *self.weight.shape[2:])


def compact_reference(jobs: Sequence[Job], storage: Tensor, *, layout: str = "KCRS", epsilon: float = EPSILON) -> None:
    """Fill the arena `storage` (uint8, 1-D) as the module's docstring defines.

    Args:
        jobs: in ascending order of offsets, without overlap.
        storage: on any device; overwritten from its first to its last byte.
        layout: 'KCRS' or 'KRSC', of the weights.
        epsilon: added to the variance.
    """
    storage.zero_()
    for job in jobs:
        value = round_once(value_of(job, epsilon), job.dtype)
        if job.kind == WEIGHT and layout == "KRSC":
            value = value.permute(0, 2, 3, 1)
        data = value.contiguous().flatten().view(torch.uint8)
        storage[job.offset : job.offset + len(data)] = data.to(storage.device)


def value_of(job: Job, epsilon: float) -> Tensor:
    """Return the job's result in float64, before rounding."""
    rows = job.rows.long()
    if job.kind == COPY:
        assert job.weight is not None
        return _taken(job.weight.double(), rows, 0)
    scale = None
    if job.norm is not None:
        scale = job.norm.weight.double() / _root(job.norm.variance.double() + epsilon)
    if job.kind == WEIGHT:
        assert job.weight is not None and job.columns is not None
        value = job.weight.double()
        value = value if scale is None else value * scale[:, None, None, None]
        return _taken(_taken(value, rows, 0), job.columns.long(), 1)
    assert scale is not None and job.norm is not None
    return _taken(scale if job.kind == SCALE else job.norm.bias.double() - scale * job.norm.mean.double(), rows, 0)


def _root(value: Tensor) -> Tensor:
    """Return the correctly rounded square root; PyTorch's in float64 is one unit off for about one number in a hundred."""
    with np.errstate(invalid="ignore"):
        return torch.from_numpy(np.sqrt(value.cpu().numpy())).to(value.device)


def _taken(value: Tensor, index: Tensor, dim: int) -> Tensor:
    """Take `index` along `dim`, with zeros where it is -1."""
    index = index.to(value.device)
    taken = value.new_zeros([len(index) if axis == dim else size for axis, size in enumerate(value.shape)])
    where = index >= 0
    position = where.nonzero().squeeze(1)
    return taken.index_copy_(dim, position, value.index_select(dim, index[where]))


def round_once(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float64 to `dtype`, to nearest even.

    PyTorch converts to 16 bits via float32 and so rounds twice. Rounding to odd in between (truncated, last bit set where anything was
    lost) makes the second rounding exact (Boldo and Melquiond 2008, "Emulation of FMA and correctly rounded sums").
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return value.to(dtype)
    nearest = value.float()
    lost = (nearest.double() != value) & ~value.isnan()
    bits = nearest.view(torch.int32)
    bits = torch.where(lost & (nearest.double().abs() > value.abs()), bits - 1, bits)
    return torch.where(lost, bits | 1, bits).view(torch.float32).to(dtype)
