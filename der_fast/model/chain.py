"""A residual block's training step as a chain of kernels: forward here, backward in chain_backward.py, one autograd node for both.

    y_l = conv_l(a_{l−1}),  z_l = m ⊙ BN(y_l),  a_l = ReLU(z_l);  out = ReLU(z_last + shortcut)

Kept for the backward pass: the block's input, every y, its batch statistics, and one bit per element of the output's ReLU. Where
a layer runs as 'chain' (see `paths`), its input activation a_{l−1} is not stored: it is made from y_{l−1} on load, forward and backward. A
projection's batch-norm output is never stored either: it is computed as part of the join. With the sums S1 = Σ g_z, S2 = Σ g_z·x̂
of each batch-norm, dγ = m·S2, dβ = m·S1, dm = γ·S2 + β·S1 and dy = k0·g_z + k1·y + k2 (eq. 10 and eq. 11).

Activations: (N, C, H, W) in channels-last strides, one dtype throughout. γ, β, masks and statistics are float32 (float64 for float64).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from der_fast.kernels.affine import EPSILON, Affine
from der_fast.kernels.conv import conv_forward
from der_fast.kernels.conv.strided import convolve
from der_fast.kernels.masked_bn import Running, Statistics, apply, finalize_all, statistics
from der_fast.kernels.masked_bn.autograd import channels_last
from der_fast.model.paths import CHAIN, CUDNN, Layer

# What the block adds before its last ReLU.
NOTHING, IDENTITY, WIDENED, PROJECTION = "nothing", "identity", "widened identity", "projection"


@dataclass(frozen=True)
class ChainBlock:
    """What does not change from step to step.

    Attributes:
        layers: in order; with a projection, that one last.
        residual: 'nothing' (a stem), 'identity', 'widened identity' (every stride-th pixel, zero channels appended) or 'projection'.
        stride: of the whole block.
        backend: of the kernels: 'reference' or 'fused'.
    """

    layers: tuple[Layer, ...]
    residual: str
    stride: int
    backend: str

    @property
    def body(self) -> tuple[Layer, ...]:
        """The layers without the projection."""
        return self.layers[:-1] if self.residual == PROJECTION else self.layers


@dataclass(frozen=True)
class Weights:
    """One layer's tensors: `conv` (K, C, R, R) in the activations' dtype, γ, β and the mask (None: none), (K,) each."""

    conv: Tensor
    gamma: Tensor
    beta: Tensor
    mask: Tensor | None


@dataclass(frozen=True)
class Kept:
    """What a layer's forward pass keeps for its backward pass.

    Attributes:
        y: the convolution's output.
        affine: batch-norm and mask as one affine map.
        source: the convolution's input as stored: an activation, or the previous layer's y if that is transformed on load.
        transformed: whether it is.
    """

    y: Tensor
    affine: Affine
    source: Tensor
    transformed: bool


@dataclass(frozen=True)
class Gradients:
    """Of one layer's tensors; the mask's is None without a mask."""

    conv: Tensor
    gamma: Tensor
    beta: Tensor
    mask: Tensor | None


def forward(
    block: ChainBlock, x: Tensor, weights: Sequence[Weights], running: Sequence[Running] = ()
) -> tuple[Tensor, Tensor | None, list[Kept]]:
    """Return the block's output, the bits of its ReLU (None for a stem, which recomputes them), and what each layer keeps.

    Args:
        block: what it consists of.
        x: its input, channels-last.
        weights: of every layer.
        running: every layer's running statistics, which move. Without them nothing changes, so that it can be timed.

    Raises:
        ValueError: only one value per channel, which has no variance.
    """
    kept: list[Kept] = []
    moving: Sequence[Running | None] = running or [None] * len(weights)
    for index, (layer, weight) in enumerate(zip(block.body, weights, strict=False)):
        source, affine = (kept[-1].y, _pair(kept[-1].affine)) if kept else (x, None)
        if affine is not None and layer.forward != CHAIN:
            source, affine = apply(source, affine, relu=True, keep_bits=False, backend=block.backend)[0], None
        convolved = [_convolved(block, layer, weight, source, affine)]
        if index == len(block.body) - 1 and block.residual == PROJECTION:
            convolved.append(_convolved(block, block.layers[-1], weights[-1], x, None))
        kept += _normalised(block, convolved, weights[index:], moving[index:])
    last = kept[len(block.body) - 1]
    residual, residual_affine = _identity(block, x, last.y), None
    if block.residual == PROJECTION:
        residual, residual_affine = kept[-1].y, _pair(kept[-1].affine)
    out, bits = apply(
        last.y,
        _pair(last.affine),
        residual=residual,
        residual_affine=residual_affine,
        relu=True,
        keep_bits=block.residual != NOTHING,
        backend=block.backend,
    )
    return out, bits, kept


def _pair(affine: Affine) -> tuple[Tensor, Tensor]:
    return affine.scale, affine.shift


@dataclass(frozen=True)
class _Convolved:
    """A layer before its batch-norm; see `Kept`. `partials` (P, 3, C) are the statistics of y."""

    y: Tensor
    partials: Tensor
    source: Tensor
    transformed: bool


def _convolved(block: ChainBlock, layer: Layer, weight: Weights, source: Tensor, prologue: tuple[Tensor, Tensor] | None) -> _Convolved:
    if layer.forward == CUDNN:
        y = channels_last(convolve(source, weight.conv, layer.stride, layer.kernel // 2))
        _check_count(y)
        partials: Tensor | None = statistics(y, backend=block.backend)
    else:
        y, partials = conv_forward(
            source,
            weight.conv,
            stride=layer.stride,
            prologue=prologue,
            statistics=True,
            config=layer.tiles.forward if prologue is None else layer.tiles.transformed,
            backend=block.backend,
        )
        _check_count(y)
    assert partials is not None
    return _Convolved(y, partials, source, prologue is not None)


def _normalised(
    block: ChainBlock, convolved: Sequence[_Convolved], weights: Sequence[Weights], running: Sequence[Running | None]
) -> list[Kept]:
    """What the layers keep, with all their batch-norms in one launch."""
    given = zip(convolved, weights, running, strict=False)
    norms = [Statistics(one.partials, weight.gamma, weight.beta, weight.mask, moving) for one, weight, moving in given]
    found = finalize_all(norms, EPSILON, backend=block.backend)
    return [Kept(one.y, affine, one.source, one.transformed) for one, (affine, _, _) in zip(convolved, found, strict=True)]


def _check_count(y: Tensor) -> None:
    if y.numel() == y.shape[1]:
        raise ValueError(
            f"expected more than 1 value per channel when training, but the convolution's output has the shape {tuple(y.shape)}"
        )


def _identity(block: ChainBlock, x: Tensor, like: Tensor) -> Tensor | None:
    """The shortcut without a projection."""
    if block.residual == IDENTITY:
        return x
    if block.residual != WIDENED:
        return None
    wide = torch.zeros_like(like)
    wide[:, : x.shape[1]] = x[:, :, :: block.stride, :: block.stride]
    return wide
