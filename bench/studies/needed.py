"""Which of the packages that pyproject.toml names are here: `python -m bench needed`. Needs nothing but the standard library and pip's."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from bench.harness.arguments import study_parser

PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"
# Of the extra `test`: what the GPU tests and the benchmark need; linters and exporters can be missing.
FOR_TESTS = ("pytest", "hypothesis", "pytest-timeout", "pytest-benchmark")


def listed(text: str, name: str) -> list[str]:
    """Return the requirements of a list in a TOML text, without a TOML reader (Python 3.10 has none)."""
    match = re.search(rf"^{re.escape(name)} = \[(.*?)\]\s*$", text, re.MULTILINE | re.DOTALL)
    return re.findall(r'"([^"]+)"', match[1]) if match else []


def name_of(requirement: str) -> str:
    """Return a requirement's package."""
    found = re.match(r"[\w.-]+", requirement)
    return found[0] if found else requirement


def numbers(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version: (2, 11, 0) for '2.11.0+cu130'."""
    return tuple(int(part) for part in re.match(r"[\d.]*", version)[0].split(".") if part)  # type: ignore[index]


def state(requirement: str) -> tuple[str, str, bool]:
    """Return (requirement, installed version or what is wrong, whether something is wrong)."""
    plain, _, marker = requirement.partition(";")
    if "python_version <" in marker and sys.version_info >= (3, 11):
        return plain.strip(), "not needed by this Python", False
    try:
        found = metadata.version(name_of(plain))
    except metadata.PackageNotFoundError:
        return plain.strip(), "missing", True
    least = re.search(r">=([\d.]+)", plain)
    old = least is not None and numbers(found) < numbers(least[1])
    return plain.strip(), f"{found}, too old" if old else found, old


def main(arguments: Sequence[str] | None = None) -> int:
    """Print every requirement; returns 1 where one is missing or too old."""
    study_parser("needed", __doc__).parse_args(arguments)
    text = PYPROJECT.read_text(encoding="utf-8")
    wanted = [*listed(text, "requires"), *listed(text, "dependencies")]
    wanted += [line for line in listed(text, "test") if name_of(line) in FOR_TESTS]
    rows = [state(requirement) for requirement in dict.fromkeys(wanted)]
    for requirement, found, _ in rows:
        print(f"{requirement:<32} {found}")
    missing = [name_of(requirement) for requirement, _, absent in rows if absent]
    if missing:
        print(f"\nmissing or too old: {' '.join(missing)}")
        print("Where a package registry can be reached, put them into a folder; then carry it and give it as --wheels FOLDER:")
        print(f"    python3 -m pip download --no-deps --only-binary=:all: --python-version 3.12 -d FOLDER {' '.join(missing)}")
    return int(bool(missing))
