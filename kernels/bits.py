"""One bit per element of an activation: which values a ReLU passes, packed along channels."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_bits(positive: Tensor) -> Tensor:
    """Return (M, C) booleans as (M, ⌈C/8⌉) uint8: bit j of byte b is channel 8b + j, and bits beyond C are 0."""
    rows, channels = positive.shape
    padded = torch.nn.functional.pad(positive.to(torch.uint8), (0, -channels % 8)).reshape(rows, -1, 8)
    return (padded << torch.arange(8, dtype=torch.uint8, device=positive.device)).sum(2, dtype=torch.uint8)


def unpack_bits(bits: Tensor, channels: int) -> Tensor:
    """Return (M, ⌈C/8⌉) uint8 as (M, C) booleans."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits[:, :, None] >> shifts) & 1).flatten(1)[:, :channels].bool()
