"""Channel masks in plain PyTorch: the definition of correct.

    m   = σ(s·e), values below 2⁻²⁴ snapped to exact zero                  (eq. 5)
    g'_e = g_m · σ(e)[1 − σ(e)]                                           (compensated gradient, eq. 7)
    L_S = Σ_l K_l·‖m_in(l)‖₁·‖m_out(l)‖₁ / Σ_l K_l·c_in(l)·c_out(l)        (sparsity loss, eq. 8)

The compensated gradient is computed in this closed form and never as the paper's quotient
σ(e)[1−σ(e)] / (s·σ(se)[1−σ(se)]) · g_e, which is 0/0 as soon as s·e saturates. Because it replaces the derivative of the mask
itself, it applies to every loss that reaches `e`, including the sparsity loss.

Shapes: logits, masks (C,), one flat vector for the whole network; group sums (G,); convolutions L. Any floating dtype.

Since masks are non-negative, every channel of a group has the same slope,

    ∂L_S/∂m_g = Σ_l K_l·([g in in(l)]·‖m_out(l)‖₁ + [g in out(l)]·‖m_in(l)‖₁) / Σ_l K_l·c_in(l)·c_out(l),

so a kernel computes the whole gradient in one pass: g'_e = σ(e)[1 − σ(e)]·(g_m + ∂L_S/∂m_g·g_L). Saved for backward: the logits and, for
the slopes, the 2L numbers ‖m_in(l)‖₁ and ‖m_out(l)‖₁. Bytes moved: 2C numbers forward, 3C backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from der_fast.kernels.channel_masks.structure import MaskStructure

# Smaller masks become denormal after a product or two, and denormals make a CPU several times slower.
SNAP = 2.0**-24


class _ChannelMasks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, scale: Tensor | float) -> Tensor:
        ctx.save_for_backward(logits)
        masks = torch.sigmoid(logits * scale)
        return torch.where(masks < SNAP, torch.zeros_like(masks), masks)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (logits,) = ctx.saved_tensors
        return grad_outputs[0] * torch.sigmoid(logits) * torch.sigmoid(-logits), None


def channel_masks_reference(logits: Tensor, scale: Tensor | float) -> Tensor:
    """Return m = σ(s·e), shape (C,), whose gradient is the compensated one."""
    masks: Tensor = _ChannelMasks.apply(logits, scale)  # type: ignore[no-untyped-call]
    return masks


def sparsity_loss_reference(masks: Tensor, membership: Tensor, reads: Tensor, writes: Tensor, image: Tensor, area: Tensor) -> Tensor:
    """Return L_S, a scalar in [0, 1].

    Args:
        masks: (C,) every mask of the network.
        membership: (G, C) 1 where channel c belongs to group g.
        reads, writes: (L, G) 1 where convolution l reads (writes) group g.
        image: (L,) image channels that convolution l reads: 3 for the stem, else 0.
        area: (L,) kernel height × width, K_l.
    """
    sums = membership @ masks
    sizes = membership.sum(1)
    soft = (area * (reads @ sums + image) * (writes @ sums)).sum()
    return soft / (area * (reads @ sizes + image) * (writes @ sizes)).sum()


def masks_and_sparsity_reference(logits: Tensor, scale: Tensor | float, structure: MaskStructure) -> tuple[Tensor, Tensor]:
    """Return the masks (C,) and L_S; arguments as in `der_fast.kernels.channel_masks.masks_and_sparsity`, unchecked."""
    masks = channel_masks_reference(logits, scale)
    return masks, sparsity_loss_reference(masks, **structure.terms(logits.dtype))
