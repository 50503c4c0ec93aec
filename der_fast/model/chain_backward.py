"""The backward pass of a residual block, and the way into the block before it.

A block's backward pass begins where its output was made: the gradient goes through the ReLU, g_z = g·1[the ReLU passed], and is summed for
the batch-norms that join there (`arrive`). For a block behind another one that is also how the pass ends: where a block's first layer
`joins`, its dgrad adds the shortcut's gradient, applies the other block's ReLU and takes those sums while it stores. Then no pass is left
between the two blocks. What is handed on is g_z, not the gradient before the ReLU. Since (g·1)·1 = g·1 and (g + h)·1 = g·1 + h·1, the ReLU
may be applied again, also after another gradient was added.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from der_fast.kernels.conv import Join, Parts, add_parts, conv_dgrad, conv_dgrad_joined, conv_wgrad
from der_fast.kernels.conv.strided import convolve_backward
from der_fast.kernels.masked_bn import Sums, apply, backward_apply, backward_coefficients_all, backward_reduce
from der_fast.kernels.masked_bn.autograd import channels_last
from der_fast.model.chain import IDENTITY, NOTHING, PROJECTION, WIDENED, ChainBlock, Gradients, Kept, Weights
from der_fast.model.paths import CHAIN, CUDNN, Layer


@dataclass(frozen=True)
class Arriving:
    """The gradient that arrives at a batch-norm.

    Attributes:
        g: as it is stored.
        gated: whether the ReLU after the batch-norm must still be applied, by the sign of z.
        sums: (P, 2, C) partial sums of g_z and g_z·x̂; None if no batch-norm precedes the convolution.
        shortcut_sums: the same with the shortcut's batch-norm, where two of them join.
    """

    g: Tensor
    gated: bool
    sums: Tensor | None
    shortcut_sums: Tensor | None = None


@dataclass(frozen=True)
class _Onto:
    """What a dgrad leads to.

    Attributes:
        join: where the convolution's input was made; None if that is not the chain's work.
        writes: whether g_z must be stored where a pass of its own goes through the join.
        added: the gradient that reaches the input through the shortcut, to be added first.
    """

    join: Join | None
    writes: bool = True
    added: Tensor | None = None


# k (3, C) with dy = k0·g_z + k1·y + k2, and the gradients of γ, β and the mask.
_Coefficients = tuple[Tensor, Tensor, Tensor, Tensor | None]


def end_of(block: ChainBlock, kept: Sequence[Kept], bits: Tensor | None) -> Join:
    """Return the block's end, as its own backward pass and that of the block behind it need it; arguments from `chain.forward`."""
    last = kept[len(block.body) - 1]
    shortcut = (kept[-1].y, kept[-1].affine) if block.residual == PROJECTION else None
    return Join(last.y, last.affine, bits, shortcut)


def joins(block: ChainBlock) -> bool:
    """Whether the block's backward pass goes through the end of the block before it while it stores the gradient of its input."""
    return block.layers[0].joins and block.residual in (IDENTITY, PROJECTION)


def arrive(join: Join, g: Tensor, writes: bool, backend: str) -> Arriving:
    """Go through a block's end in a pass of its own.

    Args:
        join: the end.
        g: gradient of the output, channels-last, of its dtype.
        writes: whether g_z must be stored; if not, and if `join` has no bits, later passes apply the ReLU again.
        backend: 'reference' or 'fused'.
    """
    sums, shortcut_sums, g_z = backward_reduce(
        g,
        join.y,
        join.affine,
        relu_from="recompute" if join.bits is None else join.bits,
        shortcut=join.shortcut,
        write_gz=writes,
        backend=backend,
    )
    return Arriving(g if g_z is None else g_z, g_z is None, sums, shortcut_sums)


def backward(
    block: ChainBlock,
    weights: Sequence[Weights],
    kept: Sequence[Kept],
    g: Arriving | tuple[Tensor, Tensor | None],
    wants_x: bool,
    before: Join | None = None,
) -> tuple[Arriving | None, list[Gradients]]:
    """Return the gradient of the block's input (None unless `wants_x`) and those of every layer's tensors.

    Args:
        block, weights: as in `chain.forward`.
        kept: what that returned.
        g: the gradient of the output, channels-last and of its dtype, with the bits that `chain.forward` returned; or what the backward
            pass of the block behind returned.
        wants_x: whether the gradient of the block's input is wanted; a stem's is not.
        before: the end of the block that made this block's input; then the gradient has gone through it. None: it is the input's.
    """
    body = len(block.body)
    if not isinstance(g, Arriving):
        writes = block.residual != NOTHING or not _needs_dy(block.layers[body - 1], wants_x or body > 1)
        g = arrive(end_of(block, kept, g[1]), g[0], writes, block.backend)
    at = joined = g
    ending = [(weights[body - 1], kept[body - 1], at.sums)]
    if block.residual == PROJECTION:
        ending.append((weights[-1], kept[-1], at.shortcut_sums))
    ends = _coefficients(block, ending)
    gradients: list[Gradients] = []
    pending: list[Parts] = []
    for index in reversed(range(1, body)):
        own = ends[0] if index == body - 1 else _coefficients(block, [(weights[index], kept[index], at.sums)])[0]
        previous = kept[index - 1]
        inner = _Onto(Join(previous.y, previous.affine), not _needs_dy(block.layers[index - 1], wants_x or index > 1))
        found, leaving = _layer_backward(block, block.layers[index], weights[index], kept[index], at, own, previous, inner, pending)
        gradients.insert(0, found)
        assert leaving is not None
        at = leaving
    own = ends[0] if body == 1 else _coefficients(block, [(weights[0], kept[0], at.sums)])[0]
    added = joined.g if block.residual == IDENTITY else None
    if block.residual == PROJECTION:
        # Before the first layer, which adds it while it stores its own.
        arriving, outer = Arriving(joined.g, False, None), _Onto(None) if wants_x else None
        found, leaving = _layer_backward(block, block.layers[-1], weights[-1], kept[-1], arriving, ends[1], None, outer, pending)
        gradients.append(found)
        added = None if leaving is None else leaving.g
    onto = _Onto(None if block.residual == WIDENED else before, added=added) if wants_x else None
    found, leaving = _layer_backward(block, block.layers[0], weights[0], kept[0], at, own, None, onto, pending)
    gradients.insert(0, found)
    if leaving is not None and block.residual == WIDENED:
        leaving = _with_widened(block, leaving, joined.g, before)
    add_parts(pending)
    return leaving, gradients


def _with_widened(block: ChainBlock, leaving: Arriving, g_z: Tensor, before: Join | None) -> Arriving:
    """Add the gradient that comes through a widened shortcut, in place: nothing else uses what leaves the first layer."""
    leaving.g[:, :, :: block.stride, :: block.stride] += g_z[:, : leaving.g.shape[1]]
    return leaving if before is None else arrive(before, leaving.g, True, block.backend)


def _needs_dy(layer: Layer, wants_x: bool) -> bool:
    """Whether the gradient of the convolution's output must be stored."""
    return layer.wgrad == CUDNN or (wants_x and layer.dgrad == CUDNN)


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
    at: Arriving,
    coefficients: _Coefficients,
    before: Kept | None,
    onto: _Onto | None,
    pending: list[Parts],
) -> tuple[Gradients, Arriving | None]:
    """Return the gradients of a layer's tensors, and what arrives at the previous layer; for the first layer, at the block's input.

    Args:
        block, layer, weight, kept: the layer.
        at: what arrives at its batch-norm.
        coefficients: what follows from its sums.
        before: what the previous layer kept; None for the block's first layer.
        onto: what its dgrad leads to; None if the gradient of its input is not wanted.
        pending: takes the parts of the weight's gradient.
    """
    k, gamma, beta, mask = coefficients
    g = at.g
    on_load: tuple[Tensor, Tensor] | None = (k, kept.y)
    if _needs_dy(layer, onto is not None):
        relu_from: Literal["none", "recompute"] = "recompute" if at.gated else "none"
        g, on_load = backward_apply(at.g, kept.y, k, relu_from=relu_from, affine=kept.affine, backend=block.backend), None
    conv = _wgrad(block, layer, weight, kept, before, g, on_load, pending)
    leaving = None if onto is None else _dgrad(block, layer, weight, kept.source, g, on_load, onto)
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
    source = kept.source
    prologue = (before.affine.scale, before.affine.shift) if kept.transformed and before is not None else None
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
    block: ChainBlock, layer: Layer, weight: Weights, source: Tensor, g: Tensor, g_affine: tuple[Tensor, Tensor] | None, onto: _Onto
) -> Arriving:
    join, added = onto.join, onto.added
    if layer.dgrad != CHAIN:
        dx = channels_last(convolve_backward(g, source, weight.conv, layer.stride, layer.kernel // 2, (True, False))[0])
    else:
        size = (source.shape[2], source.shape[3])
        if join is not None and added is not None and layer.joins:
            g_z, sums, shortcut_sums = conv_dgrad_joined(
                g,
                weight.conv,
                size,
                stride=layer.stride,
                g_affine=g_affine,
                added=added,
                join=join,
                config=layer.tiles.dgrad,
                backend=block.backend,
            )
            return Arriving(g_z, False, sums, shortcut_sums)
        within = join is not None and added is None and join.bits is None
        dx, inner = conv_dgrad(
            g,
            weight.conv,
            size,
            stride=layer.stride,
            g_affine=g_affine,
            epilogue=(join.y, join.affine) if join is not None and within else None,
            config=layer.tiles.dgrad,
            backend=block.backend,
        )
        if within:
            return Arriving(dx, False, inner)
    if added is not None:
        # In place: nothing else uses dx.
        dx = dx.add_(added)
    return Arriving(dx, False, None) if join is None else arrive(join, dx, onto.writes, block.backend)
