"""The representation stage: the new extractor, its masks and the classifiers are trained on new classes and memory."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from der_fast.compaction.bank import FrozenBank
from der_fast.config.schema import ScheduleConfig
from der_fast.data.source import ImageSource
from der_fast.model.layout import MaskLayout
from der_fast.training.batch_step import BatchStep, on_device
from der_fast.training.context import Context
from der_fast.training.kept import KeptFeatures, saves
from der_fast.training.methods.der.loss import DerLoss
from der_fast.training.methods.der.mask_log import is_noted
from der_fast.training.methods.der.pruning import binarise, final_keep, kept_share, thresholds
from der_fast.training.methods.der.sparsity import SparsityController, interval
from der_fast.training.methods.der.state import DerState
from der_fast.training.schedule import mask_scale, settled_from
from der_fast.training.stage import Stage
from der_fast.training.state import REPRESENTATION


class RepresentationStage(Stage):
    """Trains one step's extractor, from the point that `state` has reached.

    Args:
        context: settings and listeners.
        state: the step in progress; changed in place.
        bank: the frozen extractors.
        source: new classes and memory, labelled over all seen classes.
        known: number of classes known before this step.
        schedule: epochs and learning rates.
    """

    state: DerState

    def __init__(
        self, context: Context, state: DerState, bank: FrozenBank, source: ImageSource, known: int, schedule: ScheduleConfig
    ) -> None:
        kept, views = None, context.config.later.views
        if len(bank) and saves(views, schedule.epochs):
            kept = KeptFeatures(context, bank, source, (REPRESENTATION, state.step), views, schedule.epochs)
        super().__init__(context, state, source, schedule, kept=kept, graphed=on_device(context))
        self.bank, self.known = bank, known
        masks = context.config.masks
        self.settle_at = settled_from(schedule.epochs, masks.settle) if state.masks is not None else schedule.epochs
        layout = MaskLayout(state.extractor.architecture)
        learned, every = self.settle_at * self.batches, interval(self.batches, self.settle_at)
        self.controller = SparsityController(masks, learned, layout, context.device, every=every)
        if state.sparsity_weight is not None:
            self.controller.weight = state.sparsity_weight
        self.der_loss: DerLoss | None = None

    @property
    def own_lr(self) -> Mapping[str, float]:
        """Mask logits have their own learning rate."""
        return {"masks.logits": self.context.config.masks.lr}

    def run(self) -> None:
        """See `Stage.run`."""
        if self.state.masks is not None and not self.state.mask_log.times:
            self.state.mask_log.add(0.0, self.state.masks.logits)
        super().run()

    @property
    def settled(self) -> bool:
        """Whether the masks are binary in the current epoch."""
        return self.state.epoch >= self.settle_at

    def begin_epoch(self) -> None:
        """Settle the masks when due; at the end of the warm-up initialise both classifiers again, as in the authors' code."""
        epoch = self.state.epoch
        if epoch == self.settle_at:
            self._settle()
        if self.schedule.warmup_epochs and epoch == self.schedule.warmup_epochs:
            self.redraw("head", "auxiliary")

    def _settle(self) -> None:
        """Make the masks binary for good and continue with the compact network."""
        masks, config = self.state.masks, self.context.config.masks
        if masks is None:
            return
        started = time.perf_counter()
        needed = thresholds(masks, config)
        keep = binarise(masks, config)
        self.state.mask_log.add(self.state.epoch, masks.logits, needed)
        if self.state.compact(keep):
            self.optimizer, self.step, self.der_loss = self.new_optimizer(), None, None
        self.state.elapsed += time.perf_counter() - started

    def batch_step(self) -> BatchStep:
        """The function that trains a batch, built again when masks settle or networks are replaced."""
        if self.step is None or self.der_loss is None or self.der_loss.settled != self.settled:
            self.der_loss = DerLoss(self.context, self.state, self.bank, self.known, self.controller, self.settled)
            self.step = self.new_step(self.der_loss, self.der_loss.constrain)
        return self.step

    def before_batch(self, number: int) -> None:
        """Set the mask scale and λ_s."""
        assert self.der_loss is not None
        scale = mask_scale(number, self.batches, self.context.config.masks.s_max)
        self.der_loss.prepare(scale, self.state.epoch * self.batches + number - 1)

    def after_batch(self, number: int) -> None:
        """Record the mask logits from time to time."""
        state = self.state
        if state.masks is not None and not self.settled and is_noted(number, self.batches, self.settle_at):
            state.mask_log.add(state.epoch + number / self.batches, state.masks.logits)

    def end_epoch(self, lr: float) -> None:
        """Update the removed channels as momentum and weight decay would."""
        if self.state.remainder is not None:
            self.state.remainder.decay(self.schedule, lr, self.batches)

    def figures(self) -> dict[str, Any]:
        """The share that the masks keep, and λ_s."""
        state, share, channels = self.state, None, None
        if state.masks is not None:
            keep = final_keep(state.masks, self.context.config.masks)
            share, channels = kept_share(state.masks.layout, keep), float(keep.double().mean())
        # The epoch is already counted.
        settled = state.epoch - 1 >= self.settle_at
        return {"kept_share": share, "kept_channels": channels, "sparsity_weight": state.sparsity_weight, "settled": settled}

    def write_down(self) -> None:
        """Copy into the state what changes outside it."""
        self.state.sparsity_weight = None if self.state.masks is None else self.controller.weight
        super().write_down()
