"""The representation stage: the new extractor, its masks and the classifiers are trained on new classes and memory."""

from __future__ import annotations

import time

from der_fast.compaction.bank import FrozenBank
from der_fast.config.schema import ScheduleConfig
from der_fast.data.source import ImageSource
from der_fast.model.classifier import initialise_classifier
from der_fast.model.layout import MaskLayout
from der_fast.seeds import generator
from der_fast.stopping import deferred, stop_if_requested
from der_fast.training.batch_step import BatchStep
from der_fast.training.context import Context
from der_fast.training.epoch import EpochMeter, count_batches
from der_fast.training.mask_log import is_noted
from der_fast.training.optimizer import NamedSGD
from der_fast.training.pruning import final_keep, kept_share, settle
from der_fast.training.schedule import learning_rate, mask_scale, settled_from
from der_fast.training.sparsity import SparsityController
from der_fast.training.state import StepState


class RepresentationStage:
    """Trains one step's extractor, from wherever `state` stands.

    Args:
        context: settings and listeners.
        state: the step in progress; changed in place.
        bank: the frozen extractors.
        source: new classes and memory, labelled over all seen classes.
        known: number of classes known before this step.
        schedule: epochs and learning rates.
        stage: name in records ('representation', or 'reference').
    """

    def __init__(
        self,
        context: Context,
        state: StepState,
        bank: FrozenBank,
        source: ImageSource,
        known: int,
        schedule: ScheduleConfig,
        stage: str | None = None,
    ) -> None:
        self.context, self.state, self.bank, self.source = context, state, bank, source
        self.known, self.schedule, self.stage = known, schedule, stage or state.stage
        self.batches = count_batches(len(source), schedule.batch_size)
        masks = context.config.masks
        self.settle_at = settled_from(schedule.epochs, masks.settle) if state.masks is not None else schedule.epochs
        layout = MaskLayout(state.extractor.architecture)
        self.controller = SparsityController(masks, self.settle_at * self.batches, layout, context.device)
        if state.sparsity_weight is not None:
            self.controller.weight = state.sparsity_weight
        self.optimizer = self._new_optimizer()
        self._step: BatchStep | None = None

    def _new_optimizer(self) -> NamedSGD:
        on_device = self.context.backend.name == "fused"
        optimizer = NamedSGD(self.state.modules(), self.schedule, self.context.config.masks.lr, on_device=on_device)
        optimizer.restore(self.state.momentum)
        return optimizer

    def run(self) -> None:
        """Train what remains, saving after every epoch and in the middle of long ones; raises Stopped where a signal says stop."""
        if self.state.masks is not None and not self.state.mask_log.times:
            self.state.mask_log.add(0.0, self.state.masks.logits)
        with deferred():
            while self.state.epoch < self.schedule.epochs:
                self.epoch()
                self.context.save(self.state)
                stop_if_requested()

    def epoch(self) -> None:
        """Train one epoch, or what remains of it; raises DivergenceError."""
        state, epoch = self.state, self.state.epoch
        settled = epoch >= self.settle_at
        lr = learning_rate(self.schedule, epoch)
        if state.position is None:
            self._begin_epoch()
        self.optimizer.set_lr(lr)
        state.extractor.train()
        step = self._batch_step(settled)
        meter = EpochMeter(self.context, state, self.schedule.epochs, self.batches, self.stage, step.totals)
        batches = self.source.batches(
            None,
            self.schedule.batch_size,
            transform=self.context.train_transform,
            generator=generator(self.context.seed, self.stage, state.step, epoch),
            shuffle=True,
            device=self.context.device,
            channels_last=self.context.config.runtime.channels_last,
            start=meter.start,
        )
        for number, batch in enumerate(meter.timed(batches), meter.batch + 1):
            scale = mask_scale(number, self.batches, self.context.config.masks.s_max)
            step(batch.images, batch.labels, scale, epoch * self.batches + number - 1)
            if state.masks is not None and not settled and is_noted(number, self.batches, self.settle_at):
                state.mask_log.add(epoch + number / self.batches, state.masks.logits)
            meter.advance(len(batch.labels))
            meter.checkpoint(batch.place, lr, self._write_down)
        if state.remainder is not None:
            state.remainder.decay(self.schedule, lr, self.batches)
        self._finish(meter, lr, settled)

    def _begin_epoch(self) -> None:
        """Do what comes before an epoch's first batch, once."""
        epoch = self.state.epoch
        if epoch == self.settle_at:
            self._settle()
        if self.schedule.warmup_epochs and epoch == self.schedule.warmup_epochs:
            self._reinitialise_classifiers()

    def _settle(self) -> None:
        """Make the masks binary for good, and go on with the compact network."""
        masks, config = self.state.masks, self.context.config.masks
        if masks is None:
            return
        started = time.perf_counter()
        keep = settle(masks, config)
        self.state.mask_log.add(self.state.epoch, masks.logits)
        if self.state.compact(keep):
            self.optimizer, self._step = self._new_optimizer(), None
        self.state.elapsed += time.perf_counter() - started

    def _batch_step(self, settled: bool) -> BatchStep:
        """The function that trains a batch, made anew where masks settled or networks were replaced."""
        if self._step is None or self._step.settled != settled:
            self._step = BatchStep(self.context, self.state, self.bank, self.known, self.optimizer, self.controller, settled)
        return self._step

    def _reinitialise_classifiers(self) -> None:
        """At the end of the warm-up both classifiers start anew, as in the authors' code."""
        state = self.state
        for name, layer in (("head", state.head), ("auxiliary", state.auxiliary)):
            if layer is not None:
                initialise_classifier(layer, generator(self.context.seed, "after warm-up", name, state.step))
        self.optimizer.forget(("head.", "auxiliary."))

    def _finish(self, meter: EpochMeter, lr: float, settled: bool) -> None:
        state, share, channels = self.state, None, None
        if state.masks is not None:
            keep = final_keep(state.masks, self.context.config.masks)
            share, channels = kept_share(state.masks.layout, keep), float(keep.double().mean())
        self._write_down()
        meter.finish(lr, kept_share=share, kept_channels=channels, sparsity_weight=state.sparsity_weight, settled=settled)

    def _write_down(self) -> None:
        """Bring into the state what changes outside of it."""
        self.state.sparsity_weight = None if self.state.masks is None else self.controller.weight
        self.state.momentum = self.optimizer.momentum()
