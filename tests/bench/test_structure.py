"""The benchmark's folders import one way only, touch nothing private of the package, and every study is reached by its name."""

from __future__ import annotations

import ast
import importlib
import re

import pytest

from bench import __main__ as command
from bench.harness.facts import ROOT

# Each may import those to its left, and itself.
FOLDERS = ("harness", "subjects", "cases", "reports", "studies")
FILES = sorted((ROOT / "bench").rglob("*.py"))


def test_folders_import_one_way():
    for path in FILES:
        own = path.relative_to(ROOT / "bench").parts[0]
        if own not in FOLDERS:
            continue
        for name in re.findall(r"^\s*from bench\.(\w+)", path.read_text(encoding="utf-8"), re.MULTILINE):
            assert FOLDERS.index(name) <= FOLDERS.index(own), f"{path} imports bench.{name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_nothing_private_of_the_package_is_touched(path):
    # PyTorch's own private operators are what its compiler emits; only these are called by their names.
    allowed = {"self", "cls", "mkldnn", "sys", "torch", "metadata", "_C"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            owner = node.value
            name = owner.id if isinstance(owner, ast.Name) else owner.attr if isinstance(owner, ast.Attribute) else "?"
            assert name in allowed or node.attr == "_C", f"{path}:{node.lineno}: {name}.{node.attr}"


def test_every_study_is_a_command_and_every_file_a_study(capsys):
    files = {path.stem for path in (ROOT / "bench" / "studies").glob("*.py")} - {"__init__"}
    assert {module.rpartition(".")[2] for module in command.STUDIES.values()} == files
    text = (ROOT / "bench" / "README.md").read_text(encoding="utf-8")
    for name, module in command.STUDIES.items():
        assert f"`{name}`" in text, name
        with pytest.raises(SystemExit) as ended:
            importlib.import_module(module).main(["--help"])
        assert ended.value.code == 0
        assert f"usage: python -m bench {name}" in capsys.readouterr().out


def test_the_help_names_the_studies(capsys):
    with pytest.raises(SystemExit):
        command.main(["--help"])
    # A line of help may end at a name's hyphen.
    said = re.sub(r"-\n\s*", "-", capsys.readouterr().out)
    assert all(name in said for name in command.STUDIES)
