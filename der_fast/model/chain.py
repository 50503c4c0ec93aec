"""A residual block's training step as a chain of kernels: forward and backward by hand, one autograd node for the whole block.

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
from typing import Literal

import torch
from torch import Tensor

from der_fast.kernels.affine import EPSILON, Affine
from der_fast.kernels.conv import Parts, add_parts, conv_dgrad, conv_forward, conv_wgrad
from der_fast.kernels.conv.strided import convolve, convolve_backward
from der_fast.kernels.masked_bn import (
    Running,
    Statistics,
    Sums,
    apply,
    backward_apply,
    backward_coefficients_all,
    backward_reduce,
    finalize_all,
    statistics,
)
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


def backward(
    block: ChainBlock, weights: Sequence[Weights], kept: Sequence[Kept], bits: Tensor | None, g: Tensor, wants_x: bool
) -> tuple[Tensor | None, list[Gradients]]:
    """Return the gradient of the block's input (None unless `wants_x`) and of every layer's tensors.

    Args:
        block, weights: as in `forward`.
        kept, bits: what that returned.
        g: gradient of the output, channels-last, of its dtype.
        wants_x: whether the gradient of the block's input is wanted; a stem's is not.
    """
    body = len(block.body)
    projected = kept[body] if block.residual == PROJECTION else None
    sums, shortcut_sums, g_z = backward_reduce(
        g,
        kept[body - 1].y,
        kept[body - 1].affine,
        relu_from="recompute" if bits is None else bits,
        shortcut=None if projected is None else (projected.y, projected.affine),
        write_gz=block.residual != NOTHING or not _needs_dy(block.layers[body - 1], wants_x or body > 1),
        backend=block.backend,
    )
    at = _Arriving(g if g_z is None else g_z, g_z is None, sums)
    joined = at
    ending = [(weights[body - 1], kept[body - 1], sums)]
    if projected is not None and shortcut_sums is not None:
        ending.append((weights[-1], projected, shortcut_sums))
    ends = _coefficients(block, ending)
    gradients: list[Gradients] = []
    pending: list[Parts] = []
    for index in reversed(range(body)):
        before = kept[index - 1] if index else None
        writes = index > 0 and not _needs_dy(block.layers[index - 1], wants_x or index > 1)
        own = ends[0] if index == body - 1 else _coefficients(block, [(weights[index], kept[index], at.sums)])[0]
        found, leaving = _layer_backward(block, block.layers[index], weights[index], kept[index], at, own, before, writes, wants_x, pending)
        gradients.insert(0, found)
        if leaving is not None:
            at = leaving
    dx = at.g if wants_x else None
    if projected is not None:
        arriving = _Arriving(joined.g, False, shortcut_sums)
        found, leaving = _layer_backward(block, block.layers[-1], weights[-1], projected, arriving, ends[1], None, False, wants_x, pending)
        gradients.append(found)
        dx = dx.add_(leaving.g) if dx is not None and leaving is not None else dx
    elif dx is not None and block.residual != NOTHING:
        dx = _add_identity(block, dx, joined.g)
    add_parts(pending)
    return dx, gradients


@dataclass(frozen=True)
class _Arriving:
    """The gradient that arrives at a batch-norm.

    Attributes:
        g: as it is stored.
        gated: whether the ReLU after the batch-norm must still be applied, by the sign of z.
        sums: (P, 2, C) partial sums of g_z and g_z·x̂; None if no batch-norm precedes the convolution.
    """

    g: Tensor
    gated: bool
    sums: Tensor | None


def _needs_dy(layer: Layer, wants_x: bool) -> bool:
    """Whether the gradient of the convolution's output must be stored."""
    return layer.wgrad == CUDNN or (wants_x and layer.dgrad == CUDNN)


# k (3, C) with dy = k0·g_z + k1·y + k2, and the gradients of γ, β and the mask.
_Coefficients = tuple[Tensor, Tensor, Tensor, Tensor | None]


def _coefficients(block: ChainBlock, layers: Sequence[tuple[Weights, Kept, Tensor | None]]) -> list[_Coefficients]:
    """What follows from the sums at some layers' batch-norms, in one launch."""
    norms = []
    for weight, kept, sums in layers:
        assert sums is not None
        norms.append(Sums(sums, kept.y.numel() // kept.y.shape[1], kept.affine, weight.gamma, weight.beta, weight.mask))
    return backward_coefficients_all(norms, backend=block.backend)


def _layer_backward(
    block: ChainBlock,
    layer: Layer,
    weight: Weights,
    kept: Kept,
    at: _Arriving,
    coefficients: _Coefficients,
    before: Kept | None,
    writes: bool,
    wants_x: bool,
    pending: list[Parts],
) -> tuple[Gradients, _Arriving | None]:
    """Return the gradients of a layer's tensors, and what arrives at the previous layer; for the first layer, at the block's input.

    Args:
        block, layer, weight, kept: the layer.
        at: what arrives at its batch-norm.
        coefficients: what follows from its sums.
        before: what the previous layer kept; None for the block's first layer.
        writes: whether the previous layer needs its g_z stored.
        wants_x: whether the gradient of the block's input is wanted.
        pending: takes the parts of the weight's gradient.
    """
    k, gamma, beta, mask = coefficients
    wants_source = wants_x or before is not None
    g = at.g
    on_load: tuple[Tensor, Tensor] | None = (k, kept.y)
    if _needs_dy(layer, wants_source):
        relu_from: Literal["none", "recompute"] = "recompute" if at.gated else "none"
        g, on_load = backward_apply(at.g, kept.y, k, relu_from=relu_from, affine=kept.affine, backend=block.backend), None
    conv = _wgrad(block, layer, weight, kept, before, g, on_load, pending)
    leaving = _dgrad(block, layer, weight, kept.source, before, g, on_load, writes) if wants_source else None
    return Gradients(conv, gamma, beta, mask), leaving


def _wgrad(
    block: ChainBlock,
    layer: Layer,
    weight: Weights,
    kept: Kept,
    before: Kept | None,
    g: Tensor,
    g_affine: tuple[Tensor, Tensor] | None,
    pending: list[Parts],
) -> Tensor:
    source, prologue = kept.source, _pair(before.affine) if kept.transformed and before is not None else None
    if layer.wgrad == CHAIN:
        return conv_wgrad(
            source,
            g,
            layer.kernel,
            stride=layer.stride,
            prologue=prologue,
            g_affine=g_affine,
            config=layer.tiles.wgrad,
            pending=pending,
            backend=block.backend,
        )
    if prologue is not None:
        source, _ = apply(source, prologue, relu=True, keep_bits=False, backend=block.backend)
    return convolve_backward(g, source, weight.conv, layer.stride, layer.kernel // 2, (False, True))[1]


def _dgrad(
    block: ChainBlock,
    layer: Layer,
    weight: Weights,
    source: Tensor,
    before: Kept | None,
    g: Tensor,
    g_affine: tuple[Tensor, Tensor] | None,
    writes: bool,
) -> _Arriving:
    if layer.dgrad == CHAIN:
        epilogue = None if before is None else (before.y, before.affine)
        height, width = source.shape[2:]
        dx, sums = conv_dgrad(
            g,
            weight.conv,
            (height, width),
            stride=layer.stride,
            g_affine=g_affine,
            epilogue=epilogue,
            config=layer.tiles.dgrad,
            backend=block.backend,
        )
        return _Arriving(dx, False, sums)
    dx = channels_last(convolve_backward(g, source, weight.conv, layer.stride, layer.kernel // 2, (True, False))[0])
    if before is None:
        return _Arriving(dx, False, None)
    sums, _, g_z = backward_reduce(dx, before.y, before.affine, relu_from="recompute", write_gz=writes, backend=block.backend)
    return _Arriving(dx if g_z is None else g_z, g_z is None, sums)


def _add_identity(block: ChainBlock, dx: Tensor, g_z: Tensor) -> Tensor:
    """Add the gradient that comes through the shortcut, in place: nothing else uses dx."""
    if block.residual == IDENTITY:
        return dx.add_(g_z)
    dx[:, :, :: block.stride, :: block.stride] += g_z[:, : dx.shape[1]]
    return dx
