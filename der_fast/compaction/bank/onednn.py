"""A compact extractor on the CPU with oneDNN's fused convolutions: bias, residual and ReLU in the convolution's last step.

The operators are the ones that PyTorch's own compiler emits. Weights are used in place: a copy in oneDNN's blocked format brought no
measurable gain in float32. oneDNN's ReLU turns NaN into zero.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from der_fast.compaction.bank.execute import apply
from der_fast.compaction.program import CONV, FEATURES, IMAGE, Op


@functools.cache
def available(dtype: torch.dtype) -> bool:
    """Whether this PyTorch has the operators and they run `dtype` on this processor; tested with one small convolution."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    op = Op(CONV, FEATURES, IMAGE, 3, 3, residual=IMAGE, relu=True, bias=True)
    weights = {f"{FEATURES}.weight": torch.ones(3, 3, 1, 1, dtype=dtype), f"{FEATURES}.bias": torch.ones(3, dtype=dtype)}
    images = torch.ones(1, 3, 2, 2, dtype=dtype).contiguous(memory_format=torch.channels_last)
    try:
        return bool((_operator(op, weights, {IMAGE: images}) == 5).all())
    except (RuntimeError, AttributeError):
        return False


def execute_fused(ops: Sequence[Op], tensors: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """Return what `execute` returns, up to rounding; images and tensors on the CPU, of one dtype."""
    if not ops:
        return images.new_zeros(images.shape[0], 0)
    values = {IMAGE: images}
    for op in ops:
        values[op.target] = _convolution(op, tensors, values) if op.kind == CONV else apply(op, tensors, values)
    return values[FEATURES]


def _convolution(op: Op, tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Tensor:
    try:
        return _operator(op, tensors, values)
    except RuntimeError:
        # If a shape's memory format is ambiguous (one pixel, one channel), the operator takes a path without the half precisions.
        return apply(op, tensors, values)


def _operator(op: Op, tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Tensor:
    weight, bias = tensors[f"{op.target}.weight"], tensors.get(f"{op.target}.bias")
    where = ([op.kernel // 2] * 2, [op.stride] * 2, [1, 1], 1)
    operator = torch.ops.mkldnn._convolution_pointwise
    out: Tensor
    if op.residual:
        last = "relu" if op.relu else None
        out = operator.binary(values[op.source], values[op.residual], weight, bias, *where, "add", 1.0, last, [], None)
    else:
        out = operator.default(values[op.source], weight, bias, *where, "relu" if op.relu else "none", [], "")
    return out
