"""Argument checks that every operation shares. Each function raises ValueError; the message begins with the argument's name."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BACKENDS = ("reference", "fused")


def check_backend(op: str, backend: str, backends: Sequence[str] = BACKENDS) -> None:
    """Refuse a backend that the operation does not have."""
    if backend not in backends:
        raise ValueError(f"{op}: unknown backend {backend!r}: choose from {', '.join(backends)}")


def readable(tensor: Tensor) -> bool:
    """Whether a tensor's values can be checked; reading them back from a GPU would stall it."""
    return tensor.device.type == "cpu"


def check_rank(name: str, tensor: Tensor) -> None:
    """Refuse what is not (N, C, H, W)."""
    if tensor.dim() != 4:
        raise ValueError(f"{name} must be (N, C, H, W), not of shape {tuple(tensor.shape)}")


def check_shape(name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    """Refuse another shape."""
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, not {tuple(tensor.shape)}")


def check_kind(name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse another dtype or device."""
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, the other tensors on {device}")
    if tensor.dtype != dtype:
        raise ValueError(f"{name} must be {dtype} to fit the other tensors, not {tensor.dtype}")


def check_image(name: str, tensor: Tensor, *, like: Tensor | None = None, shape: Sequence[int] | None = None) -> None:
    """Refuse what is not a non-empty (N, C, H, W) with channels-last strides, `shape` if given, and the dtype and device of `like`."""
    check_rank(name, tensor)
    if shape is not None:
        check_shape(name, tensor, shape)
    if tensor.numel() == 0:
        raise ValueError(f"{name} is empty: shape {tuple(tensor.shape)}")
    if like is not None:
        check_kind(name, tensor, like.dtype, like.device)
    if not tensor.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(
            f"{name} must have channels-last strides, not {tensor.stride()}: use .contiguous(memory_format=torch.channels_last)"
        )


def check_vector(name: str, tensor: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
    """Refuse another shape, dtype or device, and strides with gaps."""
    check_shape(name, tensor, shape)
    check_kind(name, tensor, dtype, device)
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, not with strides {tensor.stride()}: use .contiguous()")
