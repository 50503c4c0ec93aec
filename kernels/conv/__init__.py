"""3×3 and 1×1 convolutions for NHWC, fused with their neighbours: batch-norm's affine map and ReLU on load, its sums on store."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from der_fast.kernels import triton_runtime
from der_fast.kernels.affine import Affine
from der_fast.kernels.checks import check_image
from der_fast.kernels.conv import checks
from der_fast.kernels.conv.join import Join
from der_fast.kernels.conv.launch import MOST_PARTS, ConvTiles, candidates, default_config, default_split, likely
from der_fast.kernels.conv.parts import Parts
from der_fast.kernels.conv.reference import (
    conv_dgrad_joined_reference,
    conv_dgrad_reference,
    conv_forward_reference,
    conv_wgrad_reference,
)
from der_fast.kernels.conv.shape import ConvShape
from der_fast.kernels.device import multiprocessors

__all__ = [
    "Affine",
    "ConvShape",
    "ConvTiles",
    "Join",
    "Parts",
    "add_parts",
    "candidates",
    "conv_dgrad",
    "conv_dgrad_joined",
    "conv_forward",
    "conv_wgrad",
    "default_config",
    "default_split",
    "likely",
]


def conv_forward(
    x: Tensor,
    weight: Tensor,
    *,
    stride: int,
    prologue: tuple[Tensor, Tensor] | None,
    statistics: bool,
    config: ConvTiles | None = None,
    backend: str = "reference",
) -> tuple[Tensor, Tensor | None]:
    """Convolve with padding R // 2: y = conv(a, weight).

    Returns y (N, K, H', W') in x's dtype, channels_last, and with `statistics` the partials (P, 3, K) float32: count, mean and
    Σ(y − mean)² of every block of rows of y as stored (rounded), to be merged in the order of P.

    Args:
        x: (N, C, H, W) channels_last, bfloat16, float16 or float32 (the reference also float64).
        weight: (K, C, R, R), R in 1, 3, channels_last strides, x's dtype.
        stride: 1 or 2.
        prologue: (scale, shift), each (C,) float32: a = ReLU(x·scale + shift), rounded to x's dtype, zero outside the image; None: a = x.
        statistics: also return the partials.
        config: tiles of the fused kernel; None for the default of the shape.
        backend: 'reference' or 'fused'.

    Raises:
        ValueError: an argument does not fit; the message names it.
        BackendError: 'fused' does not run here.
    """
    checks.check_call(backend, x.dtype, "conv_forward")
    check_image("x", x)
    checks.check_weight(weight, x.shape[1], None, x)
    batch, channels, height, width = x.shape
    shape = checks.shape_of((batch, channels, height, width), weight.shape[0], weight.shape[2], stride)
    checks.check_affine("prologue", prologue, channels, x)
    if backend == "reference":
        return conv_forward_reference(x, weight, stride=stride, prologue=prologue, statistics=statistics)
    triton_runtime.require(x.device, "conv_forward")
    from der_fast.kernels.conv.triton_forward import forward

    transformed, count = prologue is not None, multiprocessors(x.device)
    chosen = config or default_config("forward", shape, x.dtype, transformed=transformed, processors=count)
    if chosen.boxed:
        checks.check_boxed("forward", shape, chosen, (x, weight), transformed)
        from der_fast.kernels.conv import triton_descriptor

        return triton_descriptor.forward(x, weight, shape, chosen, statistics=statistics)
    return forward(x, weight, shape, chosen, prologue=prologue, statistics=statistics)


def conv_dgrad(
    g: Tensor,
    weight: Tensor,
    input_hw: tuple[int, int],
    *,
    stride: int,
    g_affine: tuple[Tensor, Tensor] | None,
    epilogue: tuple[Tensor, Affine] | None,
    config: ConvTiles | None = None,
    backend: str = "reference",
) -> tuple[Tensor, Tensor | None]:
    """Gradient of a convolution's input.

    Returns dx (N, C, H, W) in g's dtype, channels_last, and None; with `epilogue`, g_z = dx·1[not y_in·scale + shift ≤ 0] and the partials
    (P, 2, C) float32 of S1 = Σ g_z and S2 = Σ g_z·x̂ with x̂ = (y_in − mean)·rstd, to be summed in the order of P.

    Args:
        g: (N, K, H', W') gradient of the convolution's output, channels_last.
        weight: (K, C, R, R) in g's dtype, channels_last strides.
        input_hw: H and W of the convolution's input.
        stride: of the convolution, 1 or 2.
        g_affine: (k, y) with k (3, K) float32 and y like g: the gradient is k0·g + k1·y + k2, rounded to g's dtype; None: g itself.
        epilogue: (y_in, affine): y_in (N, C, H, W) like dx, and the batch-norm that turned it into the convolution's input.
        config: tiles of the fused kernel; None for the default of the shape.
        backend: 'reference' or 'fused'.

    Raises:
        ValueError: an argument does not fit; the message names it.
        BackendError: 'fused' does not run here.
    """
    checks.check_call(backend, g.dtype, "conv_dgrad")
    check_image("g", g)
    checks.check_weight(weight, None, g.shape[1], g)
    batch, filters, out_height, out_width = g.shape
    shape = checks.shape_of((batch, weight.shape[1], *input_hw), filters, weight.shape[2], stride)
    checks.check_output("g", (out_height, out_width), shape)
    checks.check_g_affine(g_affine, g)
    checks.check_epilogue(epilogue, shape, g)
    if backend == "reference":
        return conv_dgrad_reference(g, weight, input_hw, stride=stride, g_affine=g_affine, epilogue=epilogue)
    triton_runtime.require(g.device, "conv_dgrad")
    from der_fast.kernels.conv.triton_dgrad import dgrad

    transformed, count = g_affine is not None, multiprocessors(g.device)
    chosen = config or default_config("dgrad", shape, g.dtype, transformed=transformed, processors=count)
    if chosen.boxed:
        given = (g, weight) if epilogue is None else (g, weight, epilogue[0])
        checks.check_boxed("dgrad", shape, chosen, given, transformed)
        from der_fast.kernels.conv import triton_descriptor

        return triton_descriptor.dgrad(g, weight, shape, chosen, epilogue=epilogue)
    join = None if epilogue is None else Join(*epilogue)
    dx, sums, _ = dgrad(g, weight, shape, chosen, g_affine=g_affine, added=None, join=join)
    return dx, sums


def conv_dgrad_joined(
    g: Tensor,
    weight: Tensor,
    input_hw: tuple[int, int],
    *,
    stride: int,
    g_affine: tuple[Tensor, Tensor] | None,
    added: Tensor,
    join: Join,
    config: ConvTiles | None = None,
    backend: str = "reference",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradient of a convolution's input, continued through the join that made this input: g_z = (dx + added)·1[its ReLU passed].

    Returns g_z (N, C, H, W) in g's dtype, channels_last; the partials (P, 2, C) float32 of S1 = Σ g_z and S2 = Σ g_z·x̂ with the join's
    batch-norm, to be summed in the order of P; and the same with the batch-norm of the join's shortcut, or None.

    Args:
        g, weight, input_hw, stride, g_affine, config, backend: as in `conv_dgrad`.
        added: (N, C, H, W) the gradient of the input that comes from elsewhere, like dx; it is added before anything is rounded.
        join: what made the input.

    Raises:
        ValueError: an argument does not fit; the message names it.
        BackendError: 'fused' does not run here.
    """
    checks.check_call(backend, g.dtype, "conv_dgrad_joined")
    check_image("g", g)
    checks.check_weight(weight, None, g.shape[1], g)
    batch, filters, out_height, out_width = g.shape
    shape = checks.shape_of((batch, weight.shape[1], *input_hw), filters, weight.shape[2], stride)
    checks.check_output("g", (out_height, out_width), shape)
    checks.check_g_affine(g_affine, g)
    checks.check_join(added, join, shape, g, config)
    if backend == "reference":
        return conv_dgrad_joined_reference(g, weight, input_hw, stride=stride, g_affine=g_affine, added=added, join=join)
    triton_runtime.require(g.device, "conv_dgrad_joined")
    from der_fast.kernels.conv.triton_dgrad import dgrad

    transformed, count = g_affine is not None, multiprocessors(g.device)
    chosen = config or default_config("dgrad", shape, g.dtype, transformed=transformed, processors=count)
    dx, sums, shortcut_sums = dgrad(g, weight, shape, chosen, g_affine=g_affine, added=added, join=join)
    assert sums is not None
    return dx, sums, shortcut_sums


def conv_wgrad(
    x: Tensor,
    g: Tensor,
    kernel: int,
    *,
    stride: int,
    prologue: tuple[Tensor, Tensor] | None = None,
    g_affine: tuple[Tensor, Tensor] | None = None,
    split: int | None = None,
    config: ConvTiles | None = None,
    pending: list[Parts] | None = None,
    backend: str = "reference",
) -> Tensor:
    """Gradient of a convolution's weight, (K, C, R, R) float32 with channels_last strides; the same bits on every run.

    Args:
        x: (N, C, H, W) the convolution's input before the prologue, channels_last.
        g: (N, K, H', W') gradient of its output, channels_last, x's dtype.
        kernel: R, 1 or 3.
        stride: 1 or 2.
        prologue: as in `conv_forward`.
        g_affine: as in `conv_dgrad`.
        split: how many parts the fused kernel cuts the sum over N·H'·W' into; None for the default of the shape.
        config: tiles of the fused kernel; None for the default of the shape.
        pending: parts that are still to be added are appended to it. The result is written when the caller passes it to `add_parts`.
        backend: 'reference' or 'fused'.

    Raises:
        ValueError: an argument does not fit; the message names it.
        BackendError: 'fused' does not run here.
    """
    checks.check_call(backend, x.dtype, "conv_wgrad")
    check_image("x", x)
    check_image("g", g, like=x)
    batch, channels, height, width = x.shape
    shape = checks.shape_of((batch, channels, height, width), g.shape[1], kernel, stride)
    if g.shape[0] != batch:
        raise ValueError(f"g has batch size {g.shape[0]}, x has {batch}")
    checks.check_output("g", (g.shape[2], g.shape[3]), shape)
    checks.check_affine("prologue", prologue, channels, x)
    checks.check_g_affine(g_affine, g)
    if split is not None and not 1 <= split <= MOST_PARTS:
        raise ValueError(f"split must be from 1 to {MOST_PARTS}, not {split}")
    if backend == "reference":
        return conv_wgrad_reference(x, g, kernel, stride=stride, prologue=prologue, g_affine=g_affine)
    triton_runtime.require(x.device, "conv_wgrad")
    from der_fast.kernels.conv.triton_wgrad import wgrad

    transformed, count = prologue is not None or g_affine is not None, multiprocessors(x.device)
    chosen = config or default_config("wgrad", shape, x.dtype, transformed=transformed, processors=count)
    if chosen.boxed:
        checks.check_boxed("wgrad", shape, chosen, (x, g), transformed)
    parts = split or default_split(shape, chosen, count, transformed=transformed)
    out, unsummed = wgrad(x, g, shape, chosen, parts, prologue=prologue, g_affine=g_affine)
    later = [] if unsummed is None else [Parts(unsummed, out)]
    if pending is None:
        add_parts(later)
    else:
        pending += later
    return out


def add_parts(pending: Sequence[Parts]) -> None:
    """Write the sums of all parts that `conv_wgrad` left pending, in their order; four weight gradients share a launch."""
    if pending:
        from der_fast.kernels.conv import triton_parts

        for start in range(0, len(pending), triton_parts.MOST):
            triton_parts.add(pending[start : start + triton_parts.MOST])
