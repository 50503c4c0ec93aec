"""Masks and sparsity loss as one autograd function over the two launches of a backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from der_fast import native
from der_fast.kernels.channel_masks.structure import TABLES, MaskStructure


def masks_and_sparsity_on(logits: Tensor, scale: Tensor, structure: MaskStructure, backend: str) -> tuple[Tensor, Tensor]:
    """Return masks and L_S as `backend` ('fused' or 'native') computes them; arguments checked, `scale` of the logits' dtype and device."""
    masks, loss = _MasksAndSparsity.apply(logits, scale, structure, backend)  # type: ignore[no-untyped-call]
    return masks, loss


class _MasksAndSparsity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, scale: Tensor, structure: MaskStructure, backend: str) -> tuple[Tensor, Tensor]:
        masks, loss = torch.empty_like(logits), logits.new_empty(())
        # Sums of rows, sums of groups, sides: in double precision, because there are few of them.
        inner = len(structure.rows) + len(structure.widths)
        work = torch.empty(inner + 2 * len(structure.convolutions), dtype=torch.float64, device=logits.device)
        if backend == "fused":
            from der_fast.kernels.channel_masks.triton_masks import forward

            forward(logits, scale, structure, masks, loss, work)
        else:
            device, stream = _where(logits)
            facts = [native.facts_of(tensor) for tensor in (logits, scale, masks, loss, work)]
            native.channel_masks_forward(_tables(structure), *facts, device=device, stream=stream)
        ctx.save_for_backward(logits, work[inner:])
        ctx.structure, ctx.backend = structure, backend
        ctx.set_materialize_grads(False)
        return masks, loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_masks: Tensor | None, grad_loss: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        if grad_masks is None and grad_loss is None:
            return None, None, None, None
        logits, sides = ctx.saved_tensors
        structure: MaskStructure = ctx.structure
        gradient = torch.empty_like(logits)
        if grad_masks is not None:
            grad_masks = grad_masks.contiguous()
        if ctx.backend == "fused":
            from der_fast.kernels.channel_masks.triton_masks import backward

            backward(logits, grad_masks, grad_loss, sides, structure, gradient)
        else:
            device, stream = _where(logits)
            native.channel_masks_backward(
                _tables(structure),
                native.facts_of(logits),
                native.facts_of(sides),
                None if grad_masks is None else native.facts_of(grad_masks),
                None if grad_loss is None else native.facts_of(grad_loss),
                native.facts_of(gradient),
                device=device,
                stream=stream,
            )
        return gradient, None, None, None


def _tables(structure: MaskStructure) -> tuple[Any, ...]:
    return (*(native.facts_of(getattr(structure, name)) for name in TABLES), structure.full)


def _where(logits: Tensor) -> tuple[int | None, int]:
    """The device's number and the handle of its current stream; none on the CPU."""
    if logits.device.type == "cpu":
        return None, 0
    return logits.get_device(), torch.cuda.current_stream(logits.device).cuda_stream
