"""Choosing a residual block's path by timing the whole block, forward and backward, on the current batch.

Before anything is timed, every path must agree on that batch: a fast wrong answer is useless. Forward paths are compared with plain
PyTorch. Backward paths are compared with cuDNN's, whose gates come from the same kernels: in float32 a value of millions lies so near a
ReLU's corner that PyTorch, which rounds the product before the sum, sees it on the other side. If no kernel works, the block runs in
plain PyTorch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from der_fast.kernels.agreement import Run, Tensors
from der_fast.kernels.choices import Choices
from der_fast.kernels.conv import Join
from der_fast.kernels.masked_bn import masked_bn
from der_fast.model import chain, paths
from der_fast.model.chain import ChainBlock, Gradients, Kept, Weights
from der_fast.model.chain_backward import Arriving, backward
from der_fast.model.extractor import MaskedBatchNorm
from der_fast.model.paths import CUDNN, PYTORCH
from der_fast.model.tiles import with_backward_tiles, with_forward_tiles

# Paths are compared from this many values per channel on: with fewer, batch-norm magnifies rounding without bound, and a path only must
# not fail.
ENOUGH = 512


@torch.no_grad()
def fastest_block(block: ChainBlock, x: Tensor, weights: Sequence[Weights], choices: Choices, before: Join | None = None) -> ChainBlock:
    """Return the block with the fastest path in each direction and the fastest tiles; 'cudnn' wins unless another is clearly faster.

    The forward path is chosen first. The backward path is then measured on what the forward path keeps. If the kernels of one of them
    all fail, both run in plain PyTorch.

    Args:
        block: its layers' current paths are ignored.
        x: its input, channels-last.
        weights: of every layer.
        choices: remembers what was measured.
        before: the end of the block that made x. Then every backward path is measured with the way through it, in a pass or without.
    """
    key = _key(block, x, weights)
    plain = replace(block, backend="reference", layers=_on_cudnn(block))
    names = paths.distinct(block.layers, paths.FORWARD)
    forward_key = f"{key}|forward"
    if block.backend == "fused":
        known = choices.known(forward_key, names, x.device)
        ways = [paths.forward_layers(plain.layers, name) for name in ([known] if known else names)]
        if any(layer.forward != CUDNN for way in ways for layer in way):
            # Where there is no memory for plain PyTorch, the default tiles must do.
            with contextlib.suppress(torch.OutOfMemoryError):
                block = with_forward_tiles(block, ways, weights, chain.forward(plain, x, weights)[2], choices)
    forwards = {name: replace(block, layers=paths.forward_layers(block.layers, name)) for name in names}
    runs: dict[str, Run] = {
        name: lambda one=one: chain.forward(one, x, weights)  # type: ignore[misc]
        for name, one in {PYTORCH: plain, **forwards}.items()
    }
    forward = _fastest(choices, forward_key, runs, x, "residual blocks run forward as", [PYTORCH, CUDNN], _output)
    if forward == PYTORCH:
        return plain
    found = _fastest_backward(forwards[forward], plain, f"{key}|{_onto(before)} after {forward}", x, weights, choices, before)
    return plain if found is None else found


def _fastest_backward(
    block: ChainBlock,
    plain: ChainBlock,
    key: str,
    x: Tensor,
    weights: Sequence[Weights],
    choices: Choices,
    before: Join | None,
) -> ChainBlock | None:
    """Return the block, whose forward paths are chosen, with the fastest backward paths; None where none works."""
    out, bits, kept = chain.forward(block, x, weights)
    names = paths.distinct(block.layers, paths.BACKWARD)
    if before is None or block.residual == chain.WIDENED:
        # There is no join to do apart.
        names = tuple(name for name in names if name != paths.APART)
    if block.backend == "fused":
        known = choices.known(key, names, x.device)
        ways = [paths.backward_layers(block.layers, name) for name in ([known] if known else names)]
        block = with_backward_tiles(block, ways, weights, kept, choices, before)
    backwards = {name: replace(block, layers=paths.backward_layers(block.layers, name)) for name in names}
    wants_x = block.residual != chain.NOTHING
    runs: dict[str, Run] = {
        name: lambda one=one: backward(one, weights, kept, (out, bits), wants_x, before)  # type: ignore[misc]
        for name, one in {PYTORCH: plain, **backwards}.items()
    }
    return backwards.get(_fastest(choices, key, runs, x, "residual blocks run backward as", [CUDNN, PYTORCH], _gradients))


@torch.no_grad()
def working_normalisation(norm: MaskedBatchNorm, x: Tensor, mask: Tensor | None, choices: Choices) -> str:
    """Return the backend of `masked_bn` for a batch-norm without a convolution of its own: 'fused', or 'reference' where that fails.

    Args:
        norm: the batch-norm; its statistics stay as they are.
        x: its input, channels-last.
        mask: (C,), or None.
        choices: remembers it, and warns.
    """

    def run(backend: str) -> list[Tensor | None]:
        with torch.enable_grad():
            leaves = [None if one is None else one.detach().requires_grad_() for one in (x, norm.weight, norm.bias, mask)]
            image, weight, bias, factor = leaves
            assert image is not None and weight is not None and bias is not None
            statistics = norm.running_mean.clone(), norm.running_var.clone()
            out = masked_bn(image, weight, bias, *statistics, mask=factor, relu=True, training=True, backend=backend)
            wanted = [leaf for leaf in leaves if leaf is not None]
            return [out.detach(), *statistics, *torch.autograd.grad(out, wanted, out.detach())]

    key = f"masked_bn|{str(x.dtype).removeprefix('torch.')}|{'x'.join(map(str, x.shape))}|{'no mask' if mask is None else 'mask'}"
    runs: dict[str, Run] = {backend: lambda backend=backend: run(backend) for backend in ("reference", "fused")}  # type: ignore[misc]
    compared = _all if x.numel() // x.shape[1] >= ENOUGH else _nothing
    what = "batch-norms before a convolution run as"
    return choices.fastest(key, runs, device=x.device, what=what, trusted=["reference"], tensors=compared, last_resort="reference")


def _all(result: object) -> list[Tensor | None]:
    return cast(list[Tensor | None], result)


def _on_cudnn(block: ChainBlock) -> tuple[paths.Layer, ...]:
    return paths.backward_layers(paths.forward_layers(block.layers, CUDNN), CUDNN)


def _fastest(choices: Choices, key: str, runs: Mapping[str, Run], x: Tensor, what: str, trusted: Sequence[str], tensors: Tensors) -> str:
    compared = tensors if x.numel() // x.shape[1] >= ENOUGH else _nothing
    return choices.fastest(key, runs, device=x.device, usual=CUDNN, what=what, trusted=trusted, tensors=compared, last_resort=PYTORCH)


def _nothing(result: object) -> list[Tensor | None]:
    return []


def _output(result: object) -> list[Tensor | None]:
    """The tensors that all forward paths must agree on; what a path keeps is its own."""
    out, _, kept = cast(tuple[Tensor, object, list[Kept]], result)
    return [out, *(value for one in kept for value in (one.affine.mean, one.affine.rstd))]


def _gradients(result: object) -> list[Tensor | None]:
    leaving, layers = cast(tuple[Arriving | None, list[Gradients]], result)
    sums = [] if leaving is None else [None if one is None else one.sum(0) for one in (leaving.sums, leaving.shortcut_sums)]
    return [
        None if leaving is None else leaving.g,
        *sums,
        *(value for one in layers for value in (one.conv, one.gamma, one.beta, one.mask)),
    ]


def _onto(before: Join | None) -> str:
    """What the end of the block before adds to the time of a backward path."""
    if before is None:
        return "backward"
    return f"backward through {'a sign' if before.bits is None else 'bits' if before.shortcut is None else 'bits and a projection'}"


def _key(block: ChainBlock, x: Tensor, weights: Sequence[Weights]) -> str:
    """Everything that the time depends on: dtype, shape of the input, shape of every layer, and what is added at the join."""
    convs = [
        f"{layer.kernel}x{layer.kernel}/{layer.stride}:{weight.conv.shape[0]}" for layer, weight in zip(block.layers, weights, strict=True)
    ]
    size = "x".join(map(str, (x.shape[0], *x.shape[2:], x.shape[1])))
    return f"block|{str(x.dtype).removeprefix('torch.')}|{size}|{' '.join(convs)}|{block.residual}"
