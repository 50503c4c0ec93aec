"""What a person sees while training runs: a live bar on a terminal, one line per step elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from der_fast.config.schema import Config
from der_fast.training.progress import EpochRecord, Observer
from der_fast.training.timeleft import TimeLeft, as_clock

# Redrawing costs CPU time that training on two cores would miss.
_REDRAWS_PER_SECOND = 4


class StepLines(Observer):
    """One line per finished step: what is written to files and pipes, and above the live bar on a terminal.

    Args:
        console: where the lines go.
        say: told every message of the run.
    """

    def __init__(self, console: Console, say: Callable[[str], None]) -> None:
        self.console, self.say = console, say
        self.steps = 0
        self.class_names: Sequence[str] = ()

    def run_begins(self, steps: int, config: Config) -> None:
        """Remember the number of steps."""
        self.steps = steps

    def step_begins(self, step: int, steps: int, class_names: Sequence[str], images: int) -> None:
        """Remember which classes the step brings."""
        # A saved run that learns more has more steps than were planned when it began.
        self.steps, self.class_names = max(self.steps, steps), class_names

    def step_ends(self, summary: dict[str, Any]) -> None:
        """Print the step's line."""
        self.console.print(step_line(summary, self.steps, self.class_names), soft_wrap=True)

    def message(self, text: str) -> None:
        """Pass a message on."""
        self.say(text)


class LiveDisplay(StepLines):
    """A bar for the current stage: epoch, loss, accuracy, kept share, images/s, time left."""

    def __init__(self, console: Console, say: Callable[[str], None]) -> None:
        super().__init__(console, say)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[figures]}"),
            console=console,
            refresh_per_second=_REDRAWS_PER_SECOND,
            transient=True,
        )
        self.task: TaskID | None = None
        self.stage = ""
        self.left: TimeLeft | None = None
        self.record: EpochRecord | None = None

    def run_begins(self, steps: int, config: Config) -> None:
        """Show the bar."""
        super().run_begins(steps, config)
        self.left = TimeLeft(config, steps)
        self.progress.start()

    def step_begins(self, step: int, steps: int, class_names: Sequence[str], images: int) -> None:
        """Start the bar of a step."""
        super().step_begins(step, steps, class_names, images)
        self.stage, self.record = "", None
        if self.left is not None:
            self.left.step_begins(step)
        self._show(f"step {step}/{self.steps}", 0.0, 1)
        self.console.print(f"step {step}/{self.steps} begins: {shortened(class_names)}, {images:,} images", style="dim", soft_wrap=True)

    def batch_ends(self, step: int, stage: str, epoch: int, epochs: int, batch: int, batches: int, images: int) -> None:
        """Move the bar within the epoch."""
        self._advance(step, stage, epoch - 1 + batch / batches, epochs, epoch - 1 + (batch - 1) / batches)

    def epoch_ends(self, record: EpochRecord) -> None:
        """Show the epoch's figures."""
        self.record = record
        self._advance(record.step, record.stage, record.epoch, record.epochs)

    def _advance(self, step: int, stage: str, done: float, epochs: int, before: float | None = None) -> None:
        if stage != self.stage:
            self.stage, self.record = stage, self.record if self.record and self.record.stage == stage else None
        if self.left is not None:
            self.left.progress(stage, done, epochs, before)
        self._show(f"step {step}/{self.steps} {stage}", done, epochs)

    def _show(self, description: str, done: float, epochs: int) -> None:
        figures = figures_line(self.record, min(int(done) + 1, epochs), epochs, self.left.seconds() if self.left else None)
        if self.task is None:
            self.task = self.progress.add_task(description, total=epochs, figures=figures)
        self.progress.update(self.task, description=description, total=epochs, completed=done, figures=figures)

    def stop(self) -> None:
        """Take the bar away; what was printed above it stays."""
        self.progress.stop()


def figures_line(record: EpochRecord | None, epoch: int, epochs: int, seconds_left: float | None) -> str:
    """Write the figures beside the bar; before the first epoch has ended there are only epoch and time."""
    parts = [f"epoch {epoch}/{epochs}"]
    if record is not None:
        parts += [f"loss {record.loss:.3f}", f"accuracy {record.accuracy:.1f} %"]
        if record.kept_share is not None:
            channels = "" if record.kept_channels is None else f", channels {100 * record.kept_channels:.0f} %"
            parts.append(f"parameters kept {100 * record.kept_share:.0f} %{channels}{', settled' if record.settled else ''}")
        parts.append(f"{record.images_per_s:,.0f} images/s")
    return "  ".join([*parts, f"left {as_clock(seconds_left)}"])


def step_line(summary: dict[str, Any], steps: int, class_names: Sequence[str]) -> str:
    """Write one finished step as a line of text; figures that are missing are left out."""
    parts = [f"step {summary.get('step')}/{steps}", f"+ {shortened(class_names)}"]
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
