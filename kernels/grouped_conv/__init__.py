"""One layer of all frozen extractors in one launch: a ragged grouped convolution with bias, residual, ReLU and pooling.

The public function is `grouped_conv`, which runs a layer made by `pack_layer`. `reference.py` defines what it computes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from der_fast.kernels import triton_runtime
from der_fast.kernels.checks import check_backend, check_image
from der_fast.kernels.grouped_conv.launch import GroupedTiles, default_config
from der_fast.kernels.grouped_conv.layer import ALIGN, GroupedLayer, GroupMember, pack_layer, padded
from der_fast.kernels.grouped_conv.reference import grouped_conv_reference

__all__ = [
    "GroupMember",
    "GroupedLayer",
    "GroupedTiles",
    "default_config",
    "grouped_conv",
    "grouped_conv_reference",
    "pack_layer",
    "padded",
]


def grouped_conv(
    x: Tensor,
    layer: GroupedLayer,
    *,
    residual: Tensor | None = None,
    residual_stride: int = 1,
    pool: bool = False,
    tf32: bool = False,
    config: GroupedTiles | None = None,
    backend: str = "reference",
) -> Tensor:
    """Run one layer of every extractor; the formula is in `reference.py`.

    Args:
        x: (N, layer.inputs, H, W) with channels-last strides and the layer's dtype. Padded channels must be exact zeros.
        layer: made by `pack_layer`.
        residual: (N, channels, H″, W″) likewise, added before the ReLU; its padded channels must be exact zeros too.
        residual_stride: only every residual_stride-th row and column of the residual is read, so that ⌈H″ / residual_stride⌉ = H′.
        pool: return the mean over height and width instead of the activations.
        tf32: float32 products may be rounded to TF32 by the fused kernel; nothing else is affected.
        config: tile sizes of the fused kernel; default: `default_config`.
        backend: 'reference' or 'fused'.

    Returns:
        (N, layer.outputs, H′, W′) with channels-last strides and the dtype of x, H′ = ⌈H / stride⌉, padded channels exact zeros; with
        `pool` (N, layer.outputs) in float32 (float64 with float64).

    Raises:
        ValueError: a wrong dtype, device, memory layout or shape; an empty batch; a residual that is missing or unused; float64 or an
            activation of 2³¹ pixels with backend 'fused'; an unknown backend.
        BackendError: 'fused' does not run on this device.
    """
    check_backend("grouped_conv", backend)
    check_image("x", x, like=layer.weights)
    if x.shape[1] != layer.inputs:
        raise ValueError(f"x must have the layer's {layer.inputs} channels, not {x.shape[1]}")
    _check_residual(x, layer, residual, residual_stride)
    if backend == "reference":
        return grouped_conv_reference(x, layer, residual=residual, residual_stride=residual_stride, pool=pool)
    triton_runtime.require(x.device, "grouped_conv")
    if x.dtype == torch.float64:
        raise ValueError("backend 'fused' has no float64: use backend 'reference'")
    from der_fast.kernels.grouped_conv.triton_forward import grouped_conv_fused

    return grouped_conv_fused(x, layer, residual, residual_stride, pool, tf32, config)


def _check_residual(x: Tensor, layer: GroupedLayer, residual: Tensor | None, stride: int) -> None:
    if (residual is None) != (layer.residual_channels == 0):
        raise ValueError(f"the layer {'has no' if residual is not None else 'needs a'} residual")
    if residual is None:
        return
    check_image("residual", residual, like=layer.weights)
    if stride < 1:
        raise ValueError(f"residual_stride must be at least 1, not {stride}")
    out = [-(-side // layer.stride) for side in x.shape[2:]]
    read = [-(-side // stride) for side in residual.shape[2:]]
    if residual.shape[0] != x.shape[0] or read != out:
        raise ValueError(
            f"residual must have {x.shape[0]} images of which every {stride}th row and column make {out[0]} × {out[1]}; "
            f"got {residual.shape[0]} of {residual.shape[2]} × {residual.shape[3]}"
        )
    if residual.shape[1] < layer.residual_channels or residual.shape[1] % ALIGN:
        raise ValueError(f"residual must have at least {layer.residual_channels} channels, a multiple of {ALIGN}, not {residual.shape[1]}")
