"""Which display a command gets."""

from __future__ import annotations

import io
import sys

import pytest

from der_fast.cli.display import OnlyMessages, watching
from der_fast.data.progress import progress_bar
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
