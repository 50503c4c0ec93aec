"""Messages speak the language of who asked: of options on the command line, of arguments in Python."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

import der_fast
from der_fast.cli.main import app
from der_fast.config.tree import declared
from der_fast.errors import OUT, RESUME, ConfigError, Spelling, UserError

ROOT = Path(__file__).resolve().parent.parent
# The reference page and doctor's rows are for both; nothing of them is raised.
FOR_BOTH = {"der_fast/config/document.py": "_HEAD", "der_fast/deployment/optional.py": "availability"}

# What is asked for in reports of faults has no counterpart in Python.
REPORT = "`der-fast doctor --json`"
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
COMMAND = re.compile(r"der-fast (?!doctor)[a-z]+")
CALLS = (
    *(getattr(der_fast, name) for name in ("train", "learn_run", "evaluate_run", "export", "load")),
    *(getattr(der_fast.Learner, name) for name in ("learn", "predict", "load")),
)
ARGUMENTS = {name for call in CALLS for name in inspect.signature(call).parameters} - {"self", "train", "test"}
ARGUMENT = re.compile(rf"(?<![\w.-])(?:{'|'.join(sorted(ARGUMENTS))})=(?![=\s])")


def sources() -> list[Path]:
    found = [*(ROOT / "der_fast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    # A program has a command line of its own.
    return sorted(path for path in found if "import argparse" not in path.read_text(encoding="utf-8"))


def in_python(path: Path) -> bool:
    return "der_fast/cli/" not in path.as_posix()


def messages(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and text of every string that is no docstring and no part of a `Spelling`; what an f-string fills in is left out."""
    both = FOR_BOTH.get(path.relative_to(ROOT).as_posix())
    passed: set[ast.AST] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if node in passed:
            continue
        if (isinstance(node, ast.Call) and getattr(node.func, "id", None) == "Spelling") or (both is not None and both in names_of(node)):
            passed |= set(ast.walk(node))
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            passed.add(node.value)
        elif isinstance(node, ast.JoinedStr):
            yield node.lineno, "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
            passed |= {part for part in node.values if isinstance(part, ast.Constant)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def names_of(node: ast.AST) -> list[str | None]:
    """Return what a function or an assignment is called."""
    return [getattr(node, "name", None), *(getattr(target, "id", None) for target in getattr(node, "targets", ()))]


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_message_speaks_of_what_its_reader_cannot_give(path: Path) -> None:
    words = (OPTION, COMMAND) if in_python(path) else (ARGUMENT,)
    # In Python an argument may be named, but then so is the option: both are a Spelling.
    words = (*words, ARGUMENT) if in_python(path) else words
    faults = [
        f"line {line}: {text!r}" for line, text in messages(path) if any(pattern.search(text.replace(REPORT, "")) for pattern in words)
    ]
    assert not faults, f"{path} names options or arguments outside of a Spelling: {faults}"


def spellings() -> list[tuple[str, Spelling]]:
    found = []
    for path in filter(in_python, sources()):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "Spelling":
                option, argument = (ast.unparse(part).strip("f'\"") for part in node.args)
                found.append((f"{path.name}:{node.lineno}", Spelling(option, argument)))
    return found


@pytest.mark.parametrize(("place", "spelling"), spellings(), ids=lambda value: value if isinstance(value, str) else "")
def test_both_names_of_a_spelling_exist(place: str, spelling: Spelling) -> None:
    commands = typer.main.get_command(app).commands
    options = {option for command in commands.values() for parameter in command.params for option in parameter.opts}
    named = OPTION.findall(spelling.option)
    assert named or COMMAND.search(spelling.option), spelling
    assert set(named) <= options
    assert set(re.findall(r"der-fast ([a-z]+)", spelling.option)) <= set(commands)
    assert not OPTION.search(spelling.argument) and "der-fast" not in spelling.argument
    known = {*ARGUMENTS, *der_fast.__all__, "settings"}
    keys = set(declared())
    assert keys & set(re.findall(r"\w+\.\w+", spelling.argument)) or known & set(re.findall(r"\w+", spelling.argument)), spelling


def test_an_error_speaks_python_and_is_shown_with_options() -> None:
    error = ConfigError("go on with ", RESUME, ", or give another ", OUT)
    assert str(error) == "go on with resume=True, or give another out"
    assert error.on_command_line() == "go on with --resume, or give another --out"
    around = UserError("recipe: ", *error.args)
    assert str(around) == f"recipe: {error}" and around.on_command_line() == f"recipe: {error.on_command_line()}"
    assert str(ConfigError("plain")) == ConfigError("plain").on_command_line() == "plain"
    assert str(ConfigError()) == ""
