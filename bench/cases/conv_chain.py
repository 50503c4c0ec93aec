"""A residual block as one chain: conv, batch-norm × mask, ReLU, conv, batch-norm × mask, + identity, ReLU; forward, and both passes.

eager            cuDNN convolutions, eager batch-norm, product, sum and ReLU
cudnn_masked_bn  cuDNN convolutions with der_fast's `masked_bn` between them
ours             der_fast's convolutions: statistics in the first one's epilogue, its batch-norm and ReLU in the second's prologue,
                 batch-norm's backward on load, ReLU's backward and the sums of the next batch-norm on store
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import masked_bn as norm
from bench.harness.compiled import compiled
from bench.harness.registry import Case, Run, Setting, Tensors, Variant, Work, drawn, image_like, uniform
from bench.subjects.shapes import ConvLayer, batches, short, stages
from der_fast.kernels import masked_bn as bn
from der_fast.kernels.affine import EPSILON
from der_fast.kernels.conv import conv_dgrad, conv_forward, conv_wgrad

VECTORS = ("weight1", "bias1", "mask1", "weight2", "bias2", "mask2")


def block(operation: norm.Operation, x: Tensor, w1: Tensor, w2: Tensor, vectors: list[Tensor], moments: list[Tensor]) -> Tensor:
    """The block with PyTorch's convolutions and any batch-norm with the signature of `eager`."""
    hidden = operation(F.conv2d(x, w1, None, 1, 1), *vectors[:3], None, *moments[:2], True)
    return operation(F.conv2d(hidden, w2, None, 1, 1), *vectors[3:], x, *moments[2:], True)


def eager_block(x: Tensor, w1: Tensor, w2: Tensor, vectors: list[Tensor], moments: list[Tensor]) -> Tensor:
    """The block in eager PyTorch."""
    return block(norm.eager, x, w1, w2, vectors, moments)


class Chain:
    """The block on der_fast's primitives, forward and backward.

    Args:
        x, w1, w2: activations' dtype, channels-last.
        vectors: γ, β and mask of both batch-norms, (C,) float32.
        backend: 'fused' or 'reference'.
    """

    def __init__(self, x: Tensor, w1: Tensor, w2: Tensor, vectors: list[Tensor], backend: str) -> None:
        self.x, self.w1, self.w2, self.backend = x, w1, w2, backend
        weight1, bias1, mask1, weight2, bias2, mask2 = vectors
        self.first, self.second = (weight1, bias1, mask1), (weight2, bias2, mask2)

    def forward(self) -> Tensor:
        """Return the block's output and keep what the backward pass needs."""
        backend = self.backend
        self.y1, partials = conv_forward(self.x, self.w1, stride=1, prologue=None, statistics=True, backend=backend)
        assert partials is not None
        self.affine1, _, _ = bn.finalize(partials, *self.first, EPSILON, backend=backend)
        between = (self.affine1.scale, self.affine1.shift)
        self.y2, partials = conv_forward(self.y1, self.w2, stride=1, prologue=between, statistics=True, backend=backend)
        assert partials is not None
        self.affine2, _, _ = bn.finalize(partials, *self.second, EPSILON, backend=backend)
        behind = (self.affine2.scale, self.affine2.shift)
        out, self.bits = bn.apply(self.y2, behind, residual=self.x, relu=True, keep_bits=True, backend=backend)
        return out

    def backward(self, g: Tensor) -> Tensors:
        """Return every gradient, given that of the output."""
        backend, count = self.backend, g.numel() // g.shape[1]
        assert self.bits is not None
        sums, _, g_z = bn.backward_reduce(g, self.y2, self.affine2, relu_from=self.bits, write_gz=True, backend=backend)
        assert g_z is not None
        k2, dweight2, dbias2, dmask2 = bn.backward_coefficients(sums, count, self.affine2, *self.second, backend=backend)
        behind, between = (k2, self.y2), (self.affine1.scale, self.affine1.shift)
        dw2 = conv_wgrad(self.y1, g_z, 3, stride=1, prologue=between, g_affine=behind, backend=backend)
        size = (self.x.shape[2], self.x.shape[3])
        inner = (self.y1, self.affine1)
        g_z1, sums1 = conv_dgrad(g_z, self.w2, size, stride=1, g_affine=behind, epilogue=inner, backend=backend)
        assert sums1 is not None
        k1, dweight1, dbias1, dmask1 = bn.backward_coefficients(sums1, count, self.affine1, *self.first, backend=backend)
        dw1 = conv_wgrad(self.x, g_z1, 3, stride=1, g_affine=(k1, self.y1), backend=backend)
        dx, _ = conv_dgrad(g_z1, self.w1, size, stride=1, g_affine=(k1, self.y1), epilogue=None, backend=backend)
        assert dmask1 is not None and dmask2 is not None
        vectors = zip(VECTORS, (dweight1, dbias1, dmask1, dweight2, dbias2, dmask2), strict=True)
        return {"dx": dx + g_z, "dw1": dw1, "dw2": dw2, **{f"d{name}": value for name, value in vectors}}


@dataclass(frozen=True)
class _Blocks:
    """How the variants of one case run: `what` is 'forward' or 'both'; a block has `channels` channels and `side` × `side` pixels."""

    setting: Setting
    what: str
    batch: int
    channels: int
    side: int

    def inputs(self, generator: torch.Generator) -> Tensors:
        """Draw the input, the output's gradient and all trained tensors."""
        shape, fan = (self.batch, self.channels, self.side, self.side), self.channels * 9
        tensors = {"x": drawn(generator, *shape), "g": drawn(generator, *shape)}
        tensors |= {name: drawn(generator, self.channels, self.channels, 3, 3, scale=fan**-0.5) for name in ("w1", "w2")}
        for number in "12":
            tensors[f"weight{number}"] = drawn(generator, self.channels, scale=0.2, shift=1.0)
            tensors[f"bias{number}"] = drawn(generator, self.channels, scale=0.2)
            tensors[f"mask{number}"] = uniform(generator, self.channels)
        return {name: tensor.to(self.setting.device) for name, tensor in tensors.items()}

    def _cast(self, tensors: Tensors, dtype: torch.dtype, channels_last: bool) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:
        device = self.setting.device

        def one(name: str) -> Tensor:
            return image_like(tensors[name], device, dtype) if channels_last else tensors[name].to(dtype)

        wide = torch.float64 if dtype == torch.float64 else torch.float32
        vectors = [tensors[name].detach().to(wide, copy=True) for name in VECTORS]
        moments = [torch.zeros(self.channels, dtype=wide, device=device) for _ in range(4)]
        return [one(name).detach().clone() for name in ("x", "w1", "w2")], vectors, moments, one("g")

    def library(self, function: object, tensors: Tensors, dtype: torch.dtype, channels_last: bool = True) -> Run:
        """A function of PyTorch, differentiated by autograd."""
        images, vectors, moments, g = self._cast(tensors, dtype, channels_last)
        leaves = [*images, *vectors]
        for leaf in leaves:
            leaf.requires_grad_(self.what == "both")
        names = ["dx", "dw1", "dw2", *(f"d{name}" for name in VECTORS)]

        def run() -> Tensors:
            out = function(*images, vectors, moments)  # type: ignore[operator]
            if self.what == "forward":
                return {"a": out}
            return {"a": out.detach(), **dict(zip(names, torch.autograd.grad(out, leaves, g), strict=True))}

        return run

    def chained(self, tensors: Tensors, dtype: torch.dtype) -> Run:
        """der_fast's chain, forward and backward by hand."""
        images, vectors, _, g = self._cast(tensors, dtype, True)
        x, w1, w2 = images
        chain = Chain(x, w1, w2, vectors, self.setting.backend)

        def run() -> Tensors:
            with torch.no_grad():
                out = chain.forward()
                return {"a": out} if self.what == "forward" else {"a": out, **chain.backward(g)}

        return run


def _case(setting: Setting, what: str, stage: int, batch: int) -> Case:
    channels, side = stages(setting)[stage]
    layer, runs = ConvLayer("block", channels, channels, side), _Blocks(setting, what, batch, channels, side)
    own = norm.ours(setting.backend)
    mixed = lambda *args: block(own, *args)  # noqa: E731
    half = torch.bfloat16
    variants = [
        Variant("eager_fp32", torch.float32, lambda i: runs.library(eager_block, i, torch.float32, False), True, note="contiguous"),
        *(Variant(f"eager_{short(d)}", d, lambda i, d=d: runs.library(eager_block, i, d), True) for d in (half, torch.float16)),
        Variant("cudnn_masked_bn", half, lambda i: runs.library(mixed, i, half), note="cuDNN + der_fast's masked_bn"),
        Variant("ours", half, lambda i: runs.chained(i, half), deterministic=True),
        Variant("ours_fp16", torch.float16, lambda i: runs.chained(i, torch.float16), deterministic=True),
    ]
    # Each compilation tries many convolutions, so one stage represents all.
    if setting.scale != "quick" and stage == 1:
        once = compiled(eager_block, setting)
        variants.insert(3, Variant("compile", half, lambda i: runs.library(once, i, half), note="max-autotune"))
    directions = 1 if what == "forward" else 3
    return Case(
        f"conv_chain.{what}",
        {"stage": stage, "batch": batch},
        runs.inputs,
        lambda i: runs.library(eager_block, i, torch.float64, False)(),
        tuple(variants),
        lambda dtype: Work(flops=2 * directions * layer.flops(batch), images=batch),
        floors=_floors(setting),
    )


def _floors(setting: Setting) -> dict[torch.dtype, float]:
    if setting.smoke:
        # Rounding flips a ReLU here and there; among so few numbers one flip changes the result by percents.
        return {torch.bfloat16: 0.2, torch.float16: 0.1}
    # PyTorch's own setting lets cuDNN round float32 operands to TF32.
    return {torch.float32: 1e-3} if setting.cuda else {}


def cases(setting: Setting) -> list[Case]:
    """Return the group."""
    return [_case(setting, what, stage, batch) for what in ("forward", "both") for batch in batches(setting) for stage in stages(setting)]
