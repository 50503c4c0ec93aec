"""Batch-norm × mask (+ residual) + ReLU: forward, backward and evaluation, at the shapes of ResNet-18's stages.

Bytes, with Y = one activation tensor: forward 3Y (statistics read, apply reads and writes), backward 5Y, each plus Y with a residual;
evaluation 2Y and 3Y. The eager rival is the straightforward code of a masked network: F.batch_norm, a product, a sum, F.relu.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness.compiled import compiled
from bench.harness.registry import Case, Run, Setting, Tensors, Variant, Work, drawn, uniform
from bench.subjects.shapes import batches, short, stages
from der_fast.kernels.masked_bn import masked_bn

PARAMETERS = ("weight", "bias", "mask")
Operation = Callable[..., Tensor]


def eager(
    x: Tensor, weight: Tensor, bias: Tensor, mask: Tensor, residual: Tensor | None, mean: Tensor, var: Tensor, training: bool
) -> Tensor:
    """The operation as it is usually written."""
    out = F.batch_norm(x, mean, var, weight, bias, training) * mask.to(x.dtype)[:, None, None]
    return F.relu(out if residual is None else out + residual)


def ours(backend: str) -> Operation:
    """Return der_fast's operation, with the signature of `eager`."""

    def run(
        x: Tensor, weight: Tensor, bias: Tensor, mask: Tensor, residual: Tensor | None, mean: Tensor, var: Tensor, training: bool
    ) -> Tensor:
        return masked_bn(
            x,
            weight,
            bias,
            mean,
            var,
            mask=mask,
            residual=residual,
            relu=True,
            training=training,
            momentum=0.1,
            eps=1e-5,
            backend=backend,
        )

    return run


def forward(operation: Operation, inputs: Tensors, dtype: torch.dtype, channels_last: bool, training: bool) -> Run:
    """Return the forward pass on cast inputs."""
    x, residual, parameters, moments = _cast(inputs, dtype, channels_last)

    def run() -> Tensors:
        with torch.no_grad():
            return {"a": operation(x, *parameters, residual, *moments, training)}

    return run


def backward(operation: Operation, inputs: Tensors, dtype: torch.dtype, channels_last: bool) -> Run:
    """Return the backward pass alone; the forward pass runs here."""
    x, residual, parameters, moments = _cast(inputs, dtype, channels_last)
    gradient = _layout(inputs["g"], dtype, channels_last)
    leaves = {"dx": x, "dweight": parameters[0], "dbias": parameters[1], "dmask": parameters[2]}
    if residual is not None:
        leaves["dresidual"] = residual
    for leaf in leaves.values():
        leaf.requires_grad_(True)
    out = operation(x, *parameters, residual, *moments, True)

    def run() -> Tensors:
        found = torch.autograd.grad(out, list(leaves.values()), gradient, retain_graph=True)
        return dict(zip(leaves, found, strict=True))

    return run


def _layout(tensor: Tensor, dtype: torch.dtype, channels_last: bool) -> Tensor:
    format = torch.channels_last if channels_last else torch.contiguous_format
    return tensor.detach().to(dtype, copy=True).contiguous(memory_format=format)


def _cast(inputs: Tensors, dtype: torch.dtype, channels_last: bool) -> tuple[Tensor, Tensor | None, list[Tensor], list[Tensor]]:
    x = _layout(inputs["x"], dtype, channels_last)
    residual = _layout(inputs["residual"], dtype, channels_last) if "residual" in inputs else None
    vectors = torch.float64 if dtype == torch.float64 else torch.float32
    parameters = [inputs[name].detach().to(vectors, copy=True) for name in PARAMETERS]
    moments = [inputs[name].to(vectors, copy=True) for name in ("mean", "var")]
    return x, residual, parameters, moments


def _variants(setting: Setting, compiles: bool, make: Callable[[Operation, Tensors, torch.dtype, bool], Run]) -> tuple[Variant, ...]:
    found = []
    for dtype, channels_last in ((torch.float32, False), (torch.bfloat16, True), (torch.float16, True)):
        note = "channels-last" if channels_last else "contiguous"
        found.append(Variant(f"eager_{short(dtype)}", dtype, lambda i, d=dtype, c=channels_last: make(eager, i, d, c), True, note=note))
    if compiles:
        once = compiled(eager, setting)
        found.append(Variant("compile", torch.bfloat16, lambda inputs: make(once, inputs, torch.bfloat16, True), note="max-autotune"))
    for name, dtype in (("ours", torch.bfloat16), ("ours_fp16", torch.float16), ("ours_fp32", torch.float32)):
        found.append(Variant(name, dtype, lambda i, d=dtype: make(ours(setting.backend), i, d, True), deterministic=True))
    return tuple(found)


def _case(setting: Setting, what: str, batch: int, stage: int, residual: bool) -> Case:
    channels, side = stages(setting)[stage]

    def inputs(generator: torch.Generator) -> Tensors:
        shape = (batch, channels, side, side)
        tensors = {"x": drawn(generator, *shape, shift=0.5), "g": drawn(generator, *shape)}
        if residual:
            tensors["residual"] = drawn(generator, *shape)
        tensors |= {"weight": drawn(generator, channels, scale=0.2, shift=1.0), "bias": drawn(generator, channels, scale=0.2)}
        tensors |= {"mask": uniform(generator, channels)}
        tensors |= {"mean": drawn(generator, channels, scale=0.2, shift=0.5), "var": torch.full((channels,), 1.25)}
        return {name: tensor.to(setting.device) for name, tensor in tensors.items()}

    def make(operation: Operation, tensors: Tensors, dtype: torch.dtype, channels_last: bool) -> Run:
        if what == "backward":
            return backward(operation, tensors, dtype, channels_last)
        return forward(operation, tensors, dtype, channels_last, what == "forward")

    def work(dtype: torch.dtype) -> Work:
        passes = {"forward": 3, "backward": 5, "eval": 2}[what] + residual
        return Work(bytes=float(passes * batch * channels * side**2 * dtype.itemsize), images=batch)

    # Each compilation takes seconds, so one stage represents all.
    compiles = stage == 1
    params = {"stage": stage, "batch": batch, "residual": "yes" if residual else "no"}
    return Case(
        f"masked_bn.{what}", params, inputs, lambda i: make(eager, i, torch.float64, False)(), _variants(setting, compiles, make), work
    )


def cases(setting: Setting) -> list[Case]:
    """Return the group."""
    every = [
        _case(setting, what, batch, stage, residual)
        for what in ("forward", "backward", "eval")
        for batch in batches(setting)
        for stage in stages(setting)
        for residual in (False, True)
    ]
    # Where speed matters, evaluation folds batch-norm into the convolution, so the first stage represents all.
    return [case for case in every if case.name != "masked_bn.eval" or case.params["stage"] == 1]
