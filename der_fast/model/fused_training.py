"""An extractor's training step on der_fast's kernels: the same modules, parameters and running statistics as `Extractor.forward`.

Every residual block, and the stem, is one autograd node (see `chain`). Pre-activation networks, whose batch-norm precedes the
convolution, use PyTorch's convolutions and the operation `masked_bn`. Precision: docs/precision.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from der_fast.kernels.choices import Choices, shared
from der_fast.kernels.conv import Join
from der_fast.kernels.conv.strided import convolve
from der_fast.kernels.masked_bn import Running, masked_bn
from der_fast.kernels.masked_bn.autograd import channels_last
from der_fast.model import paths
from der_fast.model.chain import IDENTITY, NOTHING, PROJECTION, WIDENED, ChainBlock
from der_fast.model.chain_node import Passage, run_block, weights_of
from der_fast.model.extractor import Convolution, Extractor, MaskedBatchNorm, ResidualBlock
from der_fast.model.mask_slices import MaskSlices
from der_fast.model.measured import fastest_block, working_normalisation
from der_fast.model.paths import Layer

# A layer of the chain: a convolution and the batch-norm after it.
Pair = tuple[Convolution, MaskedBatchNorm]


@dataclass(frozen=True)
class _StepTensors:
    """The tensors of one call.

    Attributes:
        weights: every convolution's, in the activations' dtype.
        masks: every batch-norm's, or None.
    """

    weights: dict[Convolution, Tensor]
    masks: dict[MaskedBatchNorm, Tensor | None]


class _Mean(torch.autograd.Function):
    """The mean over all pixels, in float32 or better. PyTorch's own backward pass takes three launches: divide, round and reorder."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.like = x.shape, x.dtype
        return x.mean((2, 3), dtype=torch.promote_types(x.dtype, torch.float32))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        shape, dtype = ctx.like
        out = torch.empty(shape, dtype=dtype, device=g.device, memory_format=torch.channels_last)
        return torch.div(g[:, :, None, None].expand(shape), shape[2] * shape[3], out=out)


class FusedTraining:
    """Maps images (N, 3, H, W) to features (N, F) as `Extractor.forward` does in training mode, on the kernels.

    Args:
        extractor: the network, full or compact; its parameters are trained and its running statistics move.
        dtype: of activations and convolutions: bfloat16, float16 or float32 (float64 with backend 'reference'). Parameters stay as they
            are.
        path: 'auto' for the fastest one measured, or one of `paths.FORWARD` for every layer that has a choice; if the backward pass has
            no path of that name, it is PyTorch's.
        backend: of the kernels: 'fused' or 'reference'.
        choices: remembers what was measured; the user's by default.

    Raises:
        ValueError: an unknown path.
    """

    def __init__(
        self, extractor: Extractor, dtype: torch.dtype, *, path: str = "auto", backend: str = "fused", choices: Choices | None = None
    ) -> None:
        if path not in ("auto", *paths.FORWARD):
            raise ValueError(f"unknown path {path!r}: choose from auto, {', '.join(paths.FORWARD)}")
        self.extractor, self.dtype, self.path, self.backend = extractor, dtype, path, backend
        self._choices = choices
        self._convs = [module for module in extractor.modules() if isinstance(module, Convolution)]
        self._norms = [module for module in extractor.modules() if isinstance(module, MaskedBatchNorm)]
        parts = [norm.where for norm in self._norms if norm.where is not None]
        self._slices = MaskSlices(parts, extractor.maskable) if parts else None
        self._chosen: dict[tuple[object, ...], ChainBlock] = {}
        self._normalisations: dict[tuple[int, ...], str] = {}

    def __call__(self, images: Tensor, masks: Tensor | None = None) -> Tensor:
        """Return features (N, F), float32 (float64 for float64 activations); `masks` is the flat mask vector (C,), or None for all ones.

        Raises:
            ValueError: no images, masks that do not fit, or one value per channel at some batch-norm.
        """
        extractor = self.extractor
        extractor.check_masks(masks)
        if not len(images):
            raise ValueError(f"cannot train on a batch without images; its shape is {tuple(images.shape)}")
        with torch.autocast(images.device.type, enabled=False):
            x = channels_last(images.to(self.dtype))
            step = _StepTensors(self._cast_weights(), self._slice_masks(masks))
            x = self._preactivation(x, step) if extractor.architecture.preactivation else self._postactivation(x, step)
            out: Tensor = _Mean.apply(x)  # type: ignore[no-untyped-call]
            return out

    def _cast_weights(self) -> dict[Convolution, Tensor]:
        """Every convolution's weight in the activations' dtype and channels-last strides, in one launch."""
        weights = [conv.weight.detach() for conv in self._convs]
        if all(weight.dtype == self.dtype and weight.is_contiguous(memory_format=torch.channels_last) for weight in weights):
            return dict(zip(self._convs, weights, strict=True))
        copies = [torch.empty_like(weight, dtype=self.dtype, memory_format=torch.channels_last) for weight in weights]
        torch._foreach_copy_(copies, weights)
        return dict(zip(self._convs, copies, strict=True))

    def _slice_masks(self, masks: Tensor | None) -> dict[MaskedBatchNorm, Tensor | None]:
        if masks is None or self._slices is None:
            return dict.fromkeys(self._norms)
        return dict(zip(self._norms, self._slices(masks), strict=True))

    def _postactivation(self, x: Tensor, step: _StepTensors) -> Tensor:
        extractor = self.extractor
        entry, leave = None, None if extractor.architecture.pool else Passage()
        if extractor.stem.weight.numel():
            x = self._run("stem", [(extractor.stem, extractor.norm)], NOTHING, x, step, None, leave)
        else:
            x = self._plainly(lambda image: extractor.norm(extractor.stem(image), None), x)
        if extractor.architecture.pool:
            x = channels_last(F.max_pool2d(x, 3, 2, 1) if x.shape[1] else x[:, :, ::2, ::2])
        for index, module in enumerate(extractor.blocks):
            assert isinstance(module, ResidualBlock)
            entry, leave = leave, Passage()
            pairs = _pairs(module)
            residual = WIDENED if module.grow or module.stride > 1 else IDENTITY
            residual = residual if module.shortcut is None else PROJECTION
            if all(conv.weight.numel() for conv, _ in pairs):
                x = self._run(index, pairs, residual, x, step, entry, leave)
            else:
                x = self._plainly(partial(module, masks=None), x)
        return x

    def _run(
        self,
        name: object,
        pairs: Sequence[Pair],
        residual: str,
        x: Tensor,
        step: _StepTensors,
        entry: Passage | None,
        leave: Passage | None,
    ) -> Tensor:
        """Run a block as one node."""
        flat: list[Tensor | None] = []
        for conv, norm in pairs:
            flat += [conv.weight, step.weights[conv], norm.weight, norm.bias, step.masks[norm]]
        running = [Running(norm.running_mean, norm.running_var, norm.momentum) for _, norm in pairs]
        block = self._block(name, pairs, residual, x, flat, None if entry is None else entry.join)
        return run_block(block, x, flat, running, entry=entry, leave=leave)

    def _block(
        self, name: object, pairs: Sequence[Pair], residual: str, x: Tensor, flat: Sequence[Tensor | None], before: Join | None
    ) -> ChainBlock:
        """The paths of a block: chosen at its first batch, and kept for batches of any size."""
        key = (name, *x.shape[2:])
        if key not in self._chosen:
            layers = tuple(Layer(conv.weight.shape[2], conv.stride) for conv, _ in pairs)
            block = ChainBlock(layers, residual, max(layer.stride for layer in layers), self.backend)
            if self.path == "auto":
                weights = weights_of([None if value is None else value.detach() for value in flat])
                self._chosen[key] = fastest_block(block, x.detach(), weights, self._choices or shared(), before)
            else:
                self._chosen[key] = _uniform(block, self.path)
        return self._chosen[key]

    def _plainly(self, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Run a block that has lost all channels somewhere, which the kernels do not accept, as the reference does."""
        with torch.autocast(x.device.type, self.dtype, enabled=self.dtype in (torch.bfloat16, torch.float16)):
            return channels_last(run(x).to(self.dtype))

    def _preactivation(self, x: Tensor, step: _StepTensors) -> Tensor:
        extractor = self.extractor
        x = self._convolve(extractor.stem, x)
        if extractor.architecture.pool:
            x = F.max_pool2d(x, 3, 2, 1) if x.shape[1] else x[:, :, ::2, ::2]
        for block in extractor.blocks:
            assert isinstance(block, ResidualBlock)
            convs, norms = list(block.convs), list(block.norms)
            active = self._normalise(norms[0], x, step)
            residual = block.identity(x) if block.shortcut is None else self._convolve(block.shortcut, active)
            for index, (conv, norm) in enumerate(zip(convs, norms, strict=True)):
                active = self._convolve(conv, active if index == 0 else self._normalise(norm, active, step))
            x = active + residual
        return self._normalise(extractor.norm, x, step)

    def _convolve(self, conv: torch.nn.Module, x: Tensor) -> Tensor:
        assert isinstance(conv, Convolution)
        if conv.weight.numel() == 0:
            return conv(x)  # type: ignore[no-any-return]
        return convolve(x, conv.weight.to(self.dtype), conv.stride, conv.padding)

    def _normalise(self, norm: torch.nn.Module, x: Tensor, step: _StepTensors) -> Tensor:
        assert isinstance(norm, MaskedBatchNorm)
        if x.shape[1] == 0:
            return x
        return masked_bn(
            x,
            norm.weight,
            norm.bias,
            norm.running_mean,
            norm.running_var,
            mask=step.masks[norm],
            relu=True,
            training=True,
            momentum=norm.momentum,
            backend=self._normalisation(norm, x, step.masks[norm]),
        )

    def _normalisation(self, norm: MaskedBatchNorm, x: Tensor, mask: Tensor | None) -> str:
        """The backend of a batch-norm: found out at its first batch, and kept for batches of any size."""
        if self.path != "auto" or self.backend == "reference":
            return self.backend
        key = tuple(x.shape[1:])
        if key not in self._normalisations:
            self._normalisations[key] = working_normalisation(norm, channels_last(x.detach()), mask, self._choices or shared())
        return self._normalisations[key]


def _pairs(module: ResidualBlock) -> list[Pair]:
    """The layers of a block, its projection last."""
    convs, norms = list(module.convs), list(module.norms)
    if module.shortcut is not None and module.shortcut_norm is not None:
        convs, norms = [*convs, module.shortcut], [*norms, module.shortcut_norm]
    return [(cast(Convolution, conv), cast(MaskedBatchNorm, norm)) for conv, norm in zip(convs, norms, strict=True)]


def _uniform(block: ChainBlock, path: str) -> ChainBlock:
    layers = paths.forward_layers(block.layers, path)
    return replace(block, layers=paths.backward_layers(layers, path if path in paths.BACKWARD else paths.CUDNN))
