"""Fixtures of the command-line tests: a runner, an API that only takes notes, and one tiny real run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from der_fast.cli.main import app

Run = Callable[..., Result]

METRICS: dict[str, Any] = {
    "protocol": "B0-2",
    "steps": [["cat", "dog"], ["eel", "fox"]],
    "class_names": ["cat", "dog", "eel", "fox"],
    "top1": [90.0, 80.5],
    "top5": [100.0, 99.0],
    "average_top1": 85.25,
    "last_top1": 80.5,
    "average_top5": 99.5,
    "bwt": -1.5,
    "fwt": None,
    "params": [1000, 1800],
    "params_unpruned": [5000, 10000],
    "params_added": [1000, 700],
    "average_params": 1400.0,
    "final_params": 1800,
    "latency_ms": [1.5, 2.5],
    "seconds": [61.0, 3661.0],
}


def run_cli(*arguments: Any) -> Result:
    """Call the command line in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command line, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return run_cli


@dataclass
class Notes:
    """What a command asked the API to do."""

    calls: list[dict[str, Any]] = field(default_factory=list)
    error: BaseException | None = None

    def write_run(self, out: Path, **call: Any) -> None:
        """Note the call and leave what a run leaves."""
        self.calls.append({"out": out, **call})
        if self.error is not None:
            raise self.error
        out.mkdir(parents=True, exist_ok=True)
        (out / "metrics.json").write_text(json.dumps(METRICS))


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Notes:
    """Replaces training by notes of what was asked for."""
    import der_fast.api
    import der_fast.runs

    notes = Notes()
    monkeypatch.setattr(der_fast.runs, "train_run", lambda config, out, **rest: notes.write_run(out, config=config, **rest))
    monkeypatch.setattr(der_fast.api, "learn_run", lambda run, folder, **rest: notes.write_run(run, folder=folder, **rest))
    return notes
