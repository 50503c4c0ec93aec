"""Docstrings cite the equations of docs/method.md by number; every number that they cite is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CITATION = re.compile(r"\beq\. (\d+)")
SUFFIXES = (".py", ".cpp", ".hpp", ".h", ".cu", ".cuh")


def sources():
    for folder in ("der_fast", "kernels", "csrc", "bench"):
        yield from (path for path in sorted((ROOT / folder).rglob("*")) if path.suffix in SUFFIXES)


def numbered():
    return [
        int(number) for number in re.findall(r"^ {4}.* \((\d+)\)$", (ROOT / "docs" / "method.md").read_text(encoding="utf-8"), re.MULTILINE)
    ]


def test_equations_are_numbered_in_order():
    assert numbered() == list(range(1, len(numbered()) + 1))
    assert len(numbered()) > 10


def test_every_equation_that_is_cited_exists():
    known, cited = set(numbered()), {}
    for path in sources():
        for number in CITATION.findall(path.read_text(encoding="utf-8")):
            cited.setdefault(int(number), []).append(path.name)
    unknown = {number: names for number, names in cited.items() if number not in known}
    assert not unknown
    assert len(cited) > 8


def test_nothing_cites_a_page_that_is_not_in_the_repository():
    for path in sources():
        assert not re.search(r"\b(METHOD|DESIGN)\b(?! ?[=\]])", re.sub(r"_METHOD", "", path.read_text(encoding="utf-8"))), path
