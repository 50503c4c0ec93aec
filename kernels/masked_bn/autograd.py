"""The fused passes as one autograd function, and as one operator that torch.compile and torch.export can trace."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from der_fast.kernels.affine import Affine, affine_of
from der_fast.kernels.masked_bn import passes
from der_fast.kernels.masked_bn.norms import Running

BACKEND = "fused"


def channels_last(x: Tensor) -> Tensor:
    """Return x in channels-last strides, copied where it is not."""
    return x.contiguous(memory_format=torch.channels_last)


class FusedMaskedBN(torch.autograd.Function):
    """a = [ReLU](m ⊙ BN(x) [+ h]). Saved: x, four vectors, and 1 bit per element where a residual goes through the ReLU."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mask: Tensor | None,
        residual: Tensor | None,
        running: Running,
        training: bool,
        relu: bool,
        eps: float,
    ) -> Tensor:
        """Return a; in training mode the running statistics move."""
        x = channels_last(x)
        if training:
            partials = passes.statistics(x, backend=BACKEND)
            affine, _, _ = passes.finalize(partials, weight, bias, mask, eps, running=running, backend=BACKEND)
        else:
            affine = affine_of(running.mean, running.variance, weight, bias, mask, eps)
        added = None if residual is None else channels_last(residual)
        join = relu and residual is not None
        out, bits = passes.apply(x, (affine.scale, affine.shift), residual=added, relu=relu, keep_bits=join, backend=BACKEND)
        ctx.save_for_backward(x, weight, bias, mask, affine.mean, affine.rstd, affine.scale, affine.shift, bits)
        ctx.relu_from = "recompute" if relu else "none"
        ctx.count = x.numel() // x.shape[1] if training else math.inf
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """Return the requested gradients of x, γ, β, m and h."""
        x, weight, bias, mask, *vectors, bits = ctx.saved_tensors
        affine = Affine(*vectors)
        for_x, for_weight, for_bias, for_mask, for_residual = ctx.needs_input_grad[:5]
        relu_from = ctx.relu_from if bits is None else bits
        g = channels_last(g)
        partials, _, g_z = passes.backward_reduce(
            g, x, affine, relu_from=relu_from, write_gz=for_residual and bits is not None, backend=BACKEND
        )
        k, d_weight, d_bias, d_mask = passes.backward_coefficients(partials, ctx.count, affine, weight, bias, mask, backend=BACKEND)
        if g_z is not None:
            # Reading g_z is cheaper than reading g and the bits again.
            g, relu_from = g_z, "none"
        dx = passes.backward_apply(g, x, k, relu_from=relu_from, affine=affine, backend=BACKEND) if for_x else None
        d_residual = g if for_residual else None
        of_vectors = (d if wanted else None for d, wanted in ((d_weight, for_weight), (d_bias, for_bias), (d_mask, for_mask)))
        return dx, *of_vectors, d_residual, None, None, None, None


_SCHEMA = "(Tensor x, Tensor scale, Tensor shift, Tensor? residual, bool relu) -> Tensor"


@torch.library.custom_op("der_fast::masked_bn_apply", mutates_args=(), schema=_SCHEMA)
def _apply_operator(x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    return passes.apply(x, (scale, shift), residual=residual, relu=relu, keep_bits=False, backend=BACKEND)[0]


@_apply_operator.register_fake
def _(x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


def affine_only(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    eps: float,
) -> Tensor:
    """Return a in evaluation mode, without a gradient."""
    affine = affine_of(mean, var, weight, bias, mask, eps)
    x, residual = channels_last(x), None if residual is None else channels_last(residual)
    if torch.compiler.is_compiling():
        out: Tensor = _apply_operator(x, affine.scale, affine.shift, residual, relu)
        return out
    return passes.apply(x, (affine.scale, affine.shift), residual=residual, relu=relu, keep_bits=False, backend=BACKEND)[0]
