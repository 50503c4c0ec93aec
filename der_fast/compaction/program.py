"""What a compact extractor computes, as a list of operations on named values.

The list is derived from the architecture and the widths that are left. Everything that runs, stores or exports a compact extractor
reads this list, so that the order of operations and the names and shapes of the folded weights are decided in one place.

Batch-norm in evaluation mode is an affine map. Where it follows a convolution it is folded into the convolution's weight and bias:
W' = γ/√(σ² + ε) · W and b' = β − γμ/√(σ² + ε). In pre-activation networks the batch-norm of the residual stream follows an addition and
stays a separate operation, `affine`: x · scale + shift.

A block with an empty inner group has lost its branch. What remains is a constant vector, which is added to the shortcut (`bias`), or
nothing at all in a pre-activation network, where no batch-norm follows the last convolution.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from der_fast.model.architecture import Architecture, Block, Conv, Groups

IMAGE, FEATURES = "image", "features"
CONV, BIAS, AFFINE, POOL, WIDEN, MEAN = "conv", "bias", "affine", "pool", "widen", "mean"


@dataclass(frozen=True)
class Op:
    """One operation: reads the value `source` (and `residual`), writes the value `target`, which no other operation writes.

    Attributes:
        kind: 'conv': convolution with padding kernel // 2; 'bias': add a vector; 'affine': x · scale + shift; 'pool': 3×3 stride-2
            max-pooling with padding 1; 'widen': every stride-th row and column, with `outputs - inputs` zero channels appended; 'mean':
            over height and width.
        target, source: names of values; the image is 'image', the result 'features'.
        inputs, outputs: channels of `source` and `target`.
        residual: value that is added before the ReLU; '' for none.
        relu: ReLU last.
        kernel, stride: of 'conv' and 'widen'.
        bias: a 'conv' that has a bias.

    The weights of a 'conv' are the tensors ``<target>.weight`` (outputs, inputs, kernel, kernel) and, with a bias, ``<target>.bias``
    (outputs,); those of a 'bias' ``<target>.bias``; those of an 'affine' ``<target>.scale`` and ``<target>.shift``.
    """

    kind: str
    target: str
    source: str
    inputs: int
    outputs: int
    residual: str = ""
    relu: bool = False
    kernel: int = 1
    stride: int = 1
    bias: bool = False

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the weights, in order."""
        shapes: dict[str, tuple[int, ...]] = {}
        if self.kind == CONV:
            shapes[f"{self.target}.weight"] = (self.outputs, self.inputs, self.kernel, self.kernel)
        if self.kind == BIAS or (self.kind == CONV and self.bias):
            shapes[f"{self.target}.bias"] = (self.outputs,)
        if self.kind == AFFINE:
            shapes[f"{self.target}.scale"] = shapes[f"{self.target}.shift"] = (self.outputs,)
        return shapes


def is_constant(architecture: Architecture, widths: Mapping[str, int]) -> bool:
    """Whether some residual stream has no channel left, so that the features no longer depend on the image."""
    path = [architecture.stem.target, *(block.target for block in architecture.blocks)]
    return any(architecture.width(groups, widths) == 0 for groups in path)


def lost_branch(architecture: Architecture, block: Block, widths: Mapping[str, int]) -> bool:
    """Whether one of the block's inner groups has no channel left."""
    return any(architecture.width(conv.target, widths) == 0 for conv in block.convs[:-1])


def live_widths(architecture: Architecture, widths: Mapping[str, int]) -> dict[str, int]:
    """Return the widths without channels that have no effect: the rest of a lost branch, or everything if a stream is empty."""
    if is_constant(architecture, widths):
        return dict.fromkeys(architecture.groups, 0)
    live = dict(widths)
    for block in architecture.blocks:
        if lost_branch(architecture, block, widths):
            live.update({name: 0 for conv in block.convs[:-1] for name in conv.target})
    return live


def program(architecture: Architecture, widths: Mapping[str, int]) -> tuple[Op, ...]:
    """Return the operations in order; none if nothing is left of the extractor (its features are then of width 0).

    Args:
        architecture: the backbone.
        widths: channels of every group, as they are stored.
    """
    if is_constant(architecture, widths):
        return ()
    return tuple(_ProgramBuilder(architecture, widths).build())


def folded_parameters(architecture: Architecture) -> int:
    """Number of stored weights of the full network with batch-norm folded."""
    return sum(math.prod(shape) for op in program(architecture, architecture.groups) for shape in op.tensors().values())


class _ProgramBuilder:
    def __init__(self, architecture: Architecture, widths: Mapping[str, int]) -> None:
        self.architecture, self.widths = architecture, widths
        self.ops: list[Op] = []

    def build(self) -> list[Op]:
        architecture = self.architecture
        before = architecture.preactivation
        value = self._conv(architecture.stem, "stem", IMAGE, relu=not before, bias=not before)
        if architecture.pool:
            value = self._plain(POOL, "pool", value, architecture.stem.target, architecture.stem.target)
        for block in architecture.blocks:
            value = (self._block_preactivation if before else self._block)(block, value)
        if before:
            value = self._plain(AFFINE, "norm", value, architecture.features, architecture.features, relu=True)
        self._plain(MEAN, FEATURES, value, architecture.features, architecture.features)
        return self.ops

    def _block(self, block: Block, value: str) -> str:
        residual = self._shortcut(block, value, bias=True) if block.shortcut else self._identity(block, value)
        last = block.convs[-1]
        if lost_branch(self.architecture, block, self.widths):
            return self._plain(BIAS, f"{block.name}.{last.name}", residual, block.target, block.target, relu=True)
        for conv in block.convs:
            value = self._conv(conv, f"{block.name}.{conv.name}", value, relu=True, bias=True, residual=residual if conv is last else "")
        return value

    def _block_preactivation(self, block: Block, value: str) -> str:
        lost = lost_branch(self.architecture, block, self.widths)
        if lost and not block.shortcut:
            return self._identity(block, value)
        active = self._plain(AFFINE, f"{block.name}.norm", value, block.source, block.source, relu=True)
        residual = self._shortcut(block, active, bias=False) if block.shortcut else self._identity(block, value)
        if lost:
            return residual
        last = block.convs[-1]
        for conv in block.convs:
            inner = conv is not last
            active = self._conv(conv, f"{block.name}.{conv.name}", active, relu=inner, bias=inner, residual="" if inner else residual)
        return active

    def _shortcut(self, block: Block, value: str, *, bias: bool) -> str:
        assert block.shortcut is not None
        return self._conv(block.shortcut, f"{block.name}.shortcut", value, bias=bias)

    def _identity(self, block: Block, value: str) -> str:
        if block.stride == 1 and block.source == block.target:
            return value
        return self._plain(WIDEN, f"{block.name}.widen", value, block.source, block.target, stride=block.stride)

    def _conv(self, conv: Conv, target: str, source: str, *, relu: bool = False, bias: bool = False, residual: str = "") -> str:
        inputs, outputs = self._width(conv.source), self._width(conv.target)
        self.ops.append(Op(CONV, target, source, inputs, outputs, residual, relu, conv.kernel, conv.stride, bias))
        return target

    def _plain(self, kind: str, target: str, source: str, before: Groups, after: Groups, *, relu: bool = False, stride: int = 1) -> str:
        self.ops.append(Op(kind, target, source, self._width(before), self._width(after), relu=relu, stride=stride))
        return target

    def _width(self, groups: Groups) -> int:
        return self.architecture.width(groups, self.widths)
