"""A residual block's training step as one autograd node."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from der_fast.kernels.affine import VECTORS, Affine
from der_fast.kernels.conv import Join
from der_fast.kernels.masked_bn import Running
from der_fast.kernels.masked_bn.autograd import channels_last
from der_fast.model import chain, chain_backward
from der_fast.model.chain import ChainBlock, Kept, Weights
from der_fast.model.chain_backward import Arriving

# A layer's tensors as arguments of the node: the weight, its copy in the activations' dtype, γ, β, mask.
_PER_LAYER = 5

Flat = Sequence[Tensor | None]


@dataclass
class Passage:
    """Between two blocks of one batch: what one pass leaves for the other.

    Attributes:
        join: the end of the block before, from its forward pass to that of the block behind, which then keeps it.
        prepared: from the backward pass of the block behind to that of the block before: what arrives at its batch-norms, if the gradient
            that autograd brings is this one. It is another one if something else uses the block's output too.
        version: of `prepared.g`, which a hook may change in place.
    """

    join: Join | None = None
    prepared: Arriving | None = None
    version: int = 0

    def prepare(self, arriving: Arriving) -> None:
        """Leave a gradient for the block before."""
        self.prepared, self.version = arriving, arriving.g._version

    def take(self, g: Tensor) -> Arriving | None:
        """Return what was prepared if `g` is that gradient, else None; nothing is left."""
        prepared, self.prepared = self.prepared, None
        return prepared if prepared is not None and prepared.g is g and g._version == self.version else None


class _BlockNode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        block: ChainBlock,
        running: Sequence[Running],
        entry: Passage | None,
        leave: Passage | None,
        x: Tensor,
        *flat: Tensor | None,
    ) -> Tensor:
        out, bits, kept = chain.forward(block, x, weights_of(flat), running)
        ctx.block, ctx.transformed, ctx.entry, ctx.leave = block, [layer.transformed for layer in kept], entry, leave
        before = None
        if entry is not None:
            before, entry.join = entry.join, None
        if before is None or not chain_backward.joins(block):
            ctx.entry, before = None, None
        if leave is not None:
            leave.join = chain_backward.end_of(block, kept, bits)
        # A layer's source is usually a tensor that is saved anyway; saving it twice costs nothing.
        saved = [(layer.y, layer.source, *_vectors(layer.affine)) for layer in kept]
        ctx.save_for_backward(bits, *_of_join(before), *flat, *itertools.chain.from_iterable(saved))
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        bits, *rest = ctx.saved_tensors
        before, rest = _join_of(rest)
        layers = len(ctx.block.layers)
        flat, saved = rest[: _PER_LAYER * layers], rest[_PER_LAYER * layers :]
        size = len(saved) // layers
        kept = []
        for index, transformed in enumerate(ctx.transformed):
            y, source, *affine = saved[index * size : (index + 1) * size]
            kept.append(Kept(y, Affine(*affine), source, transformed))
        arriving = None if ctx.leave is None else ctx.leave.take(g)
        if before is not None and _watched(kept[0].source):
            before = None
        wanted = ctx.needs_input_grad[4]
        given = arriving or (channels_last(g.to(kept[0].y.dtype)), bits)
        leaving, gradients = chain_backward.backward(ctx.block, weights_of(flat), kept, given, wanted, before)
        if leaving is not None and before is not None:
            ctx.entry.prepare(leaving)
        found: list[Tensor | None] = []
        for index, gradient in enumerate(gradients):
            found += [gradient.conv.to(flat[_PER_LAYER * index].dtype), None, gradient.gamma, gradient.beta, gradient.mask]
        return None, None, None, None, None if leaving is None else leaving.g, *found


def run_block(
    block: ChainBlock, x: Tensor, flat: Flat, running: Sequence[Running], *, entry: Passage | None = None, leave: Passage | None = None
) -> Tensor:
    """Return the block's differentiable output; the running statistics move towards the batch's, the unbiased variance among them.

    Args:
        block: what the block consists of.
        x: its input, channels-last.
        flat: for every layer the weight, its copy in x's dtype, γ, β and the mask or None.
        running: of every layer.
        entry: what the block that returned x was given as `leave`. Then the gradient of x that autograd carries may have gone through that
            block's last ReLU already, which changes no other gradient; a hook on x and `retain_grad` still see that of x itself.
        leave: an empty passage for the block that takes the output as it is.
    """
    out: Tensor = _BlockNode.apply(block, running, entry, leave, x, *flat)  # type: ignore[no-untyped-call]
    return out


def weights_of(flat: Flat) -> list[Weights]:
    """Return the tensors that the chain computes with."""
    weights = []
    for start in range(0, len(flat), _PER_LAYER):
        _, conv, gamma, beta, mask = flat[start : start + _PER_LAYER]
        assert conv is not None and gamma is not None and beta is not None
        weights.append(Weights(conv, gamma, beta, mask))
    return weights


def _vectors(affine: Affine) -> Iterator[Tensor]:
    return (getattr(affine, name) for name in VECTORS)


def _of_join(join: Join | None) -> list[Tensor | None]:
    """A join as tensors to be saved, always the same number."""
    if join is None:
        return [None] * (3 + 2 * len(VECTORS))
    other: Iterable[Tensor | None] = [None] * (1 + len(VECTORS))
    if join.shortcut is not None:
        other = [join.shortcut[0], *_vectors(join.shortcut[1])]
    return [join.bits, join.y, *_vectors(join.affine), *other]


def _join_of(saved: Sequence[Any]) -> tuple[Join | None, Sequence[Any]]:
    """The join, and what was saved after it."""
    count = len(VECTORS)
    bits, y, *rest = saved
    affine, other, after = rest[:count], rest[count : 2 * count + 1], rest[2 * count + 1 :]
    if y is None:
        return None, after
    return Join(y, Affine(*affine), bits, None if other[0] is None else (other[0], Affine(*other[1:]))), after


def _watched(x: Tensor) -> bool:
    """Whether somebody looks at the gradient of x, which is then worth a pass of its own."""
    return x.retains_grad or bool(x._backward_hooks)
