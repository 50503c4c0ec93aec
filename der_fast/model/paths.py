"""Which path each convolution of a residual block takes in training, and the names of the paths that are measured.

A layer is a convolution and the batch-norm after it. In each direction it runs either on PyTorch's convolution (cuDNN on a GPU) with
the passes of `kernels.masked_bn` around it, or on `kernels.conv`, which fuses some of those passes into the convolution:

    forward   cudnn     convolution; a pass for the statistics; a pass for affine and ReLU
              epilogue  statistics while the convolution stores; a pass for affine and ReLU
              chain     as epilogue; this layer applies the previous one's affine and ReLU on load: that activation is never stored
    backward  cudnn     a pass for dy; convolution; a pass for the sums of the layer before
              chain     dy is computed on load and never stored; ReLU and sums of the previous layer while dx is stored;
                        at a block's input also the sum with the shortcut's gradient, and ReLU and sums of the block before

    all       pytorch   as cudnn, with passes in plain PyTorch: taken only where no kernel works

dgrad and wgrad choose independently. Only 1×1 and 3×3 convolutions of stride 1 or 2 have a choice.

Unless something else was measured to be faster, the path is 'cudnn'. Where a kernel forms an operand in registers ('chain'), it does so
again at each of nine taps, and compiled for 9.0 nearly all of them wait for every tensor-core product (bench/results/machine-code.jsonl:
"asynchronous products"); a pass of `masked_bn` transforms once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from der_fast.kernels.conv import ConvTiles

CUDNN, EPILOGUE, CHAIN = "cudnn", "epilogue", "chain"
# As chain, except that strided convolutions run as cudnn: their dgrad gathers from every second pixel.
UNSTRIDED = "chain but for strides"
# As chain, except for the weights' gradient: a large sum, which cuDNN does well.
DGRAD = "chain but for wgrad"
# As chain, except that between two blocks there are passes of their own: dgrad then has fewer tensors to load while it stores.
APART = "chain but for joins"
FORWARD = (CUDNN, EPILOGUE, CHAIN, UNSTRIDED)
BACKWARD = (CUDNN, CHAIN, UNSTRIDED, DGRAD, APART)
# In no list, since it is no rival: the truth that the forward paths are compared with, and the last resort.
PYTORCH = "pytorch"
_KERNELS, _STRIDES = (1, 3), (1, 2)


@dataclass(frozen=True)
class Tiles:
    """How `kernels.conv` cuts a layer's convolution, by what is computed; None for the default of the shape.

    Attributes:
        forward: of an input as it is stored.
        transformed: forward, applying the previous layer's affine map and ReLU on load.
        dgrad, wgrad: the gradients.
    """

    forward: ConvTiles | None = None
    transformed: ConvTiles | None = None
    dgrad: ConvTiles | None = None
    wgrad: ConvTiles | None = None


@dataclass(frozen=True)
class Layer:
    """What does not change from step to step: the convolution's shape, its path in each direction, and the tiles of its kernels.

    Attributes:
        kernel, stride: of the convolution.
        forward, dgrad, wgrad: the path of each direction.
        joins: of a block's first layer: its dgrad, on path 'chain', also goes through the end of the block before.
        tiles: of its kernels.
    """

    kernel: int
    stride: int
    forward: str = CUDNN
    dgrad: str = CUDNN
    wgrad: str = CUDNN
    joins: bool = False
    tiles: Tiles = Tiles()

    @property
    def free(self) -> bool:
        """Whether `kernels.conv` supports this convolution."""
        return self.kernel in _KERNELS and self.stride in _STRIDES


def forward_layers(layers: Sequence[Layer], name: str) -> tuple[Layer, ...]:
    """Return the layers with the forward paths that `name`, one of `FORWARD`, stands for."""

    def path(layer: Layer) -> str:
        if not layer.free:
            return CUDNN
        if name == UNSTRIDED:
            return CHAIN if layer.stride == 1 else CUDNN
        return name

    return tuple(replace(layer, forward=path(layer)) for layer in layers)


def backward_layers(layers: Sequence[Layer], name: str) -> tuple[Layer, ...]:
    """Return the layers with the backward paths that `name`, one of `BACKWARD`, stands for."""

    def paths(layer: Layer) -> tuple[str, str]:
        if not layer.free or name == CUDNN or (name == UNSTRIDED and layer.stride > 1):
            return CUDNN, CUDNN
        return CHAIN, CUDNN if name == DGRAD else CHAIN

    found = [replace(layer, dgrad=dgrad, wgrad=wgrad, joins=False) for layer in layers for dgrad, wgrad in [paths(layer)]]
    return (replace(found[0], joins=found[0].dgrad == CHAIN and name != APART), *found[1:])


def distinct(layers: Sequence[Layer], names: Sequence[str]) -> tuple[str, ...]:
    """Return the names that differ for these layers; of those that do not, the first."""
    make = forward_layers if tuple(names) == FORWARD else backward_layers
    seen: dict[tuple[Layer, ...], str] = {}
    for name in names:
        seen.setdefault(make(layers, name), name)
    return tuple(seen.values())
