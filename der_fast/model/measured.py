"""Choosing a residual block's path by timing the whole block, forward and backward, on the current batch.

Before anything is timed, every path must agree with cuDNN's on that batch: a fast wrong answer is useless.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from der_fast.kernels.agreement import Run, Tensors
from der_fast.kernels.choices import Choices
from der_fast.model import chain, paths
from der_fast.model.chain import ChainBlock, Gradients, Kept, Weights

# Paths are compared from this many values per channel on: with fewer, batch-norm magnifies rounding without bound.
ENOUGH = 512


@torch.no_grad()
def fastest_block(block: ChainBlock, x: Tensor, weights: Sequence[Weights], choices: Choices) -> ChainBlock:
    """Return the block with the fastest path in each direction; 'cudnn' wins unless another is clearly faster.

    The forward path is chosen first. The backward path is then measured on what the forward path keeps.

    Args:
        block: its layers' current paths are ignored.
        x: its input, channels-last.
        weights: of every layer.
        choices: remembers what was measured.
    """
    key = _key(block, x, weights)
    layers = {name: paths.forward_layers(block.layers, name) for name in paths.distinct(block.layers, paths.FORWARD)}
    forwards = {name: replace(block, layers=ways) for name, ways in layers.items()}
    runs: dict[str, Run] = {name: lambda one=one: chain.forward(one, x, weights) for name, one in forwards.items()}  # type: ignore[misc]
    forward = _fastest(choices, f"{key}|forward", runs, x, "residual blocks run forward as", _output)
    chosen = forwards[forward]

    out, bits, kept = chain.forward(chosen, x, weights)
    layers = {name: paths.backward_layers(chosen.layers, name) for name in paths.distinct(chosen.layers, paths.BACKWARD)}
    backwards = {name: replace(chosen, layers=ways) for name, ways in layers.items()}
    wants_x = block.residual != chain.NOTHING
    runs = {
        name: lambda one=one: chain.backward(one, weights, kept, bits, out, wants_x)  # type: ignore[misc]
        for name, one in backwards.items()
    }
    return backwards[_fastest(choices, f"{key}|backward after {forward}", runs, x, "residual blocks run backward as", _gradients)]


def _fastest(choices: Choices, key: str, runs: Mapping[str, Run], x: Tensor, what: str, tensors: Tensors) -> str:
    if len(runs) == 1:
        return next(iter(runs))
    trusted = [paths.CUDNN] if x.numel() // x.shape[1] >= ENOUGH else []
    return choices.fastest(key, runs, device=x.device, usual=paths.CUDNN, what=what, trusted=trusted, tensors=tensors)


def _output(result: object) -> list[Tensor | None]:
    """The tensors that all forward paths must agree on; what a path keeps is its own."""
    out, _, kept = cast(tuple[Tensor, object, list[Kept]], result)
    return [out, *(value for one in kept for value in (one.mean, one.variance))]


def _gradients(result: object) -> list[Tensor | None]:
    dx, layers = cast(tuple[Tensor | None, list[Gradients]], result)
    return [dx, *(value for one in layers for value in (one.conv, one.gamma, one.beta, one.mask))]


def _key(block: ChainBlock, x: Tensor, weights: Sequence[Weights]) -> str:
    """Everything that the time depends on: dtype, shape of the input, shape of every layer, and what is added at the join."""
    convs = [
        f"{layer.kernel}x{layer.kernel}/{layer.stride}:{weight.conv.shape[0]}" for layer, weight in zip(block.layers, weights, strict=True)
    ]
    size = "x".join(map(str, (x.shape[0], *x.shape[2:], x.shape[1])))
    return f"block|{str(x.dtype).removeprefix('torch.')}|{size}|{' '.join(convs)}|{block.residual}"
