"""All frozen extractors of one backbone as one program: every layer is one launch, however many extractors there are.

Activations of all extractors lie side by side in the channels of one tensor. The stems read the same image, so they are one
convolution; every later layer is one ragged grouped convolution (`der_fast.kernels.grouped_conv`). The remainder of a lost branch, a bias
on the shortcut, runs in the launch of the convolution that it replaces; a shortcut is widened as the residual is read; the last layer's
launch also takes the mean. Weights are copied once, in the dtype of the computation; biases stay in float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from der_fast.compaction.arena import Arena
from der_fast.compaction.program import AFFINE, CONV, IMAGE, MEAN, POOL, WIDEN, Op, program
from der_fast.kernels import triton_runtime
from der_fast.kernels.dtypes import FUSED_DTYPES
from der_fast.kernels.grouped_conv import GroupedLayer, GroupMember, grouped_conv, pack_layer, padded
from der_fast.model.architecture import IMAGE_CHANNELS


def reason_against(arenas: Sequence[Arena], dtypes: Sequence[torch.dtype]) -> str:
    """Return why extractors cannot run as one program; '' if they can.

    Args:
        arenas: their weights.
        dtypes: the dtype that each computes in.
    """
    live = [arena for arena in arenas if arena.ops]
    if not live:
        return "no extractor has anything left to run"
    names = sorted({arena.architecture.name for arena in live})
    if any(arena.architecture != live[0].architecture for arena in live):
        return f"they have different backbones ({', '.join(names)})" if len(names) > 1 else f"their {names[0]} have different full widths"
    if len(set(dtypes)) > 1 or dtypes[0] not in FUSED_DTYPES:
        kinds = sorted({str(dtype).removeprefix("torch.") for dtype in dtypes})
        return f"they compute in {' and '.join(kinds)}, not all in one of float32, bfloat16 or float16"
    if any(op.kind == AFFINE for op in _template(live[0])):
        return f"{names[0]} has batch-norm before its convolutions, which the grouped kernel does not compute"
    device = live[0].storage.device
    if any(arena.storage.device != device for arena in live):
        return "their weights lie on different devices"
    works, reason = triton_runtime.usable(device)
    return "" if works else reason


def _template(arena: Arena) -> tuple[Op, ...]:
    """The operations of the full network: every extractor of the backbone has some of them, under the same names."""
    return program(arena.architecture, arena.architecture.groups)


@dataclass(frozen=True)
class _Value:
    """Where every extractor's channels lie in a tensor: widths without padding, 0 for an extractor without any there."""

    widths: tuple[int, ...]

    @property
    def begins(self) -> tuple[int, ...]:
        ends = [0]
        for width in self.widths:
            ends.append(ends[-1] + padded(width))
        return tuple(ends[:-1])

    @property
    def channels(self) -> int:
        return sum(padded(width) for width in self.widths)


@dataclass(frozen=True)
class _LayerLaunch:
    """One launch; `layer` is None for the max-pooling. `done` are the values that nothing reads afterwards."""

    target: str
    source: str
    layer: GroupedLayer | None
    residual: str = ""
    residual_stride: int = 1
    mean: bool = False
    done: tuple[str, ...] = ()


class GroupedProgram:
    """Runs extractors of one backbone together, one launch per layer.

    Args:
        arenas: their weights, on one device; one with nothing left contributes no feature. `reason_against` must return '' for them.
        dtype: of weights and activations; sums are float32.
        backend: 'fused', or 'reference' (which has float64, too).

    Attributes:
        launches: kernels that one run starts, without the conversion of the images and the selection of the features.
        nbytes: size of the copied weights.
    """

    def __init__(self, arenas: Sequence[Arena], dtype: torch.dtype, *, backend: str = "fused") -> None:
        self.dtype, self.backend = dtype, backend
        live = [arena for arena in arenas if arena.ops]
        builder = _LaunchBuilder(live, dtype)
        self.steps = builder.build()
        self._index = builder.features()
        self.launches = len(self.steps)
        layers = [step.layer for step in self.steps if step.layer is not None]
        self.nbytes = sum(layer.weights.nbytes + layer.bias.nbytes for layer in layers)

    def __call__(self, images: Tensor) -> Tensor:
        """Return the features (N, Σ F_i) of images (N, 3, H, W) of any dtype and strides, extractor after extractor.

        They are float32, the dtype that the means are summed in (float64 with float64).
        """
        # cuDNN rounds float32 to TF32 unless that is switched off; the same switch applies here.
        tf32 = self.dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
        values = {IMAGE: images.detach().to(self.dtype).contiguous(memory_format=torch.channels_last)}
        for step in self.steps:
            x = values[step.source]
            if step.layer is None:
                values[step.target] = F.max_pool2d(x, 3, 2, 1).contiguous(memory_format=torch.channels_last)
            else:
                values[step.target] = grouped_conv(
                    x,
                    step.layer,
                    residual=values[step.residual] if step.residual else None,
                    residual_stride=step.residual_stride,
                    pool=step.mean,
                    tf32=tf32,
                    backend=self.backend,
                )
            for name in step.done:
                del values[name]
        features = values[self.steps[-1].target]
        return features if self._index is None else features.index_select(1, self._index)


class _LaunchBuilder:
    def __init__(self, arenas: Sequence[Arena], dtype: torch.dtype) -> None:
        self.arenas, self.dtype = arenas, dtype
        self.device = arenas[0].storage.device
        self.ops = [{op.target: op for op in arena.ops} for arena in arenas]
        self.tensors = [arena.tensors() for arena in arenas]
        self.values = {IMAGE: _Value((IMAGE_CHANNELS,))}
        # A widened value is another value, read with a stride.
        self.views: dict[str, tuple[str, int]] = {}
        self.steps: list[_LayerLaunch] = []

    def build(self) -> list[_LayerLaunch]:
        """Return the launches in order, from the full network's operations."""
        for op in _template(self.arenas[0]):
            if op.kind == CONV:
                self._conv(op)
            elif op.kind == POOL:
                self.values[op.target] = self.values[op.source]
                self.steps.append(_LayerLaunch(op.target, op.source, None))
            elif op.kind == WIDEN:
                self.views[op.target] = op.source, op.stride
            else:
                assert op.kind == MEAN and op.source == self.steps[-1].target, "the mean follows the last convolution"
                self.steps[-1] = replace(self.steps[-1], mean=True)
        return _with_ends(self.steps)

    def features(self) -> Tensor | None:
        """Return the positions of the true features in the last launch's result; None if it holds nothing else."""
        last = self.values[self.steps[-1].target]
        parts = []
        for arena, begin in zip(self.arenas, last.begins, strict=True):
            index = arena.feature_index
            parts.append(begin + (torch.arange(arena.features) if index is None else index.cpu()))
        index = torch.cat(parts)
        return None if len(index) == last.channels else index.to(self.device)

    def _conv(self, op: Op) -> None:
        there = [ops.get(op.target) for ops in self.ops]
        value = _Value(tuple(found.outputs if found else 0 for found in there))
        self.values[op.target] = value
        if not value.channels:
            return
        residual, stride = self.views.get(op.residual, (op.residual, 1))
        if op.source == IMAGE:
            parts = [self._stem(value, op)]
        else:
            parts = [self._part(index, found, value, op, residual) for index, found in enumerate(there) if found]
        kernel, step, source = op.kernel, op.stride, op.source
        if not self.values[source].channels:
            # Every extractor lost this branch: only bias and shortcut are left, and the shortcut's size is the result's.
            kernel, step, source = 1, stride, residual
        channels = IMAGE_CHANNELS if source == IMAGE else self.values[source].channels
        layer = pack_layer(parts, kernel=kernel, stride=step, relu=op.relu, inputs=channels, dtype=self.dtype, device=self.device)
        self.steps.append(_LayerLaunch(op.target, source, layer, residual, stride))

    def _part(self, index: int, found: Op, value: _Value, op: Op, residual: str) -> GroupMember:
        tensors: Mapping[str, Tensor] = self.tensors[index]
        conv = found.kind == CONV
        assert (found.source, found.residual) == (op.source, op.residual) if conv else found.source == op.residual
        weight = tensors[f"{op.target}.weight"] if conv else None
        bias = tensors.get(f"{op.target}.bias")
        source = self.values[op.source].begins[index] if conv else 0
        place = (source, value.begins[index], found.outputs)
        if not residual:
            return GroupMember(weight, bias, *place)
        added = self.values[residual]
        return GroupMember(weight, bias, *place, added.begins[index], added.widths[index])

    def _stem(self, value: _Value, op: Op) -> GroupMember:
        """One dense convolution: all extractors read the same image."""
        weight = torch.zeros(value.channels, op.inputs, op.kernel, op.kernel, dtype=torch.float64, device=self.device)
        bias = torch.zeros(value.channels, dtype=torch.float64, device=self.device)
        for tensors, begin, width in zip(self.tensors, value.begins, value.widths, strict=True):
            weight[begin : begin + width] = tensors[f"{op.target}.weight"]
            bias[begin : begin + width] = tensors[f"{op.target}.bias"]
        return GroupMember(weight, bias, 0, 0, value.channels)


def _with_ends(steps: Sequence[_LayerLaunch]) -> list[_LayerLaunch]:
    """Add to every step the values that it is the last to read, so that their memory is free for the next one."""
    last: dict[str, int] = {}
    for number, step in enumerate(steps):
        for name in (step.source, step.residual):
            if name:
                last[name] = number
    return [replace(step, done=tuple(name for name, end in last.items() if end == number)) for number, step in enumerate(steps)]
