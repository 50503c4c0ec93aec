"""Choosing the way of a residual block by timing all of it, forward and backward, on the batch at hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from der_fast.kernels.choices import Choices
from der_fast.model import chain, paths
from der_fast.model.chain import Block, Weights


@torch.no_grad()
def fastest_block(block: Block, x: Tensor, weights: Sequence[Weights], choices: Choices) -> Block:
    """Return the block with the fastest way in each direction; 'cudnn' wins unless another is clearly faster.

    The forward way is chosen first. The backward way is measured on what that one keeps, which the two share.

    Args:
        block: the ways that its layers have now do not count.
        x: its input, channels-last.
        weights: of every layer.
        choices: remembers what was measured.
    """
    key = _key(block, x, weights)
    layers = {name: paths.forward_layers(block.layers, name) for name in paths.distinct(block.layers, paths.FORWARD)}
    forwards = {name: replace(block, layers=ways) for name, ways in layers.items()}
    runs: dict[str, Callable[[], object]] = {name: lambda one=one: chain.forward(one, x, weights) for name, one in forwards.items()}  # type: ignore[misc]
    forward = _fastest(choices, f"{key}|forward", runs, x, "residual blocks run forward as")
    chosen = forwards[forward]

    out, bits, kept = chain.forward(chosen, x, weights)
    layers = {name: paths.backward_layers(chosen.layers, name) for name in paths.distinct(chosen.layers, paths.BACKWARD)}
    backwards = {name: replace(chosen, layers=ways) for name, ways in layers.items()}
    wants_x = block.residual != chain.NOTHING
    runs = {
        name: lambda one=one: chain.backward(one, x, weights, kept, bits, out, wants_x)  # type: ignore[misc]
        for name, one in backwards.items()
    }
    return backwards[_fastest(choices, f"{key}|backward after {forward}", runs, x, "residual blocks run backward as")]


def _fastest(choices: Choices, key: str, runs: Mapping[str, Callable[[], object]], x: Tensor, what: str) -> str:
    if len(runs) == 1:
        return next(iter(runs))
    return choices.fastest(key, runs, device=x.device, usual=paths.CUDNN, what=what)


def _key(block: Block, x: Tensor, weights: Sequence[Weights]) -> str:
    """Everything that the time depends on: dtype, shape of the input, shape of every layer, and what is added at the join."""
    convs = [
        f"{layer.kernel}x{layer.kernel}/{layer.stride}:{weight.conv.shape[0]}" for layer, weight in zip(block.layers, weights, strict=True)
    ]
    size = "x".join(map(str, (x.shape[0], *x.shape[2:], x.shape[1])))
    return f"block|{str(x.dtype).removeprefix('torch.')}|{size}|{' '.join(convs)}|{block.residual}"
