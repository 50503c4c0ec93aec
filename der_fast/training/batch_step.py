"""One batch of a stage, from images to updated weights, as one function of tensors that stay in place.

Everything that changes from batch to batch is a scalar on the device, and sums over the epoch stay there, so the function never reads
from the device: run eagerly it is a sequence of launches without a wait, and a CUDA graph can hold all of it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from der_fast.model import paths
from der_fast.model.extractor import Extractor
from der_fast.model.fused_training import FusedTraining
from der_fast.training.context import Context
from der_fast.training.epoch import tally
from der_fast.training.graphed import GraphedStep
from der_fast.training.optimizer import NamedSGD

# From images (N, …), labels (N,) and whatever else the stage's feed delivers to the mean loss and the logits (N, classes).
BatchLoss = Callable[..., tuple[Tensor, Tensor]]


def on_device(context: Context) -> bool:
    """Whether extractors are trained by kernels that a CUDA graph can hold."""
    return context.backend.name == "fused"


class BatchStep:
    """Trains one batch at a time. It keeps the networks and the optimizer that it was made with: if they are replaced, make a new one.

    Args:
        context: settings.
        optimizer: updates everything that is trained.
        loss: the method's batch loss.
        constrain: called after every update of the weights, e.g. to clamp them; reads nothing from the device.
        inputs: from what the step is called with to what the loss takes (see `Feed.inputs`); default: the same.
        graphed: whether a CUDA graph may hold it.

    Attributes:
        totals: (2,) float64 on the device: the epoch's sums of loss and hits over images.
    """

    def __init__(
        self,
        context: Context,
        optimizer: NamedSGD,
        loss: BatchLoss,
        constrain: Callable[[], None] | None = None,
        *,
        inputs: Callable[..., tuple[Tensor, ...]] | None = None,
        graphed: bool = False,
    ) -> None:
        self.optimizer, self.loss, self.constrain, self.inputs = optimizer, loss, constrain, inputs
        self.totals = torch.zeros(2, dtype=torch.float64, device=context.device)
        self._graphed = GraphedStep(context.device, context.observer.message) if graphed else None

    def __call__(self, *tensors: Tensor) -> None:
        """Train on a batch."""
        if self._graphed is None:
            self.body(*tensors)
        else:
            self._graphed(self.body, *tensors)

    def body(self, *tensors: Tensor) -> None:
        """Train on a batch, kernel by kernel: what a CUDA graph holds."""
        images, labels, *more = tensors if self.inputs is None else self.inputs(*tensors)
        loss, logits = self.loss(images, labels, *more)
        self.optimizer.step(loss)
        if self.constrain is not None:
            self.constrain()
        tally(self.totals, loss, logits, labels)


class TrainedFeatures:
    """Features of the extractor in training, computed by the kernels chosen for it.

    Args:
        context: its backend decides which kernels run.
        extractor: the extractor.

    Attributes:
        kernels: name of the backend for everything else that is trained with the extractor; 'auto' where it is to be measured.
    """

    def __init__(self, context: Context, extractor: Extractor) -> None:
        self.context, self.extractor, self.kernels = context, extractor, "reference"
        self._fused: FusedTraining | None = None
        if on_device(context):
            path = "auto" if context.backend.measured else paths.CHAIN
            self._fused = FusedTraining(extractor, context.dtype, path=path)
            self.kernels = "auto" if context.backend.measured else self._fused.backend

    def __call__(self, images: Tensor, masks: Tensor | None = None) -> Tensor:
        """Return features (N, F), float32, with gradients; `masks` (C,) scale channels."""
        if self._fused is not None:
            return self._fused(images, masks)
        return self.context.features(self.extractor, images, masks)
