"""What a person sees while training runs: a live bar on a terminal, one line of text in a notebook, occasional lines elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from der_fast.config.schema import Config
from der_fast.data.io.progress import is_terminal
from der_fast.training.standing import Standing, shortened, step_line

# Redrawing costs CPU time that training on two cores needs.
_REDRAWS_PER_SECOND = 4
# A notebook sends every change through a socket and keeps it.
_NOTEBOOK_SECONDS = 1.0
_SECONDS_BETWEEN_LINES = 60.0


class StepLines(Standing):
    """One line per finished step.

    Args:
        show: called with every line.
        say: called with every message of the run.
        clock: seconds, from any origin.
    """

    def __init__(self, show: Callable[[str], None], say: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(clock)
        self.show, self.say = show, say

    def step_ends(self, summary: dict[str, Any]) -> None:
        """Show the step's line."""
        super().step_ends(summary)
        self.show(step_line(summary, self.steps, self.class_names))

    def message(self, text: str) -> None:
        """Pass a message on."""
        self.say(text)


class LogLines(StepLines):
    """For files, pipes and logs: a line per finished step, and the state of the run after every minute without a line.

    Attributes:
        interval: seconds.
    """

    interval = _SECONDS_BETWEEN_LINES

    def __init__(self, show: Callable[[str], None], say: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(self._show, say, clock)
        self._write = show
        self._last = clock()
        self._lock = threading.Lock()

    def _show(self, text: str) -> None:
        with self._lock:
            self._last = self.clock()
            self._write(text)

    def moved(self, done: float, of: float) -> None:
        """Write a line if it is time."""
        self.tick()

    def tick(self) -> None:
        """Write the state of the run if the last line is `interval` old."""
        with self._lock:
            if self.clock() - self._last < self.interval:
                return
            self._last = self.clock()
            self._write(self.line())

    def keep_ticking(self, wait: Callable[[float], bool]) -> None:
        """Tick whenever a line is due, until `wait` (called with seconds) returns True."""
        while not wait(max(self._last + self.interval - self.clock(), 0.0)):
            self.tick()

    @contextmanager
    def ticking(self) -> Iterator[None]:
        """Tick inside the block, even without events: a step of preparation or a single batch may take minutes."""
        over = threading.Event()

        def run() -> None:
            # If nothing can be written any more, training itself notices and reports it.
            with suppress(OSError, ValueError):
                self.keep_ticking(over.wait)

        thread = threading.Thread(target=run, name="der_fast progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


class LiveDisplay(StepLines):
    """A bar for the current stage, with its figures; finished steps stay above it.

    Args:
        console: a terminal.
        say: called with every message of the run.
    """

    def __init__(self, console: Console, say: Callable[[str], None]) -> None:
        super().__init__(lambda text: console.print(text, soft_wrap=True), say)
        self.console = console
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[figures]}"),
            console=console,
            refresh_per_second=_REDRAWS_PER_SECOND,
            transient=True,
            # What is printed to a file while the bar is up must not end up on the terminal.
            redirect_stdout=is_terminal(sys.stdout),
            redirect_stderr=is_terminal(sys.stderr),
        )
        self.task: TaskID | None = None

    def run_begins(self, steps: int, config: Config) -> None:
        """Show the bar."""
        super().run_begins(steps, config)
        self.progress.start()

    def step_begins(self, step: int, steps: int, class_names: Sequence[str], images: int) -> None:
        """Start the bar of a step."""
        super().step_begins(step, steps, class_names, images)
        self.console.print(f"step {step}/{self.steps} begins: {shortened(class_names)}, {images:,} images", style="dim", soft_wrap=True)

    def moved(self, done: float, of: float) -> None:
        """Move the bar."""
        figures = self.figures(batch=False)
        if self.task is None:
            self.task = self.progress.add_task(self.title, total=of, figures=figures)
        self.progress.update(self.task, description=self.title, total=of, completed=done, figures=figures)

    def stop(self) -> None:
        """Remove the bar; what was printed above it stays."""
        self.progress.stop()


class NotebookDisplay(StepLines):
    """Finished steps, messages and the state of the run as text below the cell, rewritten in place; needs no widgets.

    Args:
        rewrite: shows a text in place of the previous one.
        clock: seconds, from any origin.
    """

    def __init__(self, rewrite: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(self._keep, lambda text: self._keep(f"note: {text}"), clock)
        self.rewrite = rewrite
        self.kept: list[str] = []
        self._last = clock() - _NOTEBOOK_SECONDS
        self.moved(0.0, 1)

    def _keep(self, text: str) -> None:
        self.kept.append(text)
        self.rewrite("\n".join(self.kept))

    def moved(self, done: float, of: float) -> None:
        """Rewrite the line if a second has passed since the last time."""
        now = self.clock()
        if now - self._last >= _NOTEBOOK_SECONDS:
            self._last = now
            self.rewrite("\n".join([*self.kept, self.line()]))

    def stop(self) -> None:
        """Leave only what is finished."""
        if self.kept:
            self.rewrite("\n".join(self.kept))
