"""What `der_fast.train` and `learn_run` show of a training, and to whom."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from der_fast.api import learn_run, train
from der_fast.data import MemorySource
from der_fast.training import latency
from der_fast.training.progress import Observer

TINY = {
    "model.backbone": "resnet20", "model.width": 2, "memory.total": 20, "masks.bn_images": 16, "masks.floor": 0.5, "runtime.threads": 1,
    **{f"{stage}.{key}": value for stage in ("first", "later", "classifier")
       for key, value in {"epochs": 1, "milestones": (), "warmup_epochs": 0, "batch_size": 16, "lr": 0.02}.items()},
}  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """One call per timing and no pictures; nothing in the environment that says what standard error is."""
    monkeypatch.setattr(latency, "REPEATS", 1)
    monkeypatch.setattr("der_fast.runs.write_report", lambda run: run)
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")


def noise(names: str, each: int = 6) -> MemorySource:
    images = torch.randint(0, 256, (each * len(names), 8, 8, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    return MemorySource(images, torch.arange(len(names)).repeat_interleave(each), list(names))


def folder_of(folder: Path, names: str, each: int = 6) -> Path:
    for name in names:
        (folder / name).mkdir(parents=True)
        for index in range(each):
            Image.new("RGB", (8, 8), (40 * ord(name) % 256, 30 * index, 99)).save(folder / name / f"{index}.png")
    return folder


def test_training_and_learning_more_are_shown_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    run = tmp_path / "run"
    train((noise("abcd"), noise("abcd", 2)), "B0-2", out=run, settings=TINY)
    assert "step 1/2  + " in terminal.getvalue()
    assert "step 2/2  + " in terminal.getvalue()
    assert "note: backend " in terminal.getvalue()
    before = len(terminal.getvalue())
    learn_run(run, folder_of(tmp_path / "more", "ef"), overrides=TINY)
    assert "step 3/3  + e, f" in terminal.getvalue()[before:]
    # Results are the caller's: nothing is written to standard output.
    assert capfd.readouterr().out == ""


def test_a_switch_and_an_observer_keep_it_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    run = tmp_path / "run"
    train((noise("abcd"), noise("abcd", 2)), "B0-2", out=run, settings=TINY, progress=False)
    learn_run(run, folder_of(tmp_path / "more", "ef"), overrides=TINY, progress=False)
    assert terminal.getvalue() == ""
    train((noise("abcd"), noise("abcd", 2)), "B0-2", settings=TINY, observer=Observer())
    assert terminal.getvalue() == ""


SCRIPT = """
import torch
import der_fast
from der_fast.data import MemorySource
from der_fast.training.display import LogLines
LogLines.interval = 0.0
images = torch.randint(0, 256, (24, 8, 8, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
source = MemorySource(images, torch.arange(4).repeat_interleave(6), ["a", "b×\\r", "猫", "d"])
der_fast.train((source, source), "B0-2", settings={settings}, progress={progress})
print("done")
"""


@pytest.mark.parametrize("progress", [None, True])
def test_a_process_whose_output_goes_to_files(progress: bool | None, tmp_path: Path) -> None:
    """A job: neither stream is a terminal, nothing is UTF-8, colours are asked for. Lines only on request, and plain ones."""
    script = tmp_path / "job.py"
    script.write_text(SCRIPT.replace("{settings}", repr(TINY)).replace("{progress}", repr(progress)), encoding="utf-8")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii:strict", "FORCE_COLOR": "1", "TTY_COMPATIBLE": "1"}
    ended = subprocess.run([sys.executable, script], capture_output=True, env=environment, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == [b"done"]
    lines = ended.stderr.decode("ascii").split(os.linesep)
    if progress is None:
        assert lines == [""]
        return
    assert not any(mark in line for line in lines for mark in "\r\x1b")
    steps = [line for line in lines if line.startswith(("step 1/2  + ", "step 2/2  + "))]
    assert len(steps) == 2
    assert "bx\\r" in "".join(steps) and "\\u732b" in "".join(steps)
    for what in ("representation", "herding", "evaluation", "classifier"):
        assert any(line.startswith(f"step 2/2 {what}  ") for line in lines), what
