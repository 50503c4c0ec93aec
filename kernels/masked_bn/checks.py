"""What the passes of `masked_bn` accept; everything else is refused by name before a kernel sees it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# Keeps every offset inside a tile below 2³¹.
MOST_CHANNELS = 2**20


def check_shape(name: str, y: Tensor) -> None:
    """Raise ValueError unless y is (N, C, H, W) of a known dtype with a sensible number of channels."""
    if y.ndim != 4:
        raise ValueError(f"masked_bn: {name} must be (N, C, H, W), not of shape {tuple(y.shape)}")
    if y.dtype not in DTYPES:
        raise ValueError(f"masked_bn: {name} is {y.dtype}; bfloat16, float16 and float32 are supported (float64 for tests)")
    if y.shape[1] > MOST_CHANNELS:
        raise ValueError(f"masked_bn: {name} has {y.shape[1]} channels; at most {MOST_CHANNELS} are supported")


def check_alike(name: str, y: Tensor, like: Tensor) -> None:
    """Raise ValueError unless y and like agree in shape, dtype and device."""
    for what, found, expected in (
        ("shape", tuple(y.shape), tuple(like.shape)),
        ("dtype", y.dtype, like.dtype),
        ("device", y.device, like.device),
    ):
        if found != expected:
            raise ValueError(f"masked_bn: {name} has {what} {found}, the convolution's output has {expected}; they must agree")


def check_no_broadcast(x: Tensor, residual: Tensor | None, mask: Tensor | None) -> None:
    """Raise ValueError for a residual or mask that PyTorch would silently repeat."""
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"masked_bn: residual has shape {tuple(residual.shape)}, x has {tuple(x.shape)}; they must agree")
    if mask is not None and mask.shape != x.shape[1:2]:
        raise ValueError(f"masked_bn: mask has shape {tuple(mask.shape)}; with {x.shape[1]} channels it must be ({x.shape[1]},)")


def check_activation(name: str, y: Tensor, like: Tensor | None = None) -> None:
    """Raise ValueError unless y is non-empty, channels-last, of a known dtype, and agrees with `like`."""
    check_shape(name, y)
    if y.numel() == 0:
        raise ValueError(f"masked_bn: {name} of shape {tuple(y.shape)} is empty: there is nothing to normalise")
    if not y.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(
            f"masked_bn: {name} of shape {tuple(y.shape)} has strides {y.stride()}, not channels_last: "
            "call .contiguous(memory_format=torch.channels_last) first"
        )
    if like is not None:
        check_alike(name, y, like)


def check_vectors(vectors: Mapping[str, Tensor | None], channels: int, dtype: torch.dtype, device: torch.device) -> None:
    """Raise ValueError unless each that is not None is a contiguous (channels,) of that dtype and device."""
    for name, vector in vectors.items():
        if vector is None:
            continue
        if tuple(vector.shape) != (channels,):
            raise ValueError(f"masked_bn: {name} has shape {tuple(vector.shape)}; with {channels} channels it must be ({channels},)")
        _check_kind(name, vector, dtype, device)


def check_partials(partials: Tensor, rows: int) -> None:
    """Raise ValueError unless partials is a non-empty contiguous (P, rows, C)."""
    if partials.ndim != 3 or partials.shape[1] != rows or partials.numel() == 0:
        raise ValueError(f"masked_bn: partials must be a non-empty (P, {rows}, C), not of shape {tuple(partials.shape)}")
    if partials.dtype not in (torch.float32, torch.float64) or not partials.is_contiguous():
        raise ValueError(f"masked_bn: partials must be contiguous and float32, not {partials.dtype} with strides {partials.stride()}")


def check_coefficients(k: Tensor, channels: int, dtype: torch.dtype, device: torch.device) -> None:
    """Raise ValueError unless k is a contiguous (3, channels) of that dtype and device."""
    if tuple(k.shape) != (3, channels):
        raise ValueError(f"masked_bn: k has shape {tuple(k.shape)}; with {channels} channels it must be (3, {channels})")
    _check_kind("k", k, dtype, device)


def check_bits(bits: Tensor, rows: int, channels: int, device: torch.device) -> None:
    """Raise ValueError unless bits is a contiguous uint8 (rows, ⌈channels/8⌉) on that device."""
    expected = (rows, -(-channels // 8))
    if tuple(bits.shape) != expected or bits.dtype != torch.uint8:
        raise ValueError(f"masked_bn: the ReLU's bits must be uint8 of shape {expected}, not {bits.dtype} of shape {tuple(bits.shape)}")
    _check_kind("the ReLU's bits", bits, torch.uint8, device)


def _check_kind(name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    if tensor.dtype != dtype:
        raise ValueError(f"masked_bn: {name} is {tensor.dtype}; it must be {dtype}, whatever the activations' dtype below it")
    if tensor.device != device:
        raise ValueError(f"masked_bn: {name} is on {tensor.device}, the activations on {device}; move it there")
    if not tensor.is_contiguous():
        raise ValueError(f"masked_bn: {name} has strides {tensor.stride()}: call .contiguous() first")
