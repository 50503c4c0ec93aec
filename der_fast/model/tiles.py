"""Choosing the tiles of a layer's convolutions by timing each kernel alone, per layer and direction, on the current batch.

`kernels.conv.likely` says which tiles are compared per kernel, and only of kernels that a path under consideration uses. Together they are
measured for `kernels.choices.OPTIONAL_SECONDS` per process at most; then the default for the shape is taken. Everything is remembered, so a
second process measures nothing. A tile must compute what `kernels.conv`'s plain PyTorch does before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
from torch import Tensor

from der_fast.kernels.affine import EPSILON
from der_fast.kernels.agreement import Run, Tensors
from der_fast.kernels.choices import Choices
from der_fast.kernels.conv import ConvShape, ConvTiles, Join, conv_dgrad, conv_dgrad_joined, conv_forward, conv_wgrad, likely
from der_fast.kernels.device import capability, multiprocessors
from der_fast.kernels.masked_bn import finalize
from der_fast.model.chain import NOTHING, ChainBlock, Kept, Weights
from der_fast.model.chain_backward import joins
from der_fast.model.paths import CHAIN, CUDNN, Layer

# The name of plain PyTorch, which is never timed.
REFERENCE = "reference"
# dy = k0·g + k1·y + k2 as batch-norm's backward pass has it; any numbers do.
_COEFFICIENTS = (0.5, 0.25, 0.125)

# One kernel: from tiles (None: the default) and a backend to its result.
Kernel = Callable[[ConvTiles | None, str], object]


@dataclass(frozen=True)
class _Place:
    """A layer of a block on the current batch.

    Attributes:
        layer, weight, kept: the layer.
        before: what the layer before it in the block has kept; None for the first.
        join: the end of the block before, if the layer's dgrad goes through it.
    """

    layer: Layer
    weight: Weights
    kept: Kept
    before: Kept | None
    join: Join | None = None

    @property
    def prologue(self) -> tuple[Tensor, Tensor] | None:
        return None if self.before is None else (self.before.affine.scale, self.before.affine.shift)

    @property
    def g_affine(self) -> tuple[Tensor, Tensor]:
        vector = self.kept.affine.scale
        return vector.new_tensor(_COEFFICIENTS)[:, None].repeat(1, len(vector)), self.kept.y


def with_forward_tiles(
    block: ChainBlock, ways: Sequence[Sequence[Layer]], weights: Sequence[Weights], kept: Sequence[Kept], choices: Choices
) -> ChainBlock:
    """Return the block with the fastest tiles for every forward kernel that one of the `ways` uses.

    Args:
        block: of backend 'fused'; its other tiles stay.
        ways: the block's layers, once for each set of paths that may be taken.
        weights, kept: of every layer; `kept` from a forward pass that stores every activation.
        choices: remembers what was measured.
    """
    layers = []
    for index, place in enumerate(_places(block, weights, kept)):
        used = [way[index].forward for way in ways]
        tiles = place.layer.tiles
        if any(path != CUDNN and (path != CHAIN or place.before is None) for path in used):
            run = partial(_forward, place, place.kept.source, None)
            tiles = replace(tiles, forward=_fastest("forward", place, False, run, _merged(place.weight), choices))
        if CHAIN in used and place.before is not None:
            run = partial(_forward, place, place.before.y, place.prologue)
            tiles = replace(tiles, transformed=_fastest("forward", place, True, run, _merged(place.weight), choices))
        layers.append(replace(place.layer, tiles=tiles))
    return replace(block, layers=tuple(layers))


def with_backward_tiles(
    block: ChainBlock,
    ways: Sequence[Sequence[Layer]],
    weights: Sequence[Weights],
    kept: Sequence[Kept],
    choices: Choices,
    before: Join | None = None,
) -> ChainBlock:
    """Return the block with the fastest tiles for every backward kernel that one of the `ways` uses.

    Arguments as above, any `kept`; `before` is the end of the block before.
    """
    layers = []
    for index, place in enumerate(_places(block, weights, kept)):
        tiles = place.layer.tiles
        if index == 0 and any(joins(replace(block, layers=tuple(way))) for way in ways):
            place = replace(place, join=before)
        if any(way[index].dgrad == CHAIN for way in ways) and not (block.residual == NOTHING and index == 0):
            tiles = replace(tiles, dgrad=_fastest("dgrad", place, True, partial(_dgrad, place), _input_gradient, choices))
        if any(way[index].wgrad == CHAIN for way in ways):
            narrow = partial(_weight_gradient, place.kept.y.dtype)
            tiles = replace(tiles, wgrad=_fastest("wgrad", place, True, partial(_wgrad, place), narrow, choices))
        layers.append(replace(place.layer, tiles=tiles))
    return replace(block, layers=tuple(layers))


def _places(block: ChainBlock, weights: Sequence[Weights], kept: Sequence[Kept]) -> list[_Place]:
    body = len(block.body)
    return [
        _Place(layer, weight, own, kept[index - 1] if 0 < index < body else None)
        for index, (layer, weight, own) in enumerate(zip(block.layers, weights, kept, strict=True))
    ]


def _forward(place: _Place, source: Tensor, prologue: tuple[Tensor, Tensor] | None, config: ConvTiles | None, backend: str) -> object:
    stride = place.layer.stride
    return conv_forward(source, place.weight.conv, stride=stride, prologue=prologue, statistics=True, config=config, backend=backend)


def _dgrad(place: _Place, config: ConvTiles | None, backend: str) -> object:
    before, y = place.before, place.kept.y
    height, width = place.kept.source.shape[2:]
    if place.join is not None:
        return conv_dgrad_joined(
            y,
            place.weight.conv,
            (height, width),
            stride=place.layer.stride,
            g_affine=place.g_affine,
            # Any numbers of the right shape do.
            added=place.kept.source,
            join=place.join,
            config=config,
            backend=backend,
        )
    return conv_dgrad(
        y,
        place.weight.conv,
        (height, width),
        stride=place.layer.stride,
        g_affine=place.g_affine,
        epilogue=None if before is None else (before.y, before.affine),
        config=config,
        backend=backend,
    )


def _wgrad(place: _Place, config: ConvTiles | None, backend: str) -> object:
    return conv_wgrad(
        place.kept.source,
        place.kept.y,
        place.layer.kernel,
        stride=place.layer.stride,
        prologue=place.prologue if place.kept.transformed else None,
        g_affine=place.g_affine,
        config=config,
        backend=backend,
    )


def _merged(weight: Weights) -> Tensors:
    """Partial statistics depend on the tiles; merged they must agree."""

    def tensors(result: object) -> list[Tensor | None]:
        y, partials = cast(tuple[Tensor, Tensor], result)
        _, mean, variance = finalize(partials, weight.gamma, weight.beta, None, EPSILON, backend="reference")
        return [y, mean, variance]

    return tensors


def _input_gradient(result: object) -> list[Tensor | None]:
    dx, *sums = cast(tuple[Tensor | None, ...], result)
    return [dx, *(None if one is None else one.sum(0) for one in sums)]


def _weight_gradient(dtype: torch.dtype, result: object) -> list[Tensor | None]:
    # In the activations' dtype: PyTorch rounds it to that.
    return [cast(Tensor, result).to(dtype)]


def _fastest(direction: str, place: _Place, transformed: bool, run: Kernel, tensors: Tensors, choices: Choices) -> ConvTiles | None:
    """Return the tiles to use; None for the default of the shape."""
    y, source = place.kept.y, place.kept.source
    batch, channels, height, width = source.shape
    kernel, stride = place.layer.kernel, place.layer.stride
    shape = ConvShape(batch, channels, height, width, y.shape[1], kernel, stride)
    offered = likely(
        direction, shape, y.dtype, transformed=transformed, processors=multiprocessors(y.device), capability=capability(y.device)
    )
    found = {config.name: config for config in offered}
    default = offered[0].name
    if len(found) == 1:
        return None
    dtype = str(y.dtype).removeprefix("torch.")
    size = f"{batch}x{height}x{width}x{channels}|{kernel}x{kernel}/{stride}:{y.shape[1]}"
    key = f"conv|{dtype}|{size}|{direction}{' transformed' if transformed else ''}"
    if place.join is not None:
        key += " joined with a projection" if place.join.shortcut is not None else " joined"
    runs: dict[str, Run] = {REFERENCE: partial(run, None, "reference")}
    runs |= {name: partial(run, config, "fused") for name, config in found.items()}
    try:
        runs[choices.known(key, found, y.device) or default]()
    except Exception:
        # The paths that use this kernel fail in the same way: they are left out with a line, and this needs none.
        return None
    chosen = choices.fastest(
        key,
        runs,
        device=y.device,
        usual=default,
        what=f"convolutions ({direction}) run in tiles of",
        trusted=[REFERENCE],
        tensors=tensors,
        last_resort=REFERENCE,
        optional=True,
    )
    return found.get(chosen)
