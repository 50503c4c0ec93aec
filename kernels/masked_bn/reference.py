"""Batch-norm × channel mask (+ residual) (+ ReLU) in plain PyTorch: the definition of correct.

    x̂ = (x − μ)·r,  r = 1/√(σ² + ε)
    z = m ⊙ (γ·x̂ + β) (+ h),   a = ReLU(z)                               (eq. 9)

The mask is folded into γ and β, two vectors of C numbers, so that it costs no pass over the activation: with S1 = Σ g_z and
S2 = Σ g_z·x̂, autograd of the folded form gives dβ = m·S1, dγ = m·S2 and dm = γ·S2 + β·S1 (eq. 10).

Layout: x, h, a are (N, C, H, W), channels-last or contiguous; γ, β, m and the running statistics are (C,). Statistics over
N·H·W in the dtype PyTorch's batch-norm accumulates in. Saved for backward: x, the batch statistics, and a (for the ReLU).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from der_fast.kernels.affine import EPSILON


def masked_bn_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    mask: Tensor | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = EPSILON,
) -> Tensor:
    """Return a of shape (N, C, H, W); in training mode the running statistics are updated in place.

    Args:
        x: (N, C, H, W) the convolution's output.
        weight, bias: (C,) γ and β.
        running_mean, running_var: (C,) used in evaluation mode, updated with `momentum` in training mode.
        mask: (C,) in [0, 1], or None for no mask.
        residual: (N, C, H, W) added after the mask, or None.
        relu: apply ReLU last.
        training: normalise with the batch's statistics (biased variance) instead of the running ones.
    """
    if x.shape[1] == 0:
        return x
    if mask is not None:
        weight, bias = weight * mask, bias * mask
    out = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    if residual is not None:
        # Batch-norm's backward needs its input, not its output, so its output may be overwritten.
        out = out.add_(residual)
    return out.relu_() if relu else out
