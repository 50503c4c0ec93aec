"""Every batch-norm's part of the mask vector: one gather in either direction, instead of a copy and a scatter per batch-norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Kernels load vectors of 16 bytes: every part begins at a multiple of as many float32 numbers.
_ALIGNED = 4


class _Slices(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, masks: Tensor, places: Sequence[slice], gather: Tensor, sources: Tensor, zero: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(sources, zero)
        parts = masks.index_select(0, gather)
        return tuple(parts[place] for place in places)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        sources, zero = ctx.saved_tensors
        flat = torch.cat([*grad_outputs, zero])
        return flat.index_select(0, sources.flatten()).reshape(sources.shape).sum(0), None, None, None, None


class MaskSlices:
    """Cuts a mask vector (C,) into the given parts, which may overlap; the gradients of an entry are added in the order of the parts.

    Args:
        where: the parts.
        channels: C.
    """

    def __init__(self, where: Sequence[slice], channels: int) -> None:
        self.where = list(where)
        rows: list[list[int]] = [[] for _ in range(channels)]
        position = 0
        for part in self.where:
            for channel in range(channels)[part]:
                rows[channel].append(position)
                position += 1
        # Entries that are in fewer parts than others add the zero after the last gradient.
        depth = max(map(len, rows))
        self.places: list[slice] = []
        gather: list[int] = []
        for part in self.where:
            entries = list(range(channels)[part])
            self.places.append(slice(len(gather), len(gather) + len(entries)))
            gather += entries + [0] * (-len(entries) % _ALIGNED)
        self._gather = torch.tensor(gather, dtype=torch.int64)
        self._sources = torch.tensor([row + [position] * (depth - len(row)) for row in rows], dtype=torch.int64).t().contiguous()
        self._zero = torch.zeros(1)

    def __call__(self, masks: Tensor) -> tuple[Tensor, ...]:
        """Return the parts."""
        if not masks.requires_grad:
            return tuple(masks[part] for part in self.where)
        if self._sources.device != masks.device:
            self._gather, self._sources = self._gather.to(masks.device), self._sources.to(masks.device)
        if self._zero.device != masks.device or self._zero.dtype != masks.dtype:
            self._zero = self._zero.to(masks)
        tables = self.places, self._gather, self._sources, self._zero
        parts: tuple[Tensor, ...] = _Slices.apply(masks, *tables)  # type: ignore[no-untyped-call]
        return parts
