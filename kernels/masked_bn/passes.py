"""The passes of `masked_bn`, for callers that fuse some of them into their convolutions; each checks its arguments and picks a backend.

Activations are (N, C, H, W) in channels-last strides, in bfloat16, float16 or float32; vectors are (C,) float32. `M` = N·H·W.
Every function raises ValueError for arguments that do not fit, and BackendError where backend 'fused' cannot run.
The ReLU passes z unless z ≤ 0, so that NaN stays NaN. `launch` overrides how a Triton kernel is cut into programs (see launch.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from der_fast.kernels import triton_runtime
from der_fast.kernels.affine import VECTORS, Affine
from der_fast.kernels.checks import check_backend
from der_fast.kernels.dtypes import accumulator
from der_fast.kernels.masked_bn import checks
from der_fast.kernels.masked_bn import reference_passes as reference
from der_fast.kernels.masked_bn.launch import Launch
from der_fast.kernels.masked_bn.norms import Running, Statistics, Sums
from der_fast.kernels.masked_bn.reference_passes import ReluFrom


def _fused(backend: str, device: torch.device) -> bool:
    check_backend("masked_bn", backend)
    if backend == "fused":
        triton_runtime.require(device, "masked_bn")
    return backend == "fused"


def _check_vectors(y: Tensor, **vectors: Tensor | None) -> None:
    checks.check_vectors(vectors, y.shape[1], accumulator(y.dtype), y.device)


def _check_affine(name: str, y: Tensor, affine: Affine) -> None:
    _check_vectors(y, **{f"{name}.{part}": getattr(affine, part) for part in VECTORS})


def statistics(y: Tensor, *, launch: Launch | None = None, backend: str) -> Tensor:
    """Return the batch statistics of y as partial results, (P, 3, C): count, mean and Σ(y − mean)² of each block of rows.

    The implementation chooses P and the rows of a block, the same on every call with the same shape. Reads y once.
    """
    checks.check_activation("y", y)
    if _fused(backend, y.device):
        from der_fast.kernels.masked_bn import triton_forward

        return triton_forward.statistics(y, launch)
    return reference.statistics_reference(y)


def finalize(
    partials: Tensor,
    weight: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    eps: float,
    *,
    running: Running | None = None,
    backend: str,
) -> tuple[Affine, Tensor, Tensor]:
    """Merge partial statistics (Chan, Golub and LeVeque, 1979) and fold batch-norm and mask into an Affine.

    Args:
        partials: (P, 3, C) from `statistics` or a convolution's epilogue; entries with count 0 are ignored.
        weight, bias, mask: (C,) γ, β and m (None: no mask).
        eps: added to the biased variance.
        running: moved towards the mean and the unbiased variance in place; None changes nothing.

    Returns:
        the Affine, the batch mean (C,) and the unbiased batch variance (C,).
    """
    return finalize_all([Statistics(partials, weight, bias, mask, running)], eps, backend=backend)[0]


def finalize_all(norms: Sequence[Statistics], eps: float, *, backend: str) -> list[tuple[Affine, Tensor, Tensor]]:
    """Return what `finalize` returns for every batch-norm; two share a launch, such as those at a block's join."""
    for norm in norms:
        partials = norm.partials
        checks.check_partials(partials, 3)
        vectors = {"weight": norm.weight, "bias": norm.bias, "mask": norm.mask}
        if norm.running is not None:
            vectors |= {"running mean": norm.running.mean, "running variance": norm.running.variance}
        checks.check_vectors(vectors, partials.shape[2], partials.dtype, partials.device)
    if _fused(backend, norms[0].partials.device):
        from der_fast.kernels.masked_bn import triton_vectors

        return triton_vectors.finalize(norms, eps)
    return [reference.finalize_reference(norm, eps) for norm in norms]


def apply(
    y: Tensor,
    affine: tuple[Tensor, Tensor],
    *,
    residual: Tensor | None = None,
    residual_affine: tuple[Tensor, Tensor] | None = None,
    relu: bool,
    keep_bits: bool,
    launch: Launch | None = None,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """Return a = [ReLU](y·scale + shift [+ residual]) and, with `keep_bits`, a bit for each element that the ReLU passed.

    Args:
        y: (N, C, H, W) the convolution's output.
        affine: (scale, shift), (C,) each.
        residual: added before the ReLU; y's shape and dtype.
        residual_affine: (scale, shift) with which the residual is transformed first: a shortcut's batch-norm that is never stored.
        relu: apply ReLU last.
        keep_bits: return 1 bit per element for the backward pass, (M, ⌈C/8⌉) uint8: bit j of byte b of a row is channel 8b + j.
    """
    checks.check_activation("y", y)
    _check_vectors(y, scale=affine[0], shift=affine[1])
    if residual is not None:
        checks.check_activation("residual", residual, y)
    if residual_affine is not None:
        if residual is None:
            raise ValueError("masked_bn: residual_affine was given without a residual to apply it to")
        _check_vectors(y, **{"residual scale": residual_affine[0], "residual shift": residual_affine[1]})
    if _fused(backend, y.device):
        from der_fast.kernels.masked_bn import triton_forward

        return triton_forward.apply(y, affine, residual, residual_affine, relu, keep_bits, launch)
    return reference.apply_reference(y, affine, residual, residual_affine, relu, keep_bits)


def _check_gradient(g: Tensor, y: Tensor, affine: Affine, relu_from: ReluFrom) -> None:
    checks.check_activation("y", y)
    checks.check_activation("g", g, y)
    _check_affine("affine", y, affine)
    if isinstance(relu_from, Tensor):
        checks.check_bits(relu_from, y.numel() // y.shape[1], y.shape[1], y.device)
    elif relu_from not in ("none", "recompute"):
        raise ValueError(f"masked_bn: relu_from is {relu_from!r}; pass 'none', 'recompute' or the bits that apply() returned")


def backward_reduce(
    g: Tensor,
    y: Tensor,
    affine: Affine,
    *,
    relu_from: ReluFrom,
    shortcut: tuple[Tensor, Affine] | None = None,
    write_gz: bool = False,
    launch: Launch | None = None,
    backend: str,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the partial sums of S1 = Σ g_z and S2 = Σ g_z·x̂ with g_z = g·1[the ReLU passed], and g_z itself if asked.

    Args:
        g: (N, C, H, W) the gradient that arrives at a; y's shape and dtype.
        y: (N, C, H, W) the input of `apply`.
        affine: what `finalize` returned.
        relu_from: 'none': there was no ReLU (g_z = g); 'recompute': from the sign of y·scale + shift, which is right where nothing was
            added; or the bits from `apply`.
        shortcut: (y_s, Affine) of the residual's own batch-norm, whose sums are computed in the same pass.
        write_gz: also return g_z, the gradient of the residual, with g's shape and dtype.

    Returns:
        (P, 2, C) partial sums; the same for the shortcut, or None; g_z, or None.
    """
    _check_gradient(g, y, affine, relu_from)
    if shortcut is not None:
        checks.check_activation("the shortcut's y", shortcut[0], y)
        _check_affine("the shortcut's affine", y, shortcut[1])
    if _fused(backend, y.device):
        from der_fast.kernels.masked_bn import triton_backward

        return triton_backward.backward_reduce(g, y, affine, relu_from, shortcut, write_gz, launch)
    return reference.backward_reduce_reference(g, y, affine, relu_from, shortcut, write_gz)


def backward_coefficients(
    partials: Tensor, count: float, affine: Affine, weight: Tensor, bias: Tensor, mask: Tensor | None, *, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return k (3, C) for dy = k0·g_z + k1·y + k2, and the gradients of γ, β and m (None without a mask), (C,) each.

    Args:
        partials: (P, 2, C) from `backward_reduce` or a convolution's epilogue.
        count: M, the elements per channel; math.inf for running statistics, which do not depend on the batch.
        affine, weight, bias, mask: as in `finalize`.
    """
    return backward_coefficients_all([Sums(partials, count, affine, weight, bias, mask)], backend=backend)[0]


def backward_coefficients_all(norms: Sequence[Sums], *, backend: str) -> list[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """Return what `backward_coefficients` returns for every batch-norm; two share a launch, such as those at a block's join."""
    for norm in norms:
        partials, affine = norm.partials, norm.affine
        checks.check_partials(partials, 2)
        vectors = {"weight": norm.weight, "bias": norm.bias, "mask": norm.mask}
        vectors |= {"affine.mean": affine.mean, "affine.rstd": affine.rstd, "affine.scale": affine.scale}
        checks.check_vectors(vectors, partials.shape[2], partials.dtype, partials.device)
        if not norm.count > 0:
            raise ValueError(f"masked_bn: count is {norm.count}; it is the number of elements per channel, N·H·W, or math.inf")
    if _fused(backend, norms[0].partials.device):
        from der_fast.kernels.masked_bn import triton_vectors

        return triton_vectors.backward_coefficients(norms)
    return [reference.backward_coefficients_reference(norm) for norm in norms]


def backward_apply(
    g: Tensor, y: Tensor, k: Tensor, *, relu_from: ReluFrom, affine: Affine, launch: Launch | None = None, backend: str
) -> Tensor:
    """Return dy = k0·g_z + k1·y + k2 with y's shape and dtype; arguments as in `backward_reduce` and from `backward_coefficients`.

    If `backward_reduce` wrote g_z, pass that as g with relu_from='none'.
    """
    _check_gradient(g, y, affine, relu_from)
    checks.check_coefficients(k, y.shape[1], accumulator(y.dtype), y.device)
    if _fused(backend, y.device):
        from der_fast.kernels.masked_bn import triton_backward

        return triton_backward.backward_apply(g, y, k, relu_from, affine, launch)
    return reference.backward_apply_reference(g, y, k, relu_from, affine)
