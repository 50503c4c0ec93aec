"""The dtypes that operations accept for activations, and those they sum in."""

from __future__ import annotations

import torch

# What the fused kernels accept; the references also accept float64.
FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = (*FUSED_DTYPES, torch.float64)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which activations and weights of `dtype` are summed, which is also the dtype of every vector."""
    return torch.float64 if dtype == torch.float64 else torch.float32
