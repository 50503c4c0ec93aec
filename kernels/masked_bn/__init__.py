"""Batch-norm, channel mask, residual addition and ReLU as one operation, and the passes it consists of. README.md derives them."""

from der_fast.kernels.affine import Affine
from der_fast.kernels.masked_bn.norms import Running, Statistics, Sums
from der_fast.kernels.masked_bn.operation import masked_bn
from der_fast.kernels.masked_bn.passes import (
    apply,
    backward_apply,
    backward_coefficients,
    backward_coefficients_all,
    backward_reduce,
    finalize,
    finalize_all,
    statistics,
)

__all__ = [
    "Affine",
    "Running",
    "Statistics",
    "Sums",
    "apply",
    "backward_apply",
    "backward_coefficients",
    "backward_coefficients_all",
    "backward_reduce",
    "finalize",
    "finalize_all",
    "masked_bn",
    "statistics",
]
