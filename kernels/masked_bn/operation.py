"""The whole operation, differentiable."""

from __future__ import annotations

from torch import Tensor

from der_fast.errors import BackendError
from der_fast.kernels.masked_bn import checks
from der_fast.kernels.masked_bn.reference import masked_bn_reference


def masked_bn(
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
    eps: float = 1e-5,
    backend: str = "reference",
) -> Tensor:
    """Return a = [ReLU](m ⊙ (γ·x̂ + β) [+ residual])."""
    checks.check_backend(backend)
    if backend == "reference":
        return masked_bn_reference(
            x,
            weight,
            bias,
            running_mean,
            running_var,
            mask=mask,
            residual=residual,
            relu=relu,
            training=training,
            momentum=momentum,
            eps=eps,
        )
    raise BackendError("masked_bn has no fused form in this version. Use backend 'reference'.")
