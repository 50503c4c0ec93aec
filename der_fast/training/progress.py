"""The events of a run for its observers: the seam between training and progress bars, logs and TensorBoard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from der_fast.config.schema import Config


@dataclass(frozen=True)
class EpochRecord:
    """One epoch of one stage; a row of ``history.json``.

    Attributes:
        step: 1-based step.
        stage: 'representation', 'classifier' or 'reference' (the model that forward transfer is measured against).
        epoch, epochs: 1-based epoch, and the stage's number of epochs.
        loss: mean training loss.
        accuracy: training accuracy in percent, on the augmented images during the epoch.
        lr: learning rate.
        kept_share: share of the new extractor's parameters whose channels have a positive logit, in [0, 1]; None without masks.
        sparsity_weight: λ_s; None without masks.
        images_per_s: training images per second.
        settled: the masks were held binary.
        kept_channels: share of the new extractor's maskable channels that have a positive logit, in [0, 1]; None without masks.
        seconds: wall time of the epoch; None in runs of older versions.
        data_seconds: of these, time spent waiting for images.
        processor_seconds: processor time of all threads of this process, on a CPU; None if it was not measured.
    """

    step: int
    stage: str
    epoch: int
    epochs: int
    loss: float
    accuracy: float
    lr: float
    kept_share: float | None
    sparsity_weight: float | None
    images_per_s: float
    settled: bool = False
    kept_channels: float | None = None
    seconds: float | None = None
    data_seconds: float | None = None
    processor_seconds: float | None = None


class Observer:
    """Receives the events of a run; every method does nothing unless overridden."""

    def run_begins(self, steps: int, config: Config) -> None:
        """A run of `steps` steps begins (or resumes)."""

    def step_begins(self, step: int, steps: int, class_names: Sequence[str], images: int) -> None:
        """Step `step` (1-based) begins with these new classes and this many training images (memory included)."""

    def batch_ends(self, step: int, stage: str, epoch: int, epochs: int, batch: int, batches: int, images: int) -> None:
        """A batch (1-based) of `images` images was learned; called often, must be cheap."""

    def epoch_so_far(self, loss: float, accuracy: float, images_per_s: float) -> None:
        """Mean loss, accuracy in percent and speed of the current epoch; called every few seconds, after a `batch_ends`."""

    def epoch_ends(self, record: EpochRecord) -> None:
        """An epoch of a stage ended."""

    def images_pass(self, work: str, done: int, images: int) -> None:
        """Work outside epochs ('evaluation', 'herding', …) has done `done` of its images; called often, must be cheap."""

    def step_ends(self, summary: dict[str, Any]) -> None:
        """A step ended: `step`, whether known classes were `refreshed`, and the figures that `figures.py` declares for SUMMARY."""

    def message(self, text: str) -> None:
        """Something that the user should know: the chosen backend, a skipped image, a damaged checkpoint."""


class Observers(Observer):
    """Passes every event on to several observers."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self.observers = list(observers)

    def run_begins(self, steps: int, config: Config) -> None:
        for observer in self.observers:
            observer.run_begins(steps, config)

    def step_begins(self, step: int, steps: int, class_names: Sequence[str], images: int) -> None:
        for observer in self.observers:
            observer.step_begins(step, steps, class_names, images)

    def batch_ends(self, step: int, stage: str, epoch: int, epochs: int, batch: int, batches: int, images: int) -> None:
        for observer in self.observers:
            observer.batch_ends(step, stage, epoch, epochs, batch, batches, images)

    def epoch_so_far(self, loss: float, accuracy: float, images_per_s: float) -> None:
        for observer in self.observers:
            observer.epoch_so_far(loss, accuracy, images_per_s)

    def epoch_ends(self, record: EpochRecord) -> None:
        for observer in self.observers:
            observer.epoch_ends(record)

    def images_pass(self, work: str, done: int, images: int) -> None:
        for observer in self.observers:
            observer.images_pass(work, done, images)

    def step_ends(self, summary: dict[str, Any]) -> None:
        for observer in self.observers:
            observer.step_ends(summary)

    def message(self, text: str) -> None:
        for observer in self.observers:
            observer.message(text)
