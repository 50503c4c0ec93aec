"""One layer of several extractors, packed for one launch: flat weights, one bias vector, and a table of what each reads and writes.

The activations of all extractors are side by side in the channels of one tensor (N, ΣC, H, W) with channels-last strides. Every extractor's
first channel is a multiple of 8, and the channels from its last one to the next multiple of 8 are exact zeros, which lets the kernel load
16 bytes at a time. The layer's result keeps this layout, because the weights and biases of the padding are zeros.

The table has one row per extractor and tile of output channels; `README.md` derives it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from der_fast.kernels.dtypes import DTYPES, accumulator

# Channels: 16 bytes of a 16-bit type, the widest load there is.
ALIGN = 8
# The columns of the table, in order; channels and the weight's offset are counted in units, see `GroupedLayer.table`.
FIELDS = ("first", "count", "inputs", "outputs", "source", "target", "weight", "residual", "residual_channels")


def padded(channels: int, align: int = ALIGN) -> int:
    """Return the next multiple of `align`."""
    return -(-channels // align) * align


@dataclass(frozen=True)
class GroupMember:
    """What one extractor does in a layer.

    Attributes:
        weight: (outputs, inputs, kernel, kernel); None where it reads nothing (a lost branch), which leaves only bias and residual.
        bias: (outputs,), or None for zeros.
        source: its first channel in the input.
        target: its first channel in the result.
        outputs: channels that it writes, without padding.
        residual: its first channel in the residual.
        residual_channels: channels of the residual that are added to the first channels of the result; later channels get none.
    """

    weight: Tensor | None
    bias: Tensor | None
    source: int
    target: int
    outputs: int
    residual: int = 0
    residual_channels: int = 0

    @property
    def inputs(self) -> int:
        """Channels that it reads, without padding."""
        return 0 if self.weight is None else self.weight.shape[1]


@dataclass(frozen=True)
class Entry:
    """A `GroupMember` without its tensors, with all channel counts padded; `weight` is its first element in the flat weights.

    Its matrix is stored row after row, `outputs` of them. A row has the entries (row of the kernel, column, input channel) and is padded
    with zeros to a multiple of 8.
    """

    inputs: int
    outputs: int
    source: int
    target: int
    weight: int
    residual: int
    residual_channels: int


@dataclass(frozen=True, eq=False)
class GroupedLayer:
    """A ragged grouped convolution, ready to run; `pack_layer` makes it.

    Attributes:
        entries: one per extractor, longest sum first.
        kernel, stride: of every convolution; padding is kernel // 2.
        relu: ReLU last.
        inputs, outputs: channels of the input and of the result, all extractors together.
        align: the input's channels are multiples of this: 8, or 1 for an image.
        weights: flat, of the activations' dtype.
        bias: (outputs,) float32, float64 with float64.
    """

    entries: tuple[Entry, ...]
    kernel: int
    stride: int
    relu: bool
    inputs: int
    outputs: int
    align: int
    weights: Tensor
    bias: Tensor
    _tables: dict[int, Tensor] = field(default_factory=dict, repr=False)

    @property
    def residual_channels(self) -> int:
        """The smallest number of channels that a residual must have; 0 where no extractor reads one."""
        return max((entry.residual + entry.residual_channels for entry in self.entries if entry.residual_channels), default=0)

    def table(self, block_n: int) -> Tensor:
        """Return the table for tiles of `block_n` output channels, int32 (rows, len(FIELDS)) on the weights' device; made once.

        An extractor has one row per tile of output channels, all of them equal; `first` is the number of its first row and `count` the
        number of its rows. Input channels are counted in units of `align`, everything else in units of 8.
        """
        if block_n not in self._tables:
            rows: list[tuple[int, ...]] = []
            for entry in self.entries:
                count = -(-entry.outputs // block_n)
                places = (entry.target, entry.weight, entry.residual, entry.residual_channels)
                target, weight, residual, channels = (number // ALIGN for number in places)
                inputs, source = entry.inputs // self.align, entry.source // self.align
                rows += [(len(rows), count, inputs, entry.outputs // ALIGN, source, target, weight, residual, channels)] * count
            self._tables[block_n] = torch.tensor(rows, dtype=torch.int32).to(self.weights.device)
        return self._tables[block_n]

    def weight(self, entry: Entry) -> Tensor:
        """Return an extractor's weight (outputs, inputs, kernel, kernel) with its padding, a view of the flat weights."""
        length = entry.inputs * self.kernel**2
        flat = self.weights[entry.weight : entry.weight + entry.outputs * padded(length)]
        pitch, inputs, side = padded(length), entry.inputs, self.kernel
        strides = (pitch, 1, side * inputs, inputs)
        return flat.as_strided((entry.outputs, inputs, side, side), strides, flat.storage_offset())


def pack_layer(
    parts: Sequence[GroupMember], *, kernel: int, stride: int, relu: bool, inputs: int, dtype: torch.dtype, device: torch.device
) -> GroupedLayer:
    """Copy the weights of all parts into one layer.

    Args:
        parts: in any order; their padded outputs must follow one another without a gap.
        kernel: odd.
        stride: at least 1.
        relu: ReLU last.
        inputs: channels of the input, all extractors together: a multiple of 8, or anything (an image's 3) with one part that starts at 0.
        dtype: of the activations and the packed weights; biases become float32, float64 with float64.
        device: of the layer.

    Raises:
        ValueError: no parts, an unknown dtype, an even kernel, shapes that contradict one another, channels that do not start at a multiple
            of 8 or are outside the input, or outputs that overlap or leave a gap.
    """
    _check_layer(parts, kernel, stride, inputs, dtype)
    image = bool(inputs % ALIGN)
    align = 1 if image else ALIGN
    order = sorted(parts, key=lambda part: (-part.inputs, -part.outputs, part.target))
    sizes = [padded(part.outputs) * padded(kernel**2 * padded(part.inputs, align)) for part in order]
    outputs = sum(padded(part.outputs) for part in parts)
    weights = torch.zeros(sum(sizes), dtype=dtype, device=device)
    bias = torch.zeros(outputs, dtype=accumulator(dtype), device=device)
    entries, offset = [], 0
    for part, size in zip(order, sizes, strict=True):
        wide = (padded(part.inputs, align), padded(part.outputs), part.source, part.target, offset)
        entries.append(Entry(*wide, part.residual, padded(part.residual_channels)))
        offset += size
        if part.bias is not None:
            bias[part.target : part.target + part.outputs] = part.bias.to(bias)
    layer = GroupedLayer(tuple(entries), kernel, stride, relu, inputs, outputs, align, weights, bias)
    for part, entry in zip(order, entries, strict=True):
        if part.weight is not None:
            layer.weight(entry)[: part.outputs, : part.inputs] = part.weight.to(weights)
    return layer


def _check_layer(parts: Sequence[GroupMember], kernel: int, stride: int, inputs: int, dtype: torch.dtype) -> None:
    if not parts:
        raise ValueError("a grouped layer needs at least one part")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}, not {dtype}")
    if kernel < 1 or kernel % 2 == 0 or stride < 1:
        raise ValueError(f"kernel must be odd and stride at least 1, not {kernel} and {stride}")
    if inputs < 1 or (inputs % ALIGN and (len(parts) > 1 or parts[0].source)):
        raise ValueError(f"inputs must be a multiple of {ALIGN} where several parts share them, not {inputs}")
    for number, part in enumerate(parts):
        _check_part(f"part {number}", part, kernel, inputs)
    spans = sorted((part.target, part.target + padded(part.outputs)) for part in parts)
    ends = [0, *(end for _, end in spans)]
    for (begin, _), end in zip(spans, ends, strict=False):
        if begin != end:
            raise ValueError(
                f"the outputs of all parts must follow one another: one starts at channel {begin}, the previous one ends at {end}"
            )


def _check_part(name: str, part: GroupMember, kernel: int, inputs: int) -> None:
    if part.outputs < 1:
        raise ValueError(f"{name}: outputs must be at least 1, not {part.outputs}; leave out a part that writes nothing")
    for what, begin in (("source", part.source), ("target", part.target), ("residual", part.residual)):
        if begin < 0 or begin % ALIGN:
            raise ValueError(f"{name}: {what} must be a multiple of {ALIGN}, not {begin}")
    if not 0 <= part.residual_channels <= part.outputs:
        raise ValueError(f"{name}: residual_channels must lie in [0, {part.outputs}], its outputs; got {part.residual_channels}")
    if part.bias is not None and part.bias.shape != (part.outputs,):
        raise ValueError(f"{name}: bias must have the shape ({part.outputs},), not {tuple(part.bias.shape)}")
    if part.weight is None:
        return
    shape = tuple(part.weight.shape)
    if len(shape) != 4 or shape[0] != part.outputs or shape[1] < 1 or shape[2:] != (kernel, kernel):
        raise ValueError(f"{name}: weight must have the shape ({part.outputs}, inputs, {kernel}, {kernel}), not {shape}")
    align = 1 if inputs % ALIGN else ALIGN
    if part.source + padded(shape[1], align) > inputs:
        raise ValueError(f"{name} reads channels {part.source} to {part.source + padded(shape[1], align)}, but the input has {inputs}")
