"""Which display a command gets."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from der_fast.cli.display import OnlyMessages, watching
from der_fast.data.io.progress import progress_bar
from der_fast.training.display import LogLines


def test_quiet_passes_on_messages_only(capsys: pytest.CaptureFixture[str]) -> None:
    OnlyMessages().message("a checkpoint was damaged")
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "note: a checkpoint was damaged\n")


def test_the_right_observer_is_chosen() -> None:
    with watching(quiet=True) as observer:
        assert type(observer) is OnlyMessages
    with watching(quiet=False) as observer:
        assert type(observer) is LogLines


def test_quiet_keeps_the_bars_of_loading_away_too(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    for quiet in (True, False):
        terminal = io.StringIO()
        terminal.isatty = lambda: True  # type: ignore[method-assign]
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setenv("TERM", "xterm")
        with watching(quiet), progress_bar("listing photos", 2) as advance:
            advance(1)
        shown.append(terminal.getvalue())
    assert shown[0] == ""
    assert "listing photos" in shown[1]


HASTY = """
import der_fast.runs
from der_fast.cli.main import main
from der_fast.training.display import LogLines
der_fast.runs.write_report = lambda run: run
LogLines.interval = 0.0
main()
"""


def test_a_run_whose_output_goes_to_a_file(tmp_path: Path) -> None:
    """Plain lines about everything that takes time, in any encoding, whatever is said about colours."""
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "TTY_COMPATIBLE": "1"}
    options = ["--train-per-class", "12", "--test-per-class", "4", "--width", "2", "--epochs", "2,1", "--memory", "40"]
    options += ["--set", "classifier.epochs=1", "--set", "runtime.threads=1", "--set", "masks.bn_images=32"]
    command = [sys.executable, "-c", HASTY, "train", "digits", "--protocol", "B0-2", *options, "--out", "run"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, env=environment, check=False)
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.decode("ascii").split(os.linesep)
    for what in ("representation  epoch 1/1", "classifier  epoch 1/1", "batch-norm statistics  0 of 32 images", "herding  60 of 60 images"):
        assert any(line.startswith(f"step 2/2 {what}") for line in lines), what
    assert any(line.startswith("step 2/2 evaluation  40 of 40 images  left 0:0") for line in lines)
    progress = [line for line in lines if line.startswith("step ")]
    assert not any(mark in line for line in progress for mark in "\r\x1b")
    assert b"\x1b[?25l" not in ended.stdout + ended.stderr
