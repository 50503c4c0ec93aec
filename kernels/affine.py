"""What batch-norm and mask do to one channel, as four numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Added to the variance by every batch-norm of the networks.
EPSILON = 1e-5
VECTORS = ("mean", "rstd", "scale", "shift")


@dataclass(frozen=True)
class Affine:
    """Batch-norm with its mask, per channel: x̂ = (y − mean)·rstd and z = y·scale + shift.

    Attributes:
        mean: (C,) μ.
        rstd: (C,) r = 1/√(σ² + ε), biased variance.
        scale: (C,) m·γ·r.
        shift: (C,) m·(β − γ·μ·r).

    All in float32, on the activations' device (float64 for float64 activations).
    """

    mean: Tensor
    rstd: Tensor
    scale: Tensor
    shift: Tensor


def affine_of(mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, mask: Tensor | None, eps: float) -> Affine:
    """Return the Affine for these statistics, (C,) each; in evaluation mode they are the running ones."""
    rstd = torch.rsqrt(var + eps)
    scale, shift = weight * rstd, bias - weight * mean * rstd
    if mask is not None:
        scale, shift = mask * scale, mask * shift
    return Affine(mean, rstd, scale, shift)
