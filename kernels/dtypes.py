"""What operations compute in: the dtypes of activations, and what those are summed in."""

from __future__ import annotations

import torch

# What the fused kernels take; the references take float64, too.
FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = (*FUSED_DTYPES, torch.float64)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return what activations and weights of `dtype` are summed in, which is also the dtype of every vector beside them."""
    return torch.float64 if dtype == torch.float64 else torch.float32
