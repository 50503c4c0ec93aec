"""Every batch-norm's part of the mask vector, with one gather in the backward pass instead of a scatter per batch-norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class _Slices(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, masks: Tensor, where: Sequence[slice], sources: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(sources)
        return tuple(masks[part].clone() for part in where)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (sources,) = ctx.saved_tensors
        flat = torch.cat([*grad_outputs, grad_outputs[0].new_zeros(1)])
        return flat.index_select(0, sources.flatten()).reshape(sources.shape).sum(0), None, None


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
        self._sources = torch.tensor([row + [position] * (depth - len(row)) for row in rows], dtype=torch.int64).t().contiguous()

    def __call__(self, masks: Tensor) -> tuple[Tensor, ...]:
        """Return the parts."""
        if not masks.requires_grad:
            return tuple(masks[part] for part in self.where)
        if self._sources.device != masks.device:
            self._sources = self._sources.to(masks.device)
        parts: tuple[Tensor, ...] = _Slices.apply(masks, self.where, self._sources)  # type: ignore[no-untyped-call]
        return parts
