"""DER's batch loss: L_DER = L_H + λ_a·L_Ha + λ_s·L_S (Yan et al. 2021; eq. 4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from der_fast.compaction.bank import FrozenBank
from der_fast.kernels.capture import Beside
from der_fast.model.classifier import auxiliary_targets
from der_fast.training.batch_step import TrainedFeatures
from der_fast.training.context import Context
from der_fast.training.methods.der.pruning import final_keep
from der_fast.training.methods.der.sparsity import SparsityController
from der_fast.training.methods.der.state import DerState


class DerLoss:
    """From images and labels to loss and logits. Mask scale and λ_s are scalars on the device.

    It keeps the networks that it was made with: if they are replaced, make a new one.

    Args:
        context: settings.
        state: the step in progress.
        bank: the frozen extractors.
        known: number of classes known before this step.
        controller: chooses λ_s.
        settled: whether the masks are binary and fixed.
    """

    def __init__(
        self, context: Context, state: DerState, bank: FrozenBank, known: int, controller: SparsityController, settled: bool
    ) -> None:
        self.context, self.state, self.bank, self.known = context, state, bank, known
        self.controller, self.settled = controller, settled
        self._scale = torch.ones((), device=context.device)
        self._binary = self._binary_masks() if settled else None
        self._features = TrainedFeatures(context, state.extractor)
        self._beside = Beside(context.device)

    def prepare(self, scale: float, batch: int) -> None:
        """Set the mask scale s and, if it is due, λ_s before batch `batch`, 0-based, counted over all epochs that learn masks."""
        self._scale.fill_(scale)
        if self.state.masks is not None and not self.settled:
            self.controller.follow(batch, self.state.masks.logits.detach())

    def _binary_masks(self) -> Tensor | None:
        """The masks of the settled epochs; None if the compact network, which has no masks, is trained."""
        state = self.state
        if state.masks is None or state.remainder is not None:
            return None
        return final_keep(state.masks, self.context.config.masks).float().to(self.context.device)

    def __call__(self, images: Tensor, labels: Tensor, frozen: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the mean loss and the logits (N, classes); `frozen` (N, F): features of the frozen extractors, if they are kept."""
        state, masks, sparsity = self.state, self._binary, None
        if state.masks is not None and not self.settled:
            masks, sparsity = state.masks.with_sparsity(self._scale, backend=self._features.kernels)
        old = self._beside.start(lambda: self.context.features(self.bank, images) if frozen is None else frozen)
        new = self._features(images, masks)
        logits = state.head(torch.cat([self._beside.join(old), new], 1))
        loss = F.cross_entropy(logits, labels)
        if state.auxiliary is not None:
            auxiliary = F.cross_entropy(state.auxiliary(new), auxiliary_targets(labels, self.known))
            loss = torch.add(loss, auxiliary, alpha=self.context.config.method.aux_weight)
        if sparsity is not None:
            loss = loss + self.controller.value * sparsity
        return loss, logits

    def constrain(self) -> None:
        """Clamp the mask logits while they are learned."""
        if self.state.masks is not None and not self.settled:
            self.state.masks.clamp_logits()
