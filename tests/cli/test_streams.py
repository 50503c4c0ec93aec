"""Output that goes away: `| head`, a full disk, a closed terminal. Results end with it in a sentence; a training goes on without it."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from der_fast.cli import streams
from der_fast.cli.console import output, say_note
from der_fast.cli.main import app
from der_fast.cli.streams import OutputLost, Stream, guarded, outlived

FULL = Path("/dev/full")
Run = Callable[..., Result]


class Failing(io.StringIO):
    """Takes so many writes, then fails."""

    def __init__(self, number: int, writes: int = 0) -> None:
        super().__init__()
        self.number, self.left = number, writes

    def write(self, text: str) -> int:
        self.left -= 1
        if self.left < 0:
            raise OSError(self.number, os.strerror(self.number))
        return super().write(text)


def command(arguments: Sequence[object], prepare: str = "") -> list[str]:
    """A process that runs the command line; `prepare` is Python that runs before."""
    code = f"import sys\n{prepare}\nfrom der_fast.cli.main import main\nsys.argv = {['der-fast', *map(str, arguments)]!r}\nmain()"
    return [sys.executable, "-c", code]


def ended(arguments: Sequence[object], prepare: str = "", **streams: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(arguments, prepare), stderr=subprocess.PIPE, text=True, timeout=240, **streams)


def without_reader(arguments: Sequence[object], prepare: str = "") -> subprocess.CompletedProcess[str]:
    """Run with standard output a pipe whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        return ended(arguments, prepare, stdout=writer)
    finally:
        os.close(writer)


SHORT = [["train", "digits", "--print-config"], ["--help"], ["train", "--help"], ["--version"], ["doctor", "--json"]]


@pytest.mark.skipif(os.name == "nt", reason="a pipe without reader fails otherwise there")
@pytest.mark.parametrize("arguments", SHORT, ids=" ".join)
def test_a_reader_that_has_gone_ends_a_command_quietly(arguments: list[str]) -> None:
    done = without_reader(arguments)
    assert done.returncode == 1
    assert [line for line in done.stderr.splitlines() if not line.startswith("note: recipe")] == []


@pytest.mark.skipif(not FULL.exists(), reason="the device that is always full is Linux's")
@pytest.mark.parametrize("arguments", SHORT, ids=" ".join)
def test_a_full_disk_ends_a_command_in_a_sentence(arguments: list[str]) -> None:
    with FULL.open("w") as full:
        done = ended(arguments, stdout=full)
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if not line.startswith("note: recipe")]
    assert lines == ["error: cannot write to standard output: No space left on device"]


# The three of them end within a second: what is tested is what becomes of the output.
TRAINED = """
import json
from pathlib import Path
import der_fast.runs
def train_run(config, out, *, resume, observer):
    observer.run_begins(1, config)
    observer.step_begins(1, 1, ["a", "b"], 4)
    for step in (1, 2, 3):
        observer.step_ends({"step": step, "top1": 50.0})
    out.mkdir(parents=True)
    (out / "metrics.json").write_text(json.dumps({"steps": [["a", "b"]], "top1": [50.0]}))
    (out / "trained").write_text("to the end")
der_fast.runs.train_run = train_run
"""
TRAIN = ["train", "digits", "--out"]


@pytest.mark.skipif(os.name == "nt", reason="a pipe without reader fails otherwise there")
@pytest.mark.parametrize("quiet", [[], ["--quiet"]])
def test_a_training_goes_on_without_its_reader(quiet: list[str], tmp_path: Path) -> None:
    done = without_reader([*TRAIN, tmp_path / "run", *quiet], TRAINED)
    assert (tmp_path / "run" / "trained").read_text() == "to the end"
    assert done.returncode == 1
    assert done.stderr.count("training continues, and its results are in") == 1
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr and "error:" not in done.stderr


@pytest.mark.skipif(not FULL.exists(), reason="the device that is always full is Linux's")
def test_a_training_goes_on_where_the_disk_is_full(tmp_path: Path) -> None:
    with FULL.open("w") as full:
        done = ended([*TRAIN, tmp_path / "run"], TRAINED, stdout=full)
    assert (tmp_path / "run" / "trained").exists()
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "error: cannot write to standard output: No space left on device"
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("missing", ["sys.stdout = None", "sys.stderr = None", "sys.stdout = sys.stderr = None"])
def test_without_standard_streams_a_training_runs(missing: str, tmp_path: Path) -> None:
    done = ended([*TRAIN, tmp_path / "run"], f"{TRAINED}\n{missing}", stdout=subprocess.PIPE)
    assert (done.returncode, (tmp_path / "run" / "trained").exists()) == (0, True)
    assert "Traceback" not in done.stderr


def test_notes_that_cannot_be_written_end_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stderr", Failing(errno.EPIPE))
    with guarded():
        say_note("nobody reads this")
        output().print("but this")
    assert capsys.readouterr().out == "but this\n"


@pytest.mark.parametrize("number", [errno.EPIPE, errno.ENOSPC, errno.EIO])
def test_a_lost_output_is_reported_once(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Failing(number, 1))
    before, noted = sys.stdout, []
    with pytest.raises(OutputLost) as raised, guarded(), outlived(noted.append):
        for text in "abc":
            output().print(text)
    assert before.getvalue() == "a\n" and len(noted) == 1
    assert raised.value.unread == (number == errno.EPIPE)
    assert sys.stdout is before


def test_what_goes_wrong_in_training_is_not_hidden_by_a_lost_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Failing(errno.EPIPE))
    with pytest.raises(KeyError, match="fault"), guarded(), outlived(lambda lost: None):
        print("x")
        raise KeyError("fault")


def test_a_stream_is_like_the_one_below() -> None:
    below = io.TextIOWrapper(io.BytesIO(), encoding="latin-1", errors="backslashreplace")
    stream = Stream(below, lambda lost: None)
    assert (stream.encoding, stream.errors, stream.isatty(), stream.writable()) == ("latin-1", "backslashreplace", False, True)
    stream.write("ä…")
    stream.flush()
    assert below.buffer.getvalue() == b"\xe4\\u2026"  # type: ignore[attr-defined]
    nowhere = Stream(None, lambda lost: None)
    assert (nowhere.write("abc"), nowhere.isatty()) == (3, False)
    with pytest.raises(io.UnsupportedOperation):
        nowhere.fileno()


def test_commands_run_with_guarded_streams(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        app(["train", "digits", "--print-config"])
    assert raised.value.code == 0 and "[later]" in capsys.readouterr().out
    assert streams._current is None
