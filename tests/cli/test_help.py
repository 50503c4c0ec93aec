"""Every command and option is listed, and help does not wait for PyTorch."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version

import pytest
from typer.testing import Result

Run = Callable[..., Result]

OPTIONS = {
    "demo": "--epochs --out --seed --device --backend --set --quiet --debug",
    "train": (
        "--protocol --preset --backbone --width --epochs --batch-size --lr --memory --memory-per-class --class-order --train-per-class "
        "--test-per-class --data-root --download --method --target-params --paper --no-prune --no-aux --no-expand --bound --fwt --seed "
        "--device "
        "--backend --out --resume --set --print-config --tensorboard --quiet --debug"
    ),
    "learn": "--epochs --batch-size --lr --memory --memory-per-class --target-params --device --backend --set --quiet --debug",
    "eval": "--json --device --debug",
    "predict": "--top --json --device --backend --debug",
    "export": "--raw-uint8 --aoti --check --json --debug",
    "report": "--compare --debug",
    "doctor": "--json --debug",
}


def words_of(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--?[a-z][a-z0-9-]*|\w+", re.sub(r"\x1b\[[0-9;]*m", "", text)))


def test_all_commands_are_listed(run: Run) -> None:
    shown = run("--help")
    assert shown.exit_code == 0
    assert set(OPTIONS) <= words_of(shown.output)


@pytest.mark.parametrize("command", OPTIONS)
def test_all_options_are_listed(run: Run, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    shown = run(command, "--help")
    assert shown.exit_code == 0
    assert set(OPTIONS[command].split()) <= words_of(shown.output)


def test_an_option_that_does_not_exist_is_not_listed(run: Run) -> None:
    assert "--no-such-option" not in words_of(run("train", "--help").output)


def test_help_names_the_presets_and_backbones(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    text = run("train", "--help").output
    assert "cifar100-b50-10" in text
    assert "preact_resnet18" in text


def test_version(run: Run) -> None:
    shown = run("--version")
    assert (shown.exit_code, shown.output.strip()) == (0, version("der_fast"))


def test_no_command_shows_help(run: Run) -> None:
    assert "predict" in run().output


@pytest.mark.parametrize("arguments", [["train", "--no-such-option"], ["fly"], ["train", "digits", "--memory", "many"], ["predict"]])
def test_mistakes_in_the_command_end_with_2(run: Run, arguments: list[str]) -> None:
    assert run(*arguments).exit_code == 2


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys\nfrom der_fast.cli.main import app\n"
        "try:\n    app(['train', '--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "print('heavy:', sorted({'torch', 'numpy', 'matplotlib', 'sklearn'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "heavy: []" in shown.stdout
