"""Checks the arguments of `masked_bn`'s passes; anything else is refused by name before a kernel sees it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from der_fast.kernels import checks
from der_fast.kernels.dtypes import DTYPES

# Keeps every offset inside a tile below 2³¹.
MOST_CHANNELS = 2**20


def check_input(name: str, y: Tensor) -> None:
    """Raise ValueError unless y is (N, C, H, W) of a known dtype with a sensible number of channels."""
    checks.check_rank(f"masked_bn: {name}", y)
    if y.dtype not in DTYPES:
        raise ValueError(f"masked_bn: {name} is {y.dtype}; bfloat16, float16 and float32 are supported (float64 for tests)")
    if y.shape[1] > MOST_CHANNELS:
        raise ValueError(f"masked_bn: {name} has {y.shape[1]} channels; at most {MOST_CHANNELS} are supported")


def check_residual(residual: Tensor, x: Tensor) -> None:
    """Raise ValueError unless the residual agrees with x in shape, dtype and device."""
    checks.check_shape("masked_bn: residual", residual, x.shape)
    checks.check_kind("masked_bn: residual", residual, x.dtype, x.device)


def check_no_broadcast(x: Tensor, residual: Tensor | None, mask: Tensor | None) -> None:
    """Raise ValueError for a residual or mask that PyTorch would silently repeat."""
    if residual is not None:
        checks.check_shape("masked_bn: residual", residual, x.shape)
    if mask is not None:
        checks.check_shape("masked_bn: mask", mask, x.shape[1:2])


def check_activation(name: str, y: Tensor, like: Tensor | None = None) -> None:
    """Raise ValueError unless y is non-empty, channels-last, of a known dtype, and agrees with `like`."""
    check_input(name, y)
    checks.check_image(f"masked_bn: {name}", y, like=like, shape=None if like is None else like.shape)


def check_vectors(vectors: Mapping[str, Tensor | None], channels: int, dtype: torch.dtype, device: torch.device) -> None:
    """Raise ValueError unless each vector that is not None is a contiguous (channels,) of that dtype and device."""
    for name, vector in vectors.items():
        if vector is not None:
            checks.check_vector(f"masked_bn: {name}", vector, (channels,), dtype, device)


def check_partials(partials: Tensor, rows: int) -> None:
    """Raise ValueError unless partials is a non-empty contiguous (P, rows, C)."""
    if partials.ndim != 3 or partials.shape[1] != rows or partials.numel() == 0:
        raise ValueError(f"masked_bn: partials must be a non-empty (P, {rows}, C), not of shape {tuple(partials.shape)}")
    if partials.dtype not in (torch.float32, torch.float64) or not partials.is_contiguous():
        raise ValueError(f"masked_bn: partials must be contiguous and float32, not {partials.dtype} with strides {partials.stride()}")


def check_coefficients(k: Tensor, channels: int, dtype: torch.dtype, device: torch.device) -> None:
    """Raise ValueError unless k is a contiguous (3, channels) of that dtype and device."""
    checks.check_vector("masked_bn: k", k, (3, channels), dtype, device)


def check_bits(bits: Tensor, rows: int, channels: int, device: torch.device) -> None:
    """Raise ValueError unless bits is a contiguous uint8 (rows, ⌈channels/8⌉) on that device."""
    checks.check_vector("masked_bn: the ReLU's bits", bits, (rows, -(-channels // 8)), torch.uint8, device)
