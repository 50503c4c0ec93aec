"""What a person sees while training runs, and how long it says that it will take."""

from __future__ import annotations

import io
import re
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
from rich.console import Console

from der_fast.config.schema import Config
from der_fast.config.tree import replace_keys
from der_fast.data import MemorySource
from der_fast.data.io.progress import bars_told_to, progress_bar, takes_a_bar
from der_fast.training.display import LiveDisplay, LogLines, NotebookDisplay, StepLines
from der_fast.training.progress import EpochRecord, Observer
from der_fast.training.run import run_protocol
from der_fast.training.standing import figures_line, shortened, step_line
from der_fast.training.timeleft import TimeLeft, as_clock

RECORD = EpochRecord(2, "representation", 3, 10, 0.5, 81.25, 0.1, 0.42, 1.0, 1234.5)
SUMMARY = {"step": 2, "top1": 91.234, "params": 1800, "params_unpruned": 10000, "seconds": 75.2}


class Clock:
    """A clock that only moves when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


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


def test_lines_of_steps() -> None:
    lines, said = list[str](), list[str]()
    play(StepLines(lines.append, said.append))
    assert [line[:8] for line in lines] == ["step 1/2", "step 2/2"]
    assert said == ["a checkpoint was damaged"]


class SlowRun(LogLines):
    """A run whose every batch, and every batch of images to be measured, takes 7 s."""

    def moved(self, done: float, of: float) -> None:
        self.clock.now += 7  # type: ignore[attr-defined]
        super().moved(done, of)


def test_a_line_a_minute_through_a_whole_run(tiny: Callable[..., Config], synthetic: Callable[..., MemorySource]) -> None:
    clock, lines = Clock(), list[tuple[float, str]]()
    config = tiny({"protocol.name": "B0-2", "runtime.eval_batch_size": 1, "method.fwt": True, "later.batch_size": 2, "masks.bn_images": 20})
    config = replace_keys(config, {"later.epochs": 20, "classifier.batch_size": 2, "classifier.epochs": 20})
    watching = SlowRun(lambda text: lines.append((clock.now, text)), print, clock)
    run_protocol(config, synthetic("abcd", 12), synthetic("abcd", 12, seed=1), None, observer=watching)
    times = [100.0, *(when for when, _ in lines)]
    assert max(later - earlier for earlier, later in pairwise(times)) <= 60 + 7
    text = [line for _, line in lines]
    assert len(text) > 20
    for what in ("representation", "classifier", "reference", "evaluation", "herding"):
        assert any(line.startswith(f"step 2/2 {what}") for line in text), what
    later = [line for line in text if line.startswith("step 2/2 representation")][-1]
    assert re.fullmatch(
        r"step 2/2 representation  epoch \d+/20(  batch \d+/\d+)?  loss \d+\.\d{3}  accuracy \d+\.\d %  parameters kept .* left \d+:\d\d",
        later,
    )
    assert any(re.fullmatch(r"step 2/2 evaluation  \d+ of 48 images  left \d+:\d\d", line) for line in text)
    assert text[-1].startswith("step 2/2  + ")
    assert not any(mark in line for line in text for mark in "\r\n\x1b")


def test_steps_of_less_than_a_minute_are_one_line_each() -> None:
    clock, lines = Clock(), list[str]()

    class Run(LogLines):
        def moved(self, done: float, of: float) -> None:
            self.clock.now += 59 / 7  # type: ignore[attr-defined]
            super().moved(done, of)

    play(Run(lines.append, print, clock))
    assert [line[:12] for line in lines] == ["step 1/2  + ", "step 2/2  + "]


def test_silence_is_broken_though_nothing_is_told() -> None:
    """A data set may take minutes to be listed, a single batch too: then a thread keeps time."""
    clock, lines, waits = Clock(), list[str](), list[float]()
    display = LogLines(lines.append, print, clock)

    def wait(seconds: float) -> bool:
        waits.append(seconds)
        if len(waits) == 2:
            display.run_begins(3, Config())
            display.step_begins(1, 3, ["cat"], 10)
            display.batch_ends(1, "representation", 1, 4, 1, 2, 5)
            display.epoch_so_far(0.25, 75.0, 50.0)
        if len(waits) == 3:
            # A line that comes from elsewhere meanwhile is a line, too.
            clock.now += 20
            display.step_ends(SUMMARY)
            clock.now -= 20
        clock.now += seconds
        return len(waits) == 5

    display.keep_ticking(wait)
    assert waits == [60, 60, 60, 20, 60]
    assert lines[0] == "preparing: reading the data set"
    assert lines[1] == "step 1/3 representation  epoch 1/4  batch 1/2  loss 0.250  accuracy 75.0 %  50 images/s  left 2:00"
    assert lines[2].startswith("step 2/3  + cat")
    assert lines[3].startswith("step 1/3 ended  left ")
    assert len(lines) == 4


def test_loading_is_told_in_lines_too() -> None:
    clock, lines = Clock(), list[str]()
    display = LogLines(lines.append, print, clock)
    with bars_told_to(display.loads), progress_bar("listing photos", 4000) as advance:
        for _ in range(4):
            clock.now += 30
            advance(1000)
    with bars_told_to(display.loads), progress_bar("downloading", None, in_bytes=True) as advance:
        clock.now += 60
        advance(5000)
    assert lines == ["listing photos  2,000 of 4,000", "listing photos  4,000 of 4,000", "downloading  5,000 bytes"]
    display.run_begins(1, Config())
    assert display.line() == "preparing the first step"


def test_the_thread_writes_lines_and_ends_with_the_run() -> None:
    written = threading.Event()

    class Hasty(LogLines):
        interval = 0.0

    display = Hasty(lambda text: written.set(), print)
    with display.ticking():
        assert written.wait(30)
    assert "der_fast progress" not in {thread.name for thread in threading.enumerate()}


def test_the_thread_gives_up_where_nothing_can_be_written() -> None:
    tried = threading.Event()

    class Hasty(LogLines):
        interval = 0.0

    def broken(text: str) -> None:
        tried.set()
        raise BrokenPipeError

    display = Hasty(broken, print)
    with display.ticking():
        assert tried.wait(30)
    with pytest.raises(BrokenPipeError):
        display.step_ends(SUMMARY)


def test_a_notebook_shows_one_text_that_is_rewritten() -> None:
    clock, texts = Clock(), list[str]()
    display = NotebookDisplay(texts.append, clock)
    assert texts == ["preparing: reading the data set"]
    play(display)
    # The clock stands still: nothing but what stays is shown.
    assert len(texts) == 4
    clock.now += 1
    display.batch_ends(2, "representation", 1, 4, 1, 2, 5)
    assert texts[-1].splitlines()[-1].startswith("step 2/2 representation  epoch 1/4  batch 1/2  left")
    display.stop()
    assert [line[:10] for line in texts[-1].splitlines()] == ["step 1/2  ", "step 2/2  ", "note: a ch"]


@pytest.mark.parametrize(
    ("tty", "environment", "bar"),
    [
        (True, {"TERM": "xterm"}, True),
        (True, {"TERM": "xterm", "NO_COLOR": "1"}, True),
        (True, {"TERM": "dumb"}, False),
        (False, {"TERM": "xterm"}, False),
        (False, {"TERM": "xterm", "FORCE_COLOR": "1"}, False),
        (False, {"TERM": "xterm", "TTY_COMPATIBLE": "1"}, False),
        (False, {}, False),
    ],
)
def test_where_a_bar_can_be_drawn(tty: bool, environment: dict[str, str], bar: bool) -> None:
    stream = io.StringIO()
    stream.isatty = lambda: tty  # type: ignore[method-assign]
    assert takes_a_bar(Console(file=stream, _environ=environment)) is bar


def test_no_colour_is_drawn_where_none_is_wanted() -> None:
    stream = io.StringIO()
    stream.isatty = lambda: True  # type: ignore[method-assign]
    display = LiveDisplay(Console(file=stream, width=150, highlight=False, _environ={"TERM": "xterm-256color", "NO_COLOR": "1"}), print)
    play(display)
    display.progress.refresh()
    display.stop()
    assert "step 1/2  + cat" in stream.getvalue()
    assert not re.search("\x1b\\[[0-9;]*3[0-9][0-9;]*m", stream.getvalue())


def test_what_is_printed_to_a_file_does_not_end_on_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    display = LiveDisplay(Console(file=stream, force_terminal=True, width=150), print)
    display.run_begins(1, Config())
    print("a user's own line")
    print("a note", file=sys.stderr)
    display.stop()
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("a user's own line\n", "a note\n")
    assert "own line" not in stream.getvalue()


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
    assert "epoch 1/4  batch 1/2  left 0:0" in display.line()
    display.stop()


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
