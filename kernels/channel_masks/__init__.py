"""Every channel mask of a network at once: sigmoid, group sums, sparsity loss and the compensated gradient.

`masks_and_sparsity` does it all in one launch each way; `channel_masks` and `sparsity_loss` are its two parts in plain PyTorch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from der_fast.errors import BackendError
from der_fast.kernels import checks, triton_runtime
from der_fast.kernels.channel_masks.reference import channel_masks_reference as channel_masks
from der_fast.kernels.channel_masks.reference import masks_and_sparsity_reference
from der_fast.kernels.channel_masks.reference import sparsity_loss_reference as sparsity_loss
from der_fast.kernels.channel_masks.structure import ConvolutionGroups, MaskStructure

__all__ = ["BACKENDS", "ConvolutionGroups", "MaskStructure", "channel_masks", "masks_and_sparsity", "sparsity_loss"]

BACKENDS = (*checks.BACKENDS, "native")


def masks_and_sparsity(
    logits: Tensor, scale: Tensor | float, structure: MaskStructure, *, backend: str = "reference"
) -> tuple[Tensor, Tensor]:
    """Return the masks m = σ(s·e) and the sparsity loss L_S, with the compensated gradient (Yan et al. 2021; eq. 5, eq. 7 and eq. 8).

    Args:
        logits: e, (C,), float32 or float64, contiguous.
        scale: s > 0, a number or a tensor of one element. A tensor is read when the masks are made, so a captured CUDA graph replays
            with its current value.
        structure: the network's groups and convolutions, with their tables on the logits' device.
        backend: 'reference' (plain PyTorch), 'fused' (Triton) or 'native' (CUDA C++ on a CUDA device, C++ on the CPU).

    Returns:
        masks (C,) and L_S (), both of the logits' dtype. Values below 2⁻²⁴ are exact zeros. A NaN logit gives a NaN
        mask and a NaN loss. The gradients of both reach `logits` in one launch; autograd may sum them as usual.

    Raises:
        ValueError: a wrong shape, dtype, device or layout, or an unknown backend.
        BackendError: the backend does not work here.
    """
    _check(logits, scale, structure, backend)
    if isinstance(scale, Tensor):
        scale = scale.detach().reshape(())
    if backend == "reference":
        return masks_and_sparsity_reference(logits, scale, structure)
    if backend == "fused":
        triton_runtime.require(logits.device, "channel_masks")
    elif logits.device.type not in ("cpu", "cuda"):
        raise BackendError(f"channel_masks runs natively on the CPU and on CUDA devices, not on {logits.device}. Use backend 'reference'.")
    from der_fast.kernels.channel_masks.autograd import masks_and_sparsity_on

    if not isinstance(scale, Tensor):
        scale = torch.full((), float(scale), dtype=logits.dtype, device=logits.device)
    return masks_and_sparsity_on(logits, scale.to(logits.dtype), structure, backend)


def _check(logits: Tensor, scale: Tensor | float, structure: MaskStructure, backend: str) -> None:
    checks.check_backend("channel_masks", backend, BACKENDS)
    if logits.dtype not in (torch.float32, torch.float64) or logits.shape != (structure.channels,) or not logits.is_contiguous():
        raise ValueError(
            f"logits must be float32 or float64, contiguous, one per channel of the structure ({structure.channels}); "
            f"got {logits.dtype}, {tuple(logits.shape)}, strides {logits.stride()}"
        )
    if structure.device != logits.device:
        raise ValueError(f"the structure's tables are on {structure.device}, the logits on {logits.device}; use structure.to(…)")
    if isinstance(scale, Tensor) and (scale.numel() != 1 or not scale.is_floating_point() or scale.device != logits.device):
        raise ValueError(
            f"scale must be a number or a floating-point tensor of one element on {logits.device}; "
            f"got {scale.dtype}, {tuple(scale.shape)} on {scale.device}"
        )
