"""The whole operation, differentiable: the reference, or one autograd function on the fused passes."""

from __future__ import annotations

import torch
from torch import Tensor

from der_fast.errors import BackendError
from der_fast.kernels import triton_runtime
from der_fast.kernels.affine import EPSILON
from der_fast.kernels.checks import check_backend
from der_fast.kernels.dtypes import accumulator
from der_fast.kernels.masked_bn import checks
from der_fast.kernels.masked_bn.autograd import FusedMaskedBN, affine_only
from der_fast.kernels.masked_bn.norms import Running
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
    eps: float = EPSILON,
    backend: str = "reference",
) -> Tensor:
    """Return a = [ReLU](m ⊙ (γ·x̂ + β) [+ residual]), x̂ = (x − μ)/√(σ² + ε); DER §3.3 with the mask on batch-norm's output.

    In training mode the running statistics are updated in place. All other floating-point arguments are differentiable, once.

    Args:
        x: (N, C, H, W) the convolution's output. Backend 'fused' takes bfloat16, float16 or float32 and works with channels-last strides;
            it copies tensors with other strides.
        weight, bias: (C,) γ and β.
        running_mean, running_var: (C,) used in evaluation mode, moved by `momentum` towards the batch statistics in training mode.
        mask: (C,) in [0, 1], or None for no mask. An entry that is not finite makes its channel NaN, with ReLU too, and no other channel.
        residual: (N, C, H, W) of x's dtype, added after the mask, or None.
        relu: apply ReLU last.
        training: normalise with the batch's statistics (biased variance) instead of the running ones.
        backend: 'reference' or 'fused'. 'fused' computes with float32 vectors whatever x is, and gives the same bits on every call.

    torch.compile traces 'reference'. It and torch.export trace 'fused' in evaluation mode without gradients, as the operator
    `der_fast::masked_bn_apply`; with gradients or in training mode torch.compile runs 'fused' untraced, between two graphs.

    Raises:
        ValueError: an argument does not fit, or one element per channel in training mode.
        BackendError: backend 'fused' cannot run on x's device.
    """
    check_backend("masked_bn", backend)
    if backend == "reference":
        checks.check_no_broadcast(x, residual, mask)
        tensors = (x, weight, bias, running_mean, running_var)
        return masked_bn_reference(*tensors, mask=mask, residual=residual, relu=relu, training=training, momentum=momentum, eps=eps)
    if not torch.compiler.is_compiling():
        triton_runtime.require(x.device, "masked_bn")
    vectors = {"weight": weight, "bias": bias, "mask": mask, "running_mean": running_mean, "running_var": running_var}
    _check(x, residual, vectors, training)
    if x.numel() == 0:
        return x
    learning = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias, mask, residual))
    if not training and not learning:
        return affine_only(x, running_mean, running_var, weight, bias, mask, residual, relu, eps)
    # Not a decorator: that would import torch's compiler, and Triton with it, whenever this package is imported.
    run = torch.compiler.disable(_differentiable) if torch.compiler.is_compiling() else _differentiable  # type: ignore[no-untyped-call]
    return run(x, weight, bias, mask, residual, running_mean, running_var, relu, training, momentum, eps)


def _check(x: Tensor, residual: Tensor | None, vectors: dict[str, Tensor | None], training: bool) -> None:
    checks.check_input("x", x)
    if residual is not None:
        checks.check_residual(residual, x)
    checks.check_vectors(vectors, x.shape[1], accumulator(x.dtype), x.device)
    if training and x.shape[1] > 0 and x.numel() <= x.shape[1]:
        raise ValueError(
            f"masked_bn: x of shape {tuple(x.shape)} has {x.numel() // x.shape[1]} element(s) per channel; training needs 2 or more"
        )


def _differentiable(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    relu: bool,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    # Here, where torch.compile does not trace: under PyTorch 2.11's compiler this condition is always true.
    if torch.compiler.is_exporting():
        raise BackendError(
            "masked_bn with backend 'fused' is traced in evaluation mode without gradients only; call .eval() under torch.no_grad()"
        )
    running = Running(running_mean, running_var, momentum)
    out: Tensor = FusedMaskedBN.apply(x, weight, bias, mask, residual, running, training, relu, eps)  # type: ignore[no-untyped-call]
    return out
