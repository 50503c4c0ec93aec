"""Estimates how long a run will still take, from its epochs so far."""

from __future__ import annotations

import time
from collections.abc import Callable

from der_fast.config.schema import Config


class TimeLeft:
    """Estimates the seconds left in the run.

    The rest of a stage takes its remaining epochs times its average epoch so far; a stage that has not begun uses the epochs of the
    step before; later steps take as long as this one, allowing for schedules of another length. An estimate, not a promise: steps
    grow with the classes seen.
    """

    def __init__(self, config: Config, steps: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.config = config
        self.steps = steps
        self.clock = clock
        self.step = 1
        self.step_began = self.stage_began = clock()
        self.stage = ""
        self.done = 0.0
        self.epochs = 0
        self.began_with = 0.0
        self.seconds_per_epoch: dict[str, float] = {}

    def step_begins(self, step: int) -> None:
        """Record that `step` (1-based) begins now."""
        self.step = step
        self.step_began = self.clock()
        self.stage, self.done, self.epochs = "", 0.0, 0

    def progress(self, stage: str, epochs_done: float, epochs: int, before: float | None = None) -> None:
        """Record that `epochs_done` of a stage's `epochs` are done (a fraction within an epoch).

        Args:
            stage, epochs_done, epochs: see above.
            before: epochs done when the current batch began; default: whole epochs.
        """
        if stage != self.stage:
            self.stage, self.stage_began, self.epochs = stage, self.clock(), epochs
            # A resumed stage may start at any epoch, or within one; what came before took no time in this process.
            self.began_with = int(epochs_done) if before is None else before
        self.done = epochs_done
        covered = epochs_done - self.began_with
        if covered > 0:
            self.seconds_per_epoch[stage] = (self.clock() - self.stage_began) / covered

    def seconds(self) -> float | None:
        """Return the seconds left, or None if nothing is known yet."""
        if self.stage not in self.seconds_per_epoch:
            return None
        left_in_step = (self.epochs - self.done) * self.seconds_per_epoch[self.stage] + self._classifier_seconds()
        this_step = (self.clock() - self.step_began) + left_in_step
        if self.step == 1:
            this_step *= self.config.later.epochs / self.config.first.epochs
        return left_in_step + max(0, self.steps - self.step) * this_step

    def _classifier_seconds(self) -> float:
        """Return how long this step's classifier stage will take, if it is still to come."""
        if self.step == 1 or self.stage != "representation":
            return 0.0
        return self.config.classifier.epochs * self.seconds_per_epoch.get("classifier", 0.0)


def as_clock(seconds: float | None) -> str:
    """Write seconds as ``m:ss`` or ``h:mm:ss``; None as ``–:––``."""
    if seconds is None:
        return "–:––"
    whole = max(0, round(seconds))
    hours, minutes, rest = whole // 3600, whole % 3600 // 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
