"""What the passes over vectors need of one batch-norm, so that several can share a launch."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from der_fast.kernels.affine import Affine


@dataclass(frozen=True)
class Running:
    """Running statistics, (C,) each, of the vectors' dtype; a pass that is given them moves both towards the batch's by `momentum`."""

    mean: Tensor
    variance: Tensor
    momentum: float


@dataclass(frozen=True)
class Statistics:
    """Forward; see `passes.finalize`."""

    partials: Tensor
    weight: Tensor
    bias: Tensor
    mask: Tensor | None
    running: Running | None = None


@dataclass(frozen=True)
class Sums:
    """Backward; see `passes.backward_coefficients`."""

    partials: Tensor
    count: float
    affine: Affine
    weight: Tensor
    bias: Tensor
    mask: Tensor | None
