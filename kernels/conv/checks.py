"""Refuse, by name, arguments that the convolutions cannot take."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from der_fast.kernels.affine import VECTORS, Affine
from der_fast.kernels.checks import check_backend, check_image, check_vector
from der_fast.kernels.conv.boxes import applies
from der_fast.kernels.conv.join import Join
from der_fast.kernels.conv.launch import ConvTiles
from der_fast.kernels.conv.shape import KERNELS, STRIDES, ConvShape
from der_fast.kernels.device import capability
from der_fast.kernels.dtypes import DTYPES, FUSED_DTYPES, accumulator

# Offsets into a weight and counts of rows, rounded up to tiles, are 32-bit numbers in the kernels; offsets into activations are not.
LARGEST = 2**30


def check_call(backend: str, dtype: torch.dtype, op: str) -> None:
    """Raise ValueError for an unknown backend or a dtype that it does not support."""
    check_backend(op, backend)
    allowed = FUSED_DTYPES if backend == "fused" else DTYPES
    if dtype not in allowed:
        names = ", ".join(str(one) for one in allowed)
        raise ValueError(f"{op}: backend {backend!r} takes {names}, not {dtype}")


def check_affine(name: str, pair: tuple[Tensor, Tensor] | None, channels: int, like: Tensor) -> None:
    """Check scale and shift of a prologue."""
    if pair is not None:
        check_vector(f"{name} scale", pair[0], (channels,), accumulator(like.dtype), like.device)
        check_vector(f"{name} shift", pair[1], (channels,), accumulator(like.dtype), like.device)


def check_g_affine(pair: tuple[Tensor, Tensor] | None, g: Tensor) -> None:
    """Check the coefficients and the second tensor that form the gradient."""
    if pair is not None:
        check_vector("g_affine k", pair[0], (3, g.shape[1]), accumulator(g.dtype), g.device)
        check_image("g_affine y", pair[1], like=g, shape=tuple(g.shape))


def check_epilogue(epilogue: tuple[Tensor, Affine] | None, shape: ConvShape, like: Tensor) -> None:
    """Check the batch-norm whose ReLU and sums are fused into a dgrad."""
    if epilogue is None:
        return
    y_in, affine = epilogue
    check_image("epilogue y_in", y_in, like=like, shape=(shape.batch, shape.channels, shape.height, shape.width))
    for name in VECTORS:
        check_vector(f"epilogue {name}", getattr(affine, name), (shape.channels,), accumulator(like.dtype), like.device)


def check_join(added: Tensor, join: Join, shape: ConvShape, like: Tensor, config: ConvTiles | None) -> None:
    """Check the gradient that is added to a dgrad, the join that it continues through, and its tiles."""
    if config is not None and config.boxed:
        raise ValueError("config: boxed tiles cannot continue through a join; take tiles with boxed=False")
    size = (shape.batch, shape.channels, shape.height, shape.width)
    check_image("added", added, like=like, shape=size)
    for name, pair in (("join", (join.y, join.affine)), ("join shortcut", join.shortcut)):
        if pair is not None:
            check_image(f"{name} y", pair[0], like=like, shape=size)
            for vector in VECTORS:
                check_vector(f"{name} {vector}", getattr(pair[1], vector), (shape.channels,), accumulator(like.dtype), like.device)
    if join.bits is not None:
        check_vector("join bits", join.bits, (shape.in_rows, -(-shape.channels // 8)), torch.uint8, like.device)


def check_weight(weight: Tensor, channels: int | None, filters: int | None, like: Tensor) -> None:
    """Check a weight (K, C, R, R) against the channels of the activation that it is used with."""
    check_image("weight", weight, like=like)
    given = tuple(weight.shape)
    if channels is not None and given[1] != channels:
        raise ValueError(f"weight {given} takes {given[1]} channels, but x has {channels}")
    if filters is not None and given[0] != filters:
        raise ValueError(f"weight {given} produces {given[0]} channels, but g has {filters}")
    if given[2] != given[3] or given[2] not in KERNELS:
        raise ValueError(f"weight {given}: the kernel must be 1×1 or 3×3")


def shape_of(sizes: tuple[int, int, int, int], filters: int, kernel: int, stride: int) -> ConvShape:
    """Return the convolution's shape; raise ValueError for an unsupported kernel or stride, or a shape that is too large."""
    if kernel not in KERNELS:
        raise ValueError(f"kernel must be 1 or 3, not {kernel}")
    if stride not in STRIDES:
        raise ValueError(f"stride must be 1 or 2, not {stride}")
    shape = ConvShape(*sizes, filters, kernel, stride)
    if max(shape.in_rows, shape.taps * shape.channels * filters) > LARGEST:
        raise ValueError(f"{shape} is too large: N·H·W and the number of weights may be at most {LARGEST} each")
    return shape


def check_output(name: str, given: tuple[int, int], shape: ConvShape) -> None:
    """Raise ValueError unless height and width of the output's gradient follow from those of the input."""
    wanted = (shape.out_height, shape.out_width)
    if given != wanted:
        raise ValueError(
            f"{name} has height and width {given}, but an input of {(shape.height, shape.width)} with stride {shape.stride} gives {wanted}"
        )


def check_boxed(direction: str, shape: ConvShape, config: ConvTiles, tensors: Sequence[Tensor], transformed: bool) -> None:
    """Refuse tiles that are loaded by descriptors where they do not apply, and parts of the sum that would not be equal."""
    if direction == "wgrad" or transformed:
        raise ValueError(f"config: boxed tiles are for forward without a prologue and dgrad without a g_affine, not for this {direction}")
    dtype, gpu = tensors[0].dtype, capability(tensors[0].device)
    if not applies(shape, dtype, gpu):
        raise ValueError(
            "config: boxed tiles need stride 1, multiples of 8 channels and filters, bfloat16 or float16 and compute capability 9.0, "
            f"not {shape} in {dtype} on {gpu[0]}.{gpu[1]}"
        )
    depth = shape.channels if direction == "forward" else shape.filters
    steps = shape.taps * -(-depth // config.block_k)
    if steps % config.split:
        raise ValueError(f"config: the sum has {steps} steps, which {config.split} equal parts do not divide")
    if any(tensor.data_ptr() % 16 for tensor in tensors):
        raise ValueError("config: boxed tiles need tensors that begin at a multiple of 16 bytes, not views that begin elsewhere")
