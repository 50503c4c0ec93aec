"""One convolution in each direction: cuDNN as PyTorch calls it (benchmark mode) against der_fast's kernel, with nothing fused.

cuDNN's weight gradient has 16 bits, der_fast's has 32: the cast to float32 that a training step adds to cuDNN's is not counted here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness.compiled import compiled
from bench.harness.registry import Case, Run, Setting, Tensors, Variant, Work, drawn, image_like
from bench.subjects.shapes import ConvLayer, batches, layers, short
from der_fast.kernels.conv import conv_dgrad, conv_forward, conv_wgrad
from der_fast.kernels.conv.launch import DIRECTIONS

Operation = Callable[[Tensor, Tensor, Tensor], Tensor]


def cudnn(layer: ConvLayer, direction: str) -> Operation:
    """Return PyTorch's operation of (x, weight, g)."""
    stride, padding = layer.stride, layer.kernel // 2

    def run(x: Tensor, weight: Tensor, g: Tensor) -> Tensor:
        if direction == "forward":
            return F.conv2d(x, weight, None, stride, padding)
        wanted = [direction == "dgrad", direction == "wgrad", False]
        both = torch.ops.aten.convolution_backward(g, x, weight, None, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1, wanted)
        found: Tensor = both[0] if direction == "dgrad" else both[1]
        return found

    return run


def ours(layer: ConvLayer, direction: str, backend: str) -> Operation:
    """Return der_fast's operation of (x, weight, g)."""

    def run(x: Tensor, weight: Tensor, g: Tensor) -> Tensor:
        if direction == "forward":
            return conv_forward(x, weight, stride=layer.stride, prologue=None, statistics=False, backend=backend)[0]
        if direction == "dgrad":
            size = (layer.side, layer.side)
            return conv_dgrad(g, weight, size, stride=layer.stride, g_affine=None, epilogue=None, backend=backend)[0]
        return conv_wgrad(x, g, layer.kernel, stride=layer.stride, backend=backend)

    return run


def _case(setting: Setting, layer: ConvLayer, direction: str, batch: int) -> Case:
    def inputs(generator: torch.Generator) -> Tensors:
        fan = layer.inputs * layer.kernel**2
        tensors = {
            "x": drawn(generator, batch, layer.inputs, layer.side, layer.side),
            "weight": drawn(generator, layer.outputs, layer.inputs, layer.kernel, layer.kernel, scale=fan**-0.5),
            "g": drawn(generator, batch, layer.outputs, layer.out_side, layer.out_side),
        }
        return {name: tensor.to(setting.device) for name, tensor in tensors.items()}

    def make(operation: Operation, tensors: Tensors, dtype: torch.dtype, channels_last: bool = True) -> Run:
        if channels_last:
            cast = [image_like(tensors[name], setting.device, dtype) for name in ("x", "weight", "g")]
        else:
            cast = [tensors[name].to(dtype) for name in ("x", "weight", "g")]

        def run() -> Tensors:
            with torch.no_grad():
                return {direction: operation(*cast)}

        return run

    library = cudnn(layer, direction)
    variants = [
        Variant("eager_fp32", torch.float32, lambda i: make(library, i, torch.float32, False), True, note="cuDNN, contiguous"),
        *(
            Variant(f"eager_{short(d)}", d, lambda i, d=d: make(library, i, d), True, note="cuDNN, channels-last")
            for d in (torch.bfloat16, torch.float16)
        ),
    ]
    if setting.scale != "quick" and direction == "forward" and layer.name.startswith("stage") and batch == min(batches(setting)):
        once = compiled(library, setting)
        variants.append(Variant("compile", torch.bfloat16, lambda i: make(once, i, torch.bfloat16), note="max-autotune"))
    for name, dtype in (("ours", torch.bfloat16), ("ours_fp16", torch.float16)):
        own = ours(layer, direction, setting.backend)
        variants.append(Variant(name, dtype, lambda i, d=dtype, o=own: make(o, i, d), deterministic=True))

    def work(dtype: torch.dtype) -> Work:
        return Work(layer.bytes(batch, dtype.itemsize), layer.flops(batch), batch)

    # PyTorch's own setting lets cuDNN round float32 operands to TF32.
    floors = {torch.float32: 1e-3} if setting.cuda else {}
    params = {"layer": layer.name, "batch": batch}
    return Case(
        f"conv.{direction}", params, inputs, lambda i: make(library, i, torch.float64, False)(), tuple(variants), work, floors=floors
    )


def cases(setting: Setting) -> list[Case]:
    """Return the group; the image needs no gradient."""
    return [
        _case(setting, layer, direction, batch)
        for direction in DIRECTIONS
        for batch in batches(setting)
        for layer in layers(setting)
        if not (layer.name == "stem" and direction == "dgrad")
    ]
