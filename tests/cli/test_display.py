"""Which display a command gets."""

from __future__ import annotations

import pytest

from der_fast.cli.display import OnlyMessages, watching
from der_fast.training.display import StepLines


def test_quiet_passes_on_messages_only(capsys: pytest.CaptureFixture[str]) -> None:
    OnlyMessages().message("a checkpoint was damaged")
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "note: a checkpoint was damaged\n")


def test_the_right_observer_is_chosen() -> None:
    with watching(quiet=True) as observer:
        assert type(observer) is OnlyMessages
    with watching(quiet=False) as observer:
        assert type(observer) is StepLines
