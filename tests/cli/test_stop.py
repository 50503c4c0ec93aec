"""Ctrl-C and SIGTERM at the command line, from its first import to the end of a run, and going on after them."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from der_fast.cli.folders import how_to_go_on
from der_fast.cli.main import app
from der_fast.config.resolve import resolve_config
from der_fast.config.tree import to_dict
from der_fast.stopping import Stopped
from der_fast.training import latency

Run = Callable[..., Result]

TINY = ["--train-per-class", "4", "--test-per-class", "2", "--width", "2", "--epochs", "2", "--memory", "40", "--batch-size", "8"]
TINY += ["--protocol", "B0-2"]
TINY += ["--set", "classifier.epochs=1", "--set", "runtime.threads=1", "--set", "masks.bn_images=8", "--set", "masks.floor=0.5"]
FACTS = runpy.run_path(str(Path(__file__).parent.parent / "training" / "conftest.py"))["facts_of"]

# Sends itself a signal when something happens, then runs the installed command's entry.
START = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
# nohup, under which tests may run, switches this one off.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
number, when = getattr(signal, sys.argv.pop(1)), sys.argv.pop(1)

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == when:
            sys.meta_path.remove(self)
            signal.raise_signal(number)

sys.meta_path.insert(0, Finder())
if when.startswith("batch "):
    from der_fast.training.epoch import EpochMeter
    advance, calls = EpochMeter.advance, []
    def replaced(self, images):
        calls.append(1)
        if len(calls) == int(when.split()[1]):
            signal.raise_signal(number)
        advance(self, images)
    EpochMeter.advance = replaced
from der_fast.cli.entry import main
main()
"""

posix = pytest.mark.skipif(os.name != "posix", reason="a process that raises SIGINT on itself ends otherwise on Windows")


def start(number: str, when: str, *arguments: Any, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", START, number, when, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=120)


def run_quickly(*arguments: str) -> Result:
    """The command line in this process, on one thread, without pictures and repeated timings."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "REPEATS", 1)
        patch.setattr("der_fast.runs.write_report", lambda run: run)
        ended = CliRunner().invoke(app, arguments)
    torch.set_num_threads(threads)
    return ended


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    ended = run_quickly("train", "digits", *TINY, "--out", str(out), "--quiet")
    assert ended.exit_code == 0, ended.output
    return out


@posix
@pytest.mark.parametrize("module", ["der_fast.cli.main", "typer", "rich.console", "torch", "numpy", "der_fast.training.run"])
def test_interrupted_while_something_is_imported(module: str, tmp_path: Path) -> None:
    ended = start("SIGINT", module, "train", "digits", *TINY, "--out", "run", folder=tmp_path)
    assert ended.returncode == 130, ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.stderr.endswith("note: interrupted. Nothing was started yet: run the same command again.\n")


@posix
def test_what_is_advised_before_the_run_began_works(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And so does --resume, which a scheduler adds to every restart."""
    ended = start("SIGINT", "sklearn.datasets", "train", "digits", *TINY, "--out", "run", folder=tmp_path)
    assert (ended.returncode, "run the same command again" in ended.stderr) == (130, True)
    monkeypatch.chdir(tmp_path)
    again = run_quickly("train", "digits", *TINY, "--out", "run", "--resume", "--quiet")
    assert again.exit_code == 0, again.output
    assert "there is no run in run yet: starting one" in again.stderr
    assert FACTS(tmp_path / "run") == FACTS(whole)


@posix
@pytest.mark.parametrize(("number", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_stopped_in_the_first_batch_and_gone_on_as_advised(
    number: str, code: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = start(number, "batch 1", "train", "digits", *TINY, "--out", "my run", "--quiet", folder=tmp_path)
    assert ended.returncode == code, ended.stderr
    assert "Traceback" not in ended.stderr
    assert "note: stopping once the current batch is saved; a second signal stops at once" in ended.stderr
    last = ended.stderr.splitlines()[-1]
    assert last == "note: interrupted. What was learned is saved; continue with: der-fast train --out 'my run' --resume"
    assert (tmp_path / "my run" / "checkpoints" / "001-1-representation-0000-00000001.json").is_file()
    monkeypatch.chdir(tmp_path)
    again = run_quickly("train", "--out", "my run", "--resume", "--quiet")
    assert again.exit_code == 0, again.output
    assert FACTS(tmp_path / "my run") == FACTS(whole)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_exit_codes_and_advice(number: signal.Signals, code: int, run: Run, api: Any) -> None:
    api.error = Stopped(number)
    ended = run("train", "digits", "--out", "r")
    assert (ended.exit_code, ended.stderr.splitlines()[-1]) == (
        code,
        "note: interrupted. Nothing was started yet: run the same command again.",
    )
    Path("r").mkdir()
    Path("r/config.json").write_text(json.dumps({"config": to_dict(resolve_config("digits"))}))
    assert run("train", "--out", "r", "--resume").stderr.endswith("continue with: der-fast train --out r --resume\n")
    Path("r/metrics.json").write_text(Path("r/config.json").read_text())
    Path("new").mkdir()
    ended = run("learn", "r", "new")
    assert (ended.exit_code, "r is as it was; the same command continues from where it stopped" in ended.stderr) == (code, True)


def only_a_folder(out: Path) -> None:
    out.mkdir()


def only_an_index(out: Path) -> None:
    out.mkdir()
    (out / "index.json").write_text("{}")
    (out / ".lock").write_text("")


def nothing(out: Path) -> None:
    pass


@pytest.mark.parametrize("leave", [nothing, only_a_folder, only_an_index])
def test_resume_begins_where_nothing_was_begun(leave: Callable[[Path], None], run: Run, api: Any) -> None:
    leave(Path("r"))
    ended = run("train", "cifar100", "--protocol", "B0-10", "--out", "r", "--resume")
    assert ended.exit_code == 0, ended.output
    (call,) = api.calls
    assert (call["config"], call["resume"]) == (resolve_config("cifar100", "B0-10"), True)
    assert "recipe: preset cifar100-b0-10" in ended.stderr
    assert how_to_go_on(Path("elsewhere")) == "Nothing was started yet: run the same command again."


def test_resume_with_a_configuration_and_nothing_else_goes_on(run: Run, api: Any) -> None:
    Path("r").mkdir()
    saved = resolve_config("cifar100", "B0-10")
    Path("r/config.json").write_text(json.dumps({"config": to_dict(saved)}))
    assert run("train", "--out", "r", "--resume").exit_code == 0
    assert api.calls[0]["config"] == saved


def test_resume_of_nothing_without_data_asks_for_it(run: Run, api: Any) -> None:
    Path("r").mkdir()
    ended = run("train", "--out", "r", "--resume")
    assert (ended.exit_code, api.calls) == (2, [])
    assert "there is no run to resume in r; check --out, or give DATA to start one there" in ended.stderr
