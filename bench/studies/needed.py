"""Which packages named in pyproject.toml are installed: `python -m bench needed`. Needs only the standard library and pip's."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from bench.harness.arguments import study_parser

PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"
# Those of the extra `test` that the GPU tests and the benchmark need; linters and exporters may be missing.
FOR_TESTS = ("pytest", "hypothesis", "pytest-timeout", "pytest-benchmark")


def listed(text: str, name: str) -> list[str]:
    """Return the requirements of a list in a TOML text, without a TOML reader (Python 3.10 has none)."""
    match = re.search(rf"^{re.escape(name)} = \[(.*?)\]\s*$", text, re.MULTILINE | re.DOTALL)
    return re.findall(r'"([^"]+)"', match[1]) if match else []


def name_of(requirement: str) -> str:
    """Return the name of a requirement's package."""
    found = re.match(r"[\w.-]+", requirement)
    return found[0] if found else requirement


def numbers(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version: (2, 11, 0) for '2.11.0+cu130'."""
    return tuple(int(part) for part in re.match(r"[\d.]*", version)[0].split(".") if part)  # type: ignore[index]


def state(requirement: str) -> tuple[str, str, bool]:
    """Return (requirement, installed version or the problem, whether there is a problem)."""
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
    """Print every requirement; return 1 if one is missing or too old."""
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
        print("On a machine with access to a package registry, download them into a folder; copy it here and pass it as --wheels FOLDER:")
        print(f"    python3 -m pip download --no-deps --only-binary=:all: --python-version 3.12 -d FOLDER {' '.join(missing)}")
    return int(bool(missing))
