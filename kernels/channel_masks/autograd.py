"""Masks and sparsity loss as one autograd function over the two launches of a backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from der_fast import native
from der_fast.kernels.channel_masks.structure import MaskStructure


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
            from der_fast.kernels.channel_masks.triton import forward

            forward(logits, scale, structure, masks, loss, work)
        else:
            native.channel_masks_forward(*_native(structure, logits, scale), *_facts(masks, loss, work), **_where(logits))
        ctx.save_for_backward(logits, work[inner:])
        ctx.structure, ctx.backend = structure, backend
        ctx.set_materialize_grads(False)
        return masks, loss

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_masks: Tensor | None, grad_loss: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        if grad_masks is None and grad_loss is None:
            return None, None, None, None
        logits, sides = ctx.saved_tensors
        structure: MaskStructure = ctx.structure
        gradient = torch.empty_like(logits)
        if grad_masks is not None:
            grad_masks = grad_masks.contiguous()
        if ctx.backend == "fused":
            from der_fast.kernels.channel_masks.triton import backward

            backward(logits, grad_masks, grad_loss, sides, structure, gradient)
        else:
            arriving = (None if grad is None else native.facts_of(grad) for grad in (grad_masks, grad_loss))
            native.channel_masks_backward(*_native(structure, logits, sides), *arriving, native.facts_of(gradient), **_where(logits))
        return gradient, None, None, None


def _facts(*tensors: Tensor) -> list[native.TensorFacts]:
    return [native.facts_of(tensor) for tensor in tensors]


def _native(structure: MaskStructure, logits: Tensor, other: Tensor) -> list[Any]:
    tables = (structure.rows, structure.row_offsets, structure.convs, structure.user_offsets, structure.users)
    return [(*_facts(*tables), structure.full), *_facts(logits, other)]


def _where(logits: Tensor) -> dict[str, int | None]:
    if logits.device.type == "cpu":
        return {"device": None, "stream": 0}
    return {"device": logits.get_device(), "stream": torch.cuda.current_stream(logits.device).cuda_stream}
