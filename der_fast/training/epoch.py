"""Counting an epoch: loss, accuracy and speed, without asking the device for a number in every batch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from der_fast.data.place import BEGINNING, Place
from der_fast.data.source import Batch
from der_fast.errors import DivergenceError
from der_fast.stopping import requested, stop_if_requested
from der_fast.training.context import Context
from der_fast.training.position import Position
from der_fast.training.progress import EpochRecord
from der_fast.training.state import CLASSIFIER, StepState

# Asking a GPU for a number lets it run dry for a moment.
_SECONDS_BETWEEN_FIGURES = 10.0


def tally(totals: Tensor, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
    """Add a batch to (2,) `totals`: its mean loss times its images, and hits of `logits` (N, classes) against `labels` (N,)."""
    hits = (logits.detach().argmax(1) == labels).sum()
    totals += torch.stack([loss.detach().double() * len(labels), hits.double()])


class EpochMeter:
    """Sums loss and hits over an epoch on the device, and has it written down in its middle where it takes long.

    A state that stands in the middle of the epoch is gone on with.

    Args:
        context: whose observer is told.
        state: the step in progress; the finished epoch is added to its records.
        epochs: how many epochs the stage has.
        batches: how many batches this epoch has.
        stage: the stage's name; default: the state's.
        totals: (2,) float64 on the device, set here to where the epoch begins; whoever gives it adds to it by `tally`.

    Attributes:
        start: where the pass over the images begins.
        batch: how many batches were trained.
        waited: seconds spent waiting for images.
    """

    def __init__(
        self, context: Context, state: StepState, epochs: int, batches: int, stage: str | None = None, totals: Tensor | None = None
    ) -> None:
        self.context, self.state, self.epochs, self.batches = context, state, epochs, batches
        self.stage = stage or state.stage
        self.totals = torch.zeros(2, dtype=torch.float64, device=context.device) if totals is None else totals.zero_()
        self.images = self.batch = 0
        self.waited = 0.0
        self.start = BEGINNING
        self._between: tuple[Place, float, Callable[[], None]] | None = None
        self.started = self._saved = self._told = time.perf_counter()
        # A state that is gone on with in the middle of an epoch does not know what was computed before.
        self._computing = time.process_time() if context.device.type == "cpu" and state.position is None else None
        if state.position is not None:
            self._go_on(state.position)
            state.position = None

    def _go_on(self, position: Position) -> None:
        self.start, self.batch, self.images = position.place, position.batches, position.images
        self.totals.copy_(position.totals)
        self.started -= position.seconds
        self.waited = position.waited

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Pass batches on and measure how long each lets wait; what a GPU has still to do meanwhile is not asked."""
        while True:
            asked = time.perf_counter()
            try:
                batch = next(batches, None)
            except Exception:
                # The signal that says stop may have ended the workers, too.
                if requested():
                    self._stop()
                raise
            self.waited += time.perf_counter() - asked
            if batch is None:
                return
            yield batch

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Count one batch: its mean loss, and hits of `logits` (N, classes) against `labels` (N,)."""
        tally(self.totals, loss, logits, labels)
        self.advance(len(labels))

    def advance(self, images: int) -> None:
        """Count one batch of so many images, whose loss and hits are in the totals."""
        self.images += images
        self.batch += 1
        epoch = self.state.epoch + 1
        self.context.observer.batch_ends(self.state.step, self.stage, epoch, self.epochs, self.batch, self.batches, images)
        now = time.perf_counter()
        if now - self._told >= _SECONDS_BETWEEN_FIGURES and self.batch < self.batches:
            self._told = now
            loss, hits = (self.totals / max(self.images, 1)).tolist()
            self.context.observer.epoch_so_far(loss, 100 * hits, self.images / max(now - self.started, 1e-9))

    def checkpoint(self, place: Place | None, lr: float, write_down: Callable[[], None]) -> None:
        """Save the state as it is between two batches, if the last checkpoint is `runtime.checkpoint_seconds` old or a signal says stop.

        Args:
            place: of the pass over the images; nothing is saved where it is unknown.
            lr: learning rate.
            write_down: brings the state up to date.

        Raises:
            DivergenceError: the loss or a weight is not a finite number.
            Stopped: a signal says stop. After an epoch's last batch that is left to whoever saves the epoch.
        """
        self._between = None if place is None else (place, lr, write_down)
        if self.batch == self.batches:
            return
        if requested():
            self._stop()
        interval, now = self.context.config.runtime.checkpoint_seconds, time.perf_counter()
        if place is not None and interval and now - self._saved >= interval:
            self._save(place, lr, write_down)

    def _stop(self) -> None:
        """Save the state as it was after the last batch, where that can be done, and raise Stopped."""
        if self._between is not None:
            self._save(*self._between)
        stop_if_requested()

    def _save(self, place: Place, lr: float, write_down: Callable[[], None]) -> None:
        now = time.perf_counter()
        write_down()
        totals = self.totals.cpu().clone()
        self._check_finite(float(totals[0]), self.state.epoch + 1, lr)
        self.state.position = Position(place, self.batch, self.images, totals, now - self.started, self.waited)
        self.context.save(self.state)
        self.state.position = None
        self._saved = time.perf_counter()
        self.started += self._saved - now

    def finish(
        self,
        lr: float,
        *,
        kept_share: float | None = None,
        kept_channels: float | None = None,
        sparsity_weight: float | None = None,
        settled: bool = False,
    ) -> None:
        """Record the epoch and count it in the state.

        Raises:
            DivergenceError: the loss or a weight is not a finite number.
        """
        loss, hits = (self.totals / max(self.images, 1)).tolist()
        seconds = time.perf_counter() - self.started
        self.state.elapsed += seconds
        self.state.epoch += 1
        self._check_finite(loss, self.state.epoch, lr)
        record = EpochRecord(
            self.state.step,
            self.stage,
            self.state.epoch,
            self.epochs,
            loss,
            100 * hits,
            lr,
            kept_share,
            sparsity_weight,
            self.images / max(seconds, 1e-9),
            settled,
            kept_channels,
            seconds,
            self.waited,
            None if self._computing is None else time.process_time() - self._computing,
        )
        self.state.records.append(record)
        self.context.observer.epoch_ends(record)

    def _check_finite(self, loss: float, epoch: int, lr: float) -> None:
        problem = None if math.isfinite(loss) else f"the loss became {loss}"
        if problem is None and not _is_finite(self.state):
            problem = "a weight became infinite or not a number"
        if problem is not None:
            raise DivergenceError(
                f"{problem} in step {self.state.step}, {self.stage} stage, epoch {epoch}. "
                f"Lower the learning rate (now {lr:g}) with {self._advice()}."
            )

    def _advice(self) -> str:
        """The options that help in this stage."""
        if self.stage == CLASSIFIER:
            return "--set classifier.lr=…"
        if self.state.masks is None:
            return "--lr"
        # Deep networks do not survive a residual stream whose masks are all zero: behind it nothing varies any more.
        return "--lr, or masks.lr or masks.sparsity, or keep every residual stream alive with masks.floor=0.1"


def _is_finite(state: StepState) -> bool:
    """Whether no weight and no statistic is NaN or infinite: the last batch of an epoch may ruin what its loss does not show."""
    tensors = [value for module in state.modules().values() for value in module.state_dict().values() if value.is_floating_point()]
    return bool(torch.stack([value.isfinite().all() for value in tensors]).all())


def count_batches(images: int, batch_size: int) -> int:
    """Number of batches of a shuffled epoch: a last batch of one image is left out if there are others."""
    full, rest = divmod(images, batch_size)
    return full + (rest > 1 or (rest == 1 and full == 0))
