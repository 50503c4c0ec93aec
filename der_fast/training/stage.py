"""One stage of a step: epochs of SGD over images, with checkpoints, from the point that the state has reached."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from der_fast.config.schema import ScheduleConfig
from der_fast.data.read.place import Place
from der_fast.data.source import ImageSource
from der_fast.errors import DivergenceError
from der_fast.seeds import generator
from der_fast.stopping import deferred, requested, stop_if_requested
from der_fast.training.batch_step import BatchLoss, BatchStep
from der_fast.training.context import Context
from der_fast.training.epoch import EpochMeter, count_batches
from der_fast.training.feed import Fed, Feed, feed_for
from der_fast.training.kept import KeptFeatures
from der_fast.training.optimizer import NamedSGD
from der_fast.training.progress import EpochRecord
from der_fast.training.schedule import learning_rate
from der_fast.training.state import StepState

# Reading a number from a GPU lets it run dry for a moment.
_SECONDS_BETWEEN_FIGURES = 10.0


class Stage:
    """Trains what remains of a stage. A stage that does more overrides the methods from `begin_epoch` to `write_down`.

    Args:
        context: settings and listeners.
        state: the step in progress; changed in place.
        source: training images, labelled over all seen classes.
        schedule: epochs, batches and learning rates.
        loss: the method's batch loss; None if `batch_step` is overridden.
        constrain: called after every update of the weights; reads nothing from the device.
        parts: names of the trained parts; default: all parts of the state.
        chosen: positions (n,) of the images to train on; default: all.
        kept: kept features of the frozen extractors, which the loss takes after images and labels.
        feed: delivers the batches; default: the images, from the device if they lie there.
        name: the stage's name in records and random numbers; default: the state's.
        graphed: whether optimizer and batches stay on the device, for a CUDA graph.
    """

    def __init__(
        self,
        context: Context,
        state: StepState,
        source: ImageSource,
        schedule: ScheduleConfig,
        loss: BatchLoss | None = None,
        *,
        constrain: Callable[[], None] | None = None,
        parts: Mapping[str, nn.Module] | None = None,
        chosen: Tensor | None = None,
        kept: KeptFeatures | None = None,
        feed: Feed | None = None,
        name: str | None = None,
        graphed: bool = False,
    ) -> None:
        self.context, self.state, self.source, self.schedule = context, state, source, schedule
        self.loss, self.constrain, self.parts, self.graphed = loss, constrain, parts, graphed
        self.name = name or state.stage
        self.batches = count_batches(len(source) if chosen is None else len(chosen), schedule.batch_size)
        self.feed = feed or feed_for(context, source, chosen, schedule.batch_size, kept)
        self.optimizer = self.new_optimizer()
        self.step: BatchStep | None = None
        self._saved, self._told = time.perf_counter(), 0.0
        self._between: tuple[Place, float] | None = None

    def new_optimizer(self) -> NamedSGD:
        """Return SGD over the trained parts, with the state's momentum."""
        parts = self.state.modules() if self.parts is None else self.parts
        optimizer = NamedSGD(parts, self.schedule, self.own_lr, on_device=self.graphed)
        optimizer.restore(self.state.momentum)
        return optimizer

    @property
    def own_lr(self) -> Mapping[str, float]:
        """Learning rates of parameters that have their own (see `NamedSGD`)."""
        return {}

    def begin_epoch(self) -> None:
        """Do what comes before an epoch's first batch, once."""

    def batch_step(self) -> BatchStep:
        """Return the function that trains a batch; called in every epoch."""
        if self.step is None:
            assert self.loss is not None
            self.step = self.new_step(self.loss, self.constrain)
        return self.step

    def new_step(self, loss: BatchLoss, constrain: Callable[[], None] | None) -> BatchStep:
        """Return a new step function over the stage's feed and optimizer."""
        return BatchStep(self.context, self.optimizer, loss, constrain, inputs=self.feed.inputs, graphed=self.graphed)

    def before_batch(self, number: int) -> None:
        """Prepare batch `number` (1-based) of the epoch."""

    def after_batch(self, number: int) -> None:
        """Record what must be recorded after batch `number`."""

    def end_epoch(self, lr: float) -> None:
        """Do what comes after an epoch's last batch."""

    def figures(self) -> dict[str, Any]:
        """Return what the epoch's record holds besides loss, accuracy and times."""
        return {"kept_share": None, "sparsity_weight": None}

    def write_down(self) -> None:
        """Copy into the state what changes outside it."""
        self.state.momentum = self.optimizer.momentum()

    def redraw(self, *names: str) -> None:
        """Initialise linear parts again, as the authors' code does with classifiers at the end of the warm-up."""
        for name in names:
            self.state.redraw(name, generator(self.context.seed, "after warm-up", name, self.state.step))
        self.optimizer.forget(tuple(f"{name}." for name in names))

    def run(self) -> None:
        """Train what remains, saving every `runtime.checkpoint_seconds`, between epochs and within them, and after the last one.

        Raises:
            DivergenceError: the loss or a weight is not a finite number.
            Stopped: a signal says stop.
        """
        interval = self.context.config.runtime.checkpoint_seconds
        self._saved = time.perf_counter()
        with deferred():
            while self.state.epoch < self.schedule.epochs:
                self.epoch()
                if self.state.epoch == self.schedule.epochs or requested() or time.perf_counter() - self._saved >= interval:
                    self.context.save(self.state)
                    self._saved = time.perf_counter()
                stop_if_requested()

    def epoch(self) -> None:
        """Train one epoch, or what remains of it; raises DivergenceError."""
        state, epoch = self.state, self.state.epoch
        lr = learning_rate(self.schedule, epoch)
        if state.position is None:
            self.begin_epoch()
        self.optimizer.set_lr(lr)
        for part in (self.parts or state.modules()).values():
            part.train()
        step = self.batch_step()
        meter = self.meter(step.totals)
        draws = generator(self.context.seed, self.name, state.step, epoch)
        for number, batch in enumerate(self._heeding(meter, self.feed.epoch(epoch, draws, meter.start)), meter.batch + 1):
            self.before_batch(number)
            step(*batch.tensors)
            self.after_batch(number)
            self.count(meter, batch.images)
            self.checkpoint(meter, batch.place, lr)
        self.end_epoch(lr)
        self.write_down()
        self.finish(meter, lr)

    def meter(self, totals: Tensor | None = None) -> EpochMeter:
        """Return the meter of the epoch in progress; it continues if the state is within the epoch."""
        position, self.state.position = self.state.position, None
        meter = EpochMeter(self.context.device, position, totals)
        self._between = None
        self._told = time.perf_counter()
        return meter

    def _heeding(self, meter: EpochMeter, batches: Iterator[Fed]) -> Iterator[Fed]:
        """Pass batches on. A signal that says stop may also have ended the workers."""
        try:
            yield from meter.timed(batches)
        except Exception:
            if requested():
                self._stop(meter)
            raise

    def count(self, meter: EpochMeter, images: int) -> None:
        """Count a batch of `images` images, whose loss and hits are already in the totals, and notify the observer."""
        meter.advance(images)
        observer = self.context.observer
        observer.batch_ends(self.state.step, self.name, self.state.epoch + 1, self.schedule.epochs, meter.batch, self.batches, images)
        now = time.perf_counter()
        if now - self._told >= _SECONDS_BETWEEN_FIGURES and meter.batch < self.batches:
            self._told = now
            observer.epoch_so_far(*meter.means(), meter.images_per_s)

    def checkpoint(self, meter: EpochMeter, place: Place | None, lr: float) -> None:
        """Save the state between two batches if the last checkpoint is `runtime.checkpoint_seconds` old or a signal says stop.

        Args:
            meter: the epoch's.
            place: position of the pass over the images; if it is None, nothing is saved.
            lr: learning rate.

        Raises:
            DivergenceError: the loss or a weight is not a finite number.
            Stopped: a signal says stop. After an epoch's last batch the code that saves the epoch raises it instead.
        """
        self._between = None if place is None else (place, lr)
        if meter.batch == self.batches:
            return
        if requested():
            self._stop(meter)
        interval, now = self.context.config.runtime.checkpoint_seconds, time.perf_counter()
        if place is not None and interval and now - self._saved >= interval:
            self._save(meter, place, lr)

    def _stop(self, meter: EpochMeter) -> None:
        """Save the state after the last batch, if possible, and raise Stopped."""
        if self._between is not None:
            self._save(meter, *self._between)
        stop_if_requested()

    def _save(self, meter: EpochMeter, place: Place, lr: float) -> None:
        now = time.perf_counter()
        self.write_down()
        position = meter.position(place)
        self._check_finite(float(position.totals[0]), self.state.epoch + 1, lr)
        self.state.position = position
        self.context.save(self.state)
        self.state.position = None
        self._saved = time.perf_counter()
        # Time spent saving is not training time.
        meter.started += self._saved - now

    def finish(self, meter: EpochMeter, lr: float) -> None:
        """Record the epoch and count it in the state; raises DivergenceError if the loss or a weight is not finite."""
        loss, accuracy = meter.means()
        seconds, processor = meter.seconds, meter.processor_seconds
        state = self.state
        state.elapsed += seconds
        state.epoch += 1
        self._check_finite(loss, state.epoch, lr)
        record = EpochRecord(
            state.step,
            self.name,
            state.epoch,
            self.schedule.epochs,
            loss,
            accuracy,
            lr,
            images_per_s=meter.images / max(seconds, 1e-9),
            seconds=seconds,
            data_seconds=meter.waited,
            processor_seconds=processor,
            **self.figures(),
        )
        state.records.append(record)
        self.context.observer.epoch_ends(record)

    def _check_finite(self, loss: float, epoch: int, lr: float) -> None:
        problem = None if math.isfinite(loss) else f"the loss became {loss}"
        if problem is None and not _is_finite(self.state):
            problem = "a weight became infinite or NaN"
        if problem is not None:
            raise DivergenceError(
                f"{problem} in step {self.state.step}, {self.name} stage, epoch {epoch}. Lower the learning rate (now {lr:g}) with ",
                *self.state.advice,
                ".",
            )


def _is_finite(state: StepState) -> bool:
    """Whether no weight and no statistic is NaN or infinite: the last batch of an epoch may ruin weights without showing it in its loss."""
    tensors = [value for module in state.modules().values() for value in module.state_dict().values() if value.is_floating_point()]
    return bool(torch.stack([value.isfinite().all() for value in tensors]).all())
