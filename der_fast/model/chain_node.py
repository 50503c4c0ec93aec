"""A residual block's training step as one autograd node."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from der_fast.kernels.affine import VECTORS, Affine
from der_fast.kernels.masked_bn import Running
from der_fast.kernels.masked_bn.autograd import channels_last
from der_fast.model import chain
from der_fast.model.chain import ChainBlock, Kept, Weights

# A layer's tensors as arguments of the node: the weight, its copy in the activations' dtype, γ, β, mask.
_PER_LAYER = 5

Flat = Sequence[Tensor | None]


class _BlockNode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, block: ChainBlock, running: Sequence[Running], x: Tensor, *flat: Tensor | None) -> Tensor:
        out, bits, kept = chain.forward(block, x, weights_of(flat), running)
        ctx.block, ctx.transformed = block, [layer.transformed for layer in kept]
        # A layer's source is usually a tensor that is saved anyway; saving it twice costs nothing.
        saved = [(layer.y, layer.source, *(getattr(layer.affine, name) for name in VECTORS)) for layer in kept]
        ctx.save_for_backward(bits, *flat, *itertools.chain.from_iterable(saved))
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        bits, *rest = ctx.saved_tensors
        layers = len(ctx.block.layers)
        flat, saved = rest[: _PER_LAYER * layers], rest[_PER_LAYER * layers :]
        size = len(saved) // layers
        kept = []
        for index, transformed in enumerate(ctx.transformed):
            y, source, *affine = saved[index * size : (index + 1) * size]
            kept.append(Kept(y, Affine(*affine), source, transformed))
        g = channels_last(g.to(kept[0].y.dtype))
        dx, gradients = chain.backward(ctx.block, weights_of(flat), kept, bits, g, ctx.needs_input_grad[2])
        found: list[Tensor | None] = []
        for index, gradient in enumerate(gradients):
            found += [gradient.conv.to(flat[_PER_LAYER * index].dtype), None, gradient.gamma, gradient.beta, gradient.mask]
        return None, None, dx, *found


def run_block(block: ChainBlock, x: Tensor, flat: Flat, running: Sequence[Running]) -> Tensor:
    """Return the block's differentiable output; the running statistics move towards the batch's, the unbiased variance among them.

    Args:
        block: what the block consists of.
        x: its input, channels-last.
        flat: for every layer the weight, its copy in x's dtype, γ, β and the mask or None.
        running: of every layer.
    """
    out: Tensor = _BlockNode.apply(block, running, x, *flat)  # type: ignore[no-untyped-call]
    return out


def weights_of(flat: Flat) -> list[Weights]:
    """Return the tensors that the chain computes with."""
    weights = []
    for start in range(0, len(flat), _PER_LAYER):
        _, conv, gamma, beta, mask = flat[start : start + _PER_LAYER]
        assert conv is not None and gamma is not None and beta is not None
        weights.append(Weights(conv, gamma, beta, mask))
    return weights
