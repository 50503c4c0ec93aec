"""A compact extractor's operations in plain PyTorch: the definition of correct, and what runs if nothing faster is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor

from der_fast.compaction.program import AFFINE, BIAS, CONV, FEATURES, IMAGE, MEAN, POOL, WIDEN, Op


def execute(ops: Sequence[Op], tensors: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """Return the features (N, F) of images (N, 3, H, W); (N, 0) if there are no operations.

    Args:
        ops: the program.
        tensors: the folded weights by name, of the images' dtype.
        images: in any memory format.
    """
    if not ops:
        return images.new_zeros(images.shape[0], 0)
    values = {IMAGE: images}
    for op in ops:
        values[op.target] = apply(op, tensors, values)
    return values[FEATURES]


def apply(op: Op, tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Tensor:
    """Return the value that one operation writes, from the values before it."""
    x, name = values[op.source], op.target
    if op.kind == CONV:
        x = F.conv2d(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"), op.stride, op.kernel // 2)
    elif op.kind == BIAS:
        x = x + tensors[f"{name}.bias"][:, None, None]
    elif op.kind == AFFINE:
        x = x * tensors[f"{name}.scale"][:, None, None] + tensors[f"{name}.shift"][:, None, None]
    elif op.kind == POOL:
        x = F.max_pool2d(x, 3, 2, 1)
    elif op.kind == WIDEN:
        x = F.pad(x[:, :, :: op.stride, :: op.stride], (0, 0, 0, 0, 0, op.outputs - op.inputs))
    elif op.kind == MEAN:
        return x.mean((2, 3))
    if op.residual:
        x = x + values[op.residual]
    return x.relu() if op.relu else x
