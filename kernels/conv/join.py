"""What a dgrad needs of the join that made the convolution's input."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from der_fast.kernels.affine import Affine


@dataclass(frozen=True)
class Join:
    """The end of a residual block, x = ReLU(BN(y) + h), where x is the input of the convolutions behind it.

    Attributes:
        y: (N, C, H, W) the input of its last batch-norm, like x.
        affine: that batch-norm.
        bits: (N·H·W, ⌈C/8⌉) uint8, what the ReLU passed, as `masked_bn.apply` returns it; None where h = 0: the sign of y·scale + shift.
        shortcut: (y_h, Affine) where h = BN(y_h); None where h has no batch-norm.
    """

    y: Tensor
    affine: Affine
    bits: Tensor | None = None
    shortcut: tuple[Tensor, Affine] | None = None
