"""What a person sees while training runs, and how long it says that it will take."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from der_fast.config.schema import Config
from der_fast.config.tree import replace_keys
from der_fast.training.display import LiveDisplay, StepLines, figures_line, shortened, step_line
from der_fast.training.progress import EpochRecord, Observer
from der_fast.training.timeleft import TimeLeft, as_clock

RECORD = EpochRecord(2, "representation", 3, 10, 0.5, 81.25, 0.1, 0.42, 1.0, 1234.5)
SUMMARY = {"step": 2, "top1": 91.234, "params": 1800, "params_unpruned": 10000, "seconds": 75.2}


def play(observer: Observer, steps: int = 2, config: Config | None = None) -> None:
    """Send the events of a small run."""
    observer.run_begins(steps, config or Config())
    for step in range(1, steps + 1):
        # Training may not know how many steps will follow.
        observer.step_begins(step, step, ["cat", "dog"], 64)
        for epoch in (1, 2):
            for batch in (1, 2):
                observer.batch_ends(step, "representation", epoch, 2, batch, 2, 32)
            observer.epoch_ends(replace(RECORD, step=step, epoch=epoch, epochs=2))
        observer.step_ends({**SUMMARY, "step": step})
    observer.message("a checkpoint was damaged")


def test_figures_beside_the_bar() -> None:
    assert figures_line(RECORD, 4, 10, 61) == "epoch 4/10  loss 0.500  accuracy 81.2 %  parameters kept 42 %  1,234 images/s  left 1:01"
    settled = replace(RECORD, settled=True, kept_channels=0.61)
    assert "  parameters kept 42 %, channels 61 %, settled  " in figures_line(settled, 4, 10, 61)
    assert "kept" not in figures_line(replace(RECORD, kept_share=None), 4, 10, 61)
    assert figures_line(None, 1, 10, None) == "epoch 1/10  left –:––"


def test_step_line() -> None:
    expected = "step 2/5  + cat, dog  top-1 91.23 %  1,800 parameters (18 % of 10,000)  1:15"
    assert step_line(SUMMARY, 5, ["cat", "dog"]) == expected
    assert step_line({"step": 1, "top1": None, "params": 10, "params_unpruned": 10}, 5, ["cat"]) == "step 1/5  + cat  10 parameters"
    assert shortened(list("abcdefg")) == "a, b, c, d and 3 more"


def test_lines_off_a_terminal() -> None:
    stream, said = io.StringIO(), list[str]()
    play(StepLines(Console(file=stream, width=40), said.append))
    lines = stream.getvalue().splitlines()
    assert [line[:8] for line in lines] == ["step 1/2", "step 2/2"]
    assert said == ["a checkpoint was damaged"]


def test_live_display_on_a_terminal() -> None:
    stream = io.StringIO()
    display = LiveDisplay(Console(file=stream, force_terminal=True, width=150, highlight=False, markup=False), print)
    play(display)
    display.progress.refresh()
    display.stop()
    shown = stream.getvalue()
    assert "step 1/2 begins: cat, dog, 64 images" in shown
    assert "step 2/2  + cat, dog  top-1 91.23 %" in shown
    assert "accuracy 81.2 %" in shown
    assert "1,234 images/s" in shown
    assert display.progress.finished


def test_live_display_of_a_run_that_learns_more() -> None:
    display = LiveDisplay(Console(file=io.StringIO(), force_terminal=True, width=150), print)
    display.run_begins(1, Config())
    display.step_begins(6, 6, ["eel"], 10)
    display.batch_ends(6, "representation", 1, 4, 1, 2, 5)
    assert display.steps == 6
    assert display.left is not None
    assert (display.left.seconds() or 0) >= 0
    display.stop()


class Clock:
    """A clock that only moves when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


CONFIG = replace_keys(Config(), {"first.epochs": 4, "later.epochs": 8, "classifier.epochs": 10})


def test_time_left_in_the_first_step() -> None:
    clock = Clock()
    left = TimeLeft(CONFIG, 3, clock)
    left.step_begins(1)
    assert left.seconds() is None
    clock.now += 10
    left.progress("representation", 0, 4)
    assert left.seconds() is None
    clock.now += 6
    left.progress("representation", 2, 4)
    # 3 s per epoch: 2 epochs are left; this step takes 10 + 6 + 6 s, later ones twice that (8 epochs, not 4).
    assert left.seconds() == pytest.approx(6 + 2 * 44)


def test_time_left_counts_the_classifier_stage_once_it_is_known() -> None:
    clock = Clock()
    left = TimeLeft(CONFIG, 3, clock)
    left.step_begins(2)
    left.progress("representation", 0, 8)
    clock.now += 8
    left.progress("representation", 8, 8)
    left.progress("classifier", 0, 10)
    clock.now += 5
    left.progress("classifier", 5, 10)
    assert left.seconds() == pytest.approx(5 + (8 + 5 + 5))
    left.step_begins(3)
    left.progress("representation", 0, 8)
    clock.now += 4
    left.progress("representation", 2, 8)
    # 6 epochs of 2 s, then 10 epochs of the classifier stage at 1 s; no step follows.
    assert left.seconds() == pytest.approx(12 + 10)


def test_time_left_of_a_resumed_stage_counts_only_what_was_run() -> None:
    clock = Clock()
    left = TimeLeft(CONFIG, 1, clock)
    left.step_begins(1)
    left.progress("representation", 2.0, 4)
    clock.now += 5
    left.progress("representation", 3.0, 4)
    assert left.seconds() == pytest.approx(5)


def test_time_left_of_a_stage_resumed_in_the_middle_of_an_epoch() -> None:
    clock = Clock()
    left = TimeLeft(CONFIG, 1, clock)
    left.step_begins(1)
    left.progress("representation", 2.5, 4, 2.25)
    clock.now += 3
    left.progress("representation", 3.0, 4, 2.75)
    # 3/4 of an epoch took 3 s.
    assert left.seconds() == pytest.approx(4)


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "–:––"), (0, "0:00"), (59.6, "1:00"), (61, "1:01"), (3599.4, "59:59"), (3661, "1:01:01"), (-3, "0:00")]
)
def test_as_clock(seconds: float | None, text: str) -> None:
    assert as_clock(seconds) == text
