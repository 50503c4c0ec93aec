"""The state of a run in one line of text, composed from its events."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from der_fast.config.schema import Config
from der_fast.training.progress import EpochRecord, Observer
from der_fast.training.timeleft import TimeLeft, as_clock


class Standing(Observer):
    """Tracks step, stage, epoch, batch, figures and time left; displays build on it.

    Args:
        clock: seconds, from any origin.

    Attributes:
        steps: number of steps of the run.
        class_names: the classes of the current step.
        title: step and stage, or other work in progress.
        record: the newest figures of the stage; in a long epoch, those of the current epoch.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.steps = 0
        self.class_names: Sequence[str] = ()
        self.title = "preparing: reading the data set"
        self.record: EpochRecord | None = None
        self._left: TimeLeft | None = None
        self._step = 0
        self._stage = ""
        self._done = (0.0, 1)
        self._where = ""

    def moved(self, done: float, of: float) -> None:
        """Called after every event of the current work, with the amount done and its total, in epochs or images."""

    def loads(self, what: str, how_far: str) -> None:
        """Take what a loading bar would show."""
        before = self.title, self._where
        self.title, self._where = what, how_far
        self.moved(0.0, 1)
        if self._step:
            # Between two batches: training is more interesting than the loading for it.
            self.title, self._where = before

    def run_begins(self, steps: int, config: Config) -> None:
        """Remember the number of steps."""
        self.steps = steps
        self._left = TimeLeft(config, steps, self.clock)
        self.title, self._where = "preparing the first step", ""

    def step_begins(self, step: int, steps: int, class_names: Sequence[str], images: int) -> None:
        """Remember the step's classes."""
        # A saved run that learns more has more steps than were planned at the start.
        self._step, self.steps, self.class_names = step, max(self.steps, steps), class_names
        self._stage, self.record, self._where = "", None, ""
        if self._left is not None:
            self._left.step_begins(step)
        self.title = f"step {step}/{self.steps} begins"
        self.moved(0.0, 1)

    def batch_ends(self, step: int, stage: str, epoch: int, epochs: int, batch: int, batches: int, images: int) -> None:
        """Advance within the epoch."""
        within = f"batch {batch}/{batches}" if batch < batches else ""
        self._advance(step, stage, epoch - 1 + batch / batches, epochs, epoch - 1 + (batch - 1) / batches, within)

    def epoch_so_far(self, loss: float, accuracy: float, images_per_s: float) -> None:
        """Take the figures of the current epoch, and the rest from the previous one."""
        before = self.record or EpochRecord(self._step, self._stage, 1, self._done[1], loss, accuracy, math.nan, None, None, images_per_s)
        self.record = replace(before, loss=loss, accuracy=accuracy, images_per_s=images_per_s)
        self.moved(*self._done)

    def epoch_ends(self, record: EpochRecord) -> None:
        """Take the epoch's figures."""
        self.record = record
        self._advance(record.step, record.stage, record.epoch, record.epochs)

    def _advance(self, step: int, stage: str, done: float, epochs: int, before: float | None = None, within: str = "") -> None:
        if stage != self._stage:
            self._stage, self.record = stage, self.record if self.record and self.record.stage == stage else None
        if self._left is not None:
            self._left.progress(stage, done, epochs, before)
        self._step, self._done = step, (done, epochs)
        self.title, self._where = f"step {step}/{self.steps} {stage}", within
        self.moved(done, epochs)

    def images_pass(self, work: str, done: int, images: int) -> None:
        """Advance in work outside epochs."""
        self.title = f"step {self._step}/{self.steps} {work}" if self._step else work
        self._where = f"{done:,} of {images:,} images"
        # An evaluation must not show training figures.
        self._stage, self.record, self._done = "", None, (0.0, 0)
        self.moved(done, images)

    def step_ends(self, summary: dict[str, Any]) -> None:
        """Show the step as ended; the next one may follow."""
        self.title, self._where, self._stage, self.record, self._done = f"step {self._step}/{self.steps} ended", "", "", None, (0.0, 0)

    def figures(self, *, batch: bool = True) -> str:
        """Write epoch, batch (unless a bar shows it), loss, accuracy, kept share, speed and time left, as far as known."""
        done, epochs = self._done
        left = self._left.seconds() if self._left is not None else None
        if not epochs or not self._stage:
            return "  ".join([*([self._where] if self._where else []), *([] if left is None else [f"left {as_clock(left)}"])])
        return figures_line(self.record, min(int(done) + 1, epochs), epochs, left, self._where if batch else "")

    def line(self) -> str:
        """Write everything in one line."""
        return f"{self.title}  {self.figures()}".rstrip()


def figures_line(record: EpochRecord | None, epoch: int, epochs: int, seconds_left: float | None, within: str = "") -> str:
    """Write an epoch's figures; until the first are known, only epoch and time."""
    parts = [f"epoch {epoch}/{epochs}", *([within] if within else [])]
    if record is not None:
        parts += [f"loss {record.loss:.3f}", f"accuracy {record.accuracy:.1f} %"]
        if record.kept_share is not None:
            channels = "" if record.kept_channels is None else f", channels {100 * record.kept_channels:.0f} %"
            parts.append(f"parameters kept {100 * record.kept_share:.0f} %{channels}{', settled' if record.settled else ''}")
        parts.append(f"{record.images_per_s:,.0f} images/s")
    return "  ".join([*parts, f"left {as_clock(seconds_left)}"])


def step_line(summary: dict[str, Any], steps: int, class_names: Sequence[str]) -> str:
    """Write one finished step as a line of text; missing figures are left out."""
    what = f"refreshed: {shortened(class_names)}" if summary.get("refreshed") else f"+ {shortened(class_names)}"
    parts = [f"step {summary.get('step')}/{steps}", what]
    if summary.get("top1") is not None:
        parts.append(f"top-1 {summary['top1']:.2f} %")
    params, unpruned = summary.get("params"), summary.get("params_unpruned")
    if params is not None:
        share = f" ({100 * params / unpruned:.0f} % of {unpruned:,})" if unpruned and unpruned != params else ""
        parts.append(f"{params:,} parameters{share}")
    if summary.get("seconds") is not None:
        parts.append(as_clock(summary["seconds"]))
    return "  ".join(parts)


def shortened(names: Sequence[str], most: int = 4) -> str:
    """List the first names and count the rest."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
