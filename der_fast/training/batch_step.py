"""One batch of the representation stage, from images to moved weights, as one function of tensors that stay where they are.

L_DER = L_H + λ_a·L_Ha + λ_s·L_S (Yan et al. 2021; eq. 4). Mask scale, learning rate, λ_s and what it follows are
scalars on the device, and sums over the epoch stay there, so that the function asks the device for nothing: eagerly it is a sequence of
launches without a wait, and a CUDA graph can hold all of it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from der_fast.compaction.bank import FrozenBank
from der_fast.model import paths
from der_fast.model.classifier import auxiliary_targets
from der_fast.model.fused import FusedTraining
from der_fast.training.context import Context
from der_fast.training.epoch import tally
from der_fast.training.graphed import GraphedStep
from der_fast.training.optimizer import NamedSGD
from der_fast.training.pruning import final_keep
from der_fast.training.sparsity import SparsityController
from der_fast.training.state import StepState


class BatchStep:
    """Trains one batch at a time. The networks and the optimizer are those at hand when it is made: whoever replaces them makes a new one.

    Args:
        context: settings; its backend decides about the new extractor's kernels.
        state: the step in progress.
        bank: the frozen extractors.
        known: number of classes known before this step.
        optimizer: of everything that is trained.
        controller: chooses λ_s.
        settled: whether the masks are binary and stay as they are.

    Attributes:
        totals: (2,) float64 on the device: the epoch's sums of loss and hits over images.
    """

    def __init__(
        self,
        context: Context,
        state: StepState,
        bank: FrozenBank,
        known: int,
        optimizer: NamedSGD,
        controller: SparsityController,
        settled: bool,
    ) -> None:
        self.context, self.state, self.bank, self.known = context, state, bank, known
        self.optimizer, self.controller, self.settled = optimizer, controller, settled
        self.totals = torch.zeros(2, dtype=torch.float64, device=context.device)
        self._scale = torch.ones((), device=context.device)
        self._binary = self._binary_masks() if settled else None
        self._graphed: GraphedStep | None = None
        self._fused: FusedTraining | None = None
        if context.backend.name == "fused":
            path = "auto" if context.backend.measured else paths.CHAIN
            self._fused = FusedTraining(state.extractor, context.dtype, path=path)
            self._graphed = GraphedStep(context.device, context.observer.message)

    def __call__(self, images: Tensor, labels: Tensor, scale: float, batch: int) -> None:
        """Train on a batch.

        Args:
            images, labels: the batch.
            scale: mask scale s.
            batch: its number, 0-based, over all epochs in which masks are learned.
        """
        self._scale.fill_(scale)
        self.controller.set_batch(batch)
        if self._graphed is None:
            self._body(images, labels)
        else:
            self._graphed(self._body, images, labels)

    def _binary_masks(self) -> Tensor | None:
        """The masks of the settled epochs; None where the compact network, which has none, is trained."""
        state = self.state
        if state.masks is None or state.remainder is not None:
            return None
        return final_keep(state.masks, self.context.config.masks).float().to(self.context.device)

    def _body(self, images: Tensor, labels: Tensor) -> None:
        loss, logits = self._loss(images, labels)
        self.optimizer.step(loss)
        if self.state.masks is not None and not self.settled:
            self.state.masks.clamp_logits()
        tally(self.totals, loss, logits, labels)

    def _loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        state, masks, sparsity = self.state, self._binary, None
        if state.masks is not None and not self.settled:
            self.controller.adapt(state.masks.logits.detach())
            kernels = "reference" if self._fused is None else self._fused.backend
            masks, sparsity = state.masks.with_sparsity(self._scale, backend=kernels)
        new = self._features(images, masks)
        logits = state.head(torch.cat([self.context.features(self.bank, images), new], 1))
        loss = F.cross_entropy(logits, labels)
        if state.auxiliary is not None:
            auxiliary = F.cross_entropy(state.auxiliary(new), auxiliary_targets(labels, self.known))
            loss = loss + self.context.config.method.aux_weight * auxiliary
        if sparsity is not None:
            loss = loss + self.controller.value.to(loss.dtype) * sparsity
        return loss, logits

    def _features(self, images: Tensor, masks: Tensor | None) -> Tensor:
        if self._fused is not None:
            return self._fused(images, masks)
        return self.context.features(self.state.extractor, images, masks)
