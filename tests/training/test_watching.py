"""Where Python code that trains shows its progress."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from der_fast.config.schema import Config
from der_fast.data import MemorySource
from der_fast.training.display import LiveDisplay, LogLines, NotebookDisplay
from der_fast.training.learner import Learner
from der_fast.training.progress import Observer, Observers
from der_fast.training.watching import in_notebook, watched

Tiny = Callable[..., Config]
Images = Callable[..., MemorySource]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def on_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Make standard error a terminal; within a test, because pytest puts its own in place before each."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


class Handle:
    """What IPython's `display` returns: a place whose contents can be replaced."""

    def __init__(self, content: dict[str, str]) -> None:
        self.contents = [content]

    def update(self, content: dict[str, str], *, raw: bool) -> None:
        assert raw
        self.contents.append(content)


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> list[Handle]:
    """A kernel without ipywidgets; returns what is displayed."""
    handles: list[Handle] = []

    def display(content: dict[str, str], *, raw: bool, display_id: bool) -> Handle:
        assert raw and display_id
        handles.append(Handle(content))
        return handles[-1]

    package, module = ModuleType("IPython"), ModuleType("IPython.display")
    package.get_ipython = lambda: SimpleNamespace(kernel=object())  # type: ignore[attr-defined]
    module.display = display  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", package)
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    return handles


def kinds(observer: Observer) -> list[type[Any]]:
    return [type(each) for each in (observer.observers if isinstance(observer, Observers) else [observer])]


class Own(Observer):
    """A caller's observer."""


@pytest.mark.parametrize(
    ("progress", "given", "expected"),
    [
        (None, False, [LiveDisplay]),
        (None, True, [Own]),
        (True, False, [LiveDisplay]),
        (True, True, [Own, LiveDisplay]),
        (False, False, [Observer]),
        (False, True, [Own]),
    ],
)
def test_on_a_terminal(monkeypatch: pytest.MonkeyPatch, progress: bool | None, given: bool, expected: list[type[Any]]) -> None:
    on_terminal(monkeypatch)
    with watched(Own() if given else None, progress) as observer:
        assert kinds(observer) == expected


@pytest.mark.parametrize(
    ("progress", "given", "expected"),
    [
        (None, False, [Observer]),
        (None, True, [Own]),
        (True, False, [LogLines]),
        (True, True, [Own, LogLines]),
        (False, False, [Observer]),
    ],
)
def test_elsewhere(progress: bool | None, given: bool, expected: list[type[Any]]) -> None:
    with watched(Own() if given else None, progress) as observer:
        assert kinds(observer) == expected


def test_a_dumb_terminal_gets_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    on_terminal(monkeypatch)
    monkeypatch.setenv("TERM", "dumb")
    with watched(None, True) as observer:
        assert kinds(observer) == [LogLines]


def test_in_a_notebook(notebook: list[Handle]) -> None:
    with watched(None, None) as observer:
        assert kinds(observer) == [NotebookDisplay]
        observer.message("this is worth knowing")
    assert len(notebook) == 1
    assert notebook[0].contents[-1] == {"text/plain": "note: this is worth knowing"}


def test_ipython_in_a_terminal_is_a_terminal(notebook: list[Handle], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["IPython"], "get_ipython", lambda: SimpleNamespace())
    assert in_notebook() is None
    monkeypatch.setattr(sys.modules["IPython"], "get_ipython", lambda: None)
    assert in_notebook() is None
    monkeypatch.delitem(sys.modules, "IPython")
    assert in_notebook() is None


def test_whoever_looked_on_may_go(monkeypatch: pytest.MonkeyPatch, tiny: Tiny, synthetic: Images) -> None:
    class Gone(io.StringIO):
        writes = 0

        def write(self, text: str) -> int:
            self.writes += 1
            raise OSError(5, "Input/output error")

    gone = Gone()
    monkeypatch.setattr(sys, "stderr", gone)
    assert Learner(tiny()).learn(synthetic("ab"), progress=True).step == 1
    assert gone.writes > 0


def test_a_process_without_standard_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """pythonw on Windows has none."""
    monkeypatch.setattr(sys, "stderr", None)
    for progress in (None, True, False):
        with watched(None, progress) as observer:
            assert kinds(observer) == [Observer]


def test_a_learner_shows_its_steps(monkeypatch: pytest.MonkeyPatch, tiny: Tiny, synthetic: Images) -> None:
    terminal = on_terminal(monkeypatch)
    learner = Learner(tiny())
    before = learner.observer
    learner.learn(synthetic("ab"), synthetic("ab", 2, seed=1))
    learner.learn(synthetic("cd"))
    assert learner.observer is before
    shown = terminal.getvalue()
    assert "step 1/1 begins: a, b, 10 images" in shown
    assert "step 1/1  + a, b  top-1" in shown
    assert "step 2/2  + c, d  " in shown


@pytest.mark.parametrize("given", [True, False])
def test_a_learner_is_silent_where_it_should_be(
    monkeypatch: pytest.MonkeyPatch, tiny: Tiny, synthetic: Images, watcher: Any, given: bool
) -> None:
    terminal = on_terminal(monkeypatch)
    learner = Learner(tiny(), observer=watcher) if given else Learner(tiny())
    learner.learn(synthetic("ab"), progress=None if given else False)
    assert terminal.getvalue() == ""
    assert len(watcher.summaries) == given


def test_a_learner_that_fails_has_its_observer_back(monkeypatch: pytest.MonkeyPatch, tiny: Tiny, synthetic: Images) -> None:
    terminal = on_terminal(monkeypatch)
    learner = Learner(tiny())
    before = learner.observer
    learner.learn(synthetic("ab"))
    with pytest.raises(Exception, match="known"):
        learner.learn(synthetic("ab"))
    assert learner.observer is before
    # The cursor is visible again, and the bar is gone.
    assert terminal.getvalue().rindex("\x1b[?25h") > terminal.getvalue().rindex("\x1b[?25l")
