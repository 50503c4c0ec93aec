"""The CI script runs what the README tells a newcomer to type, and the pinned versions cover what is installed."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
INSTALL = "python3 -m venv .venv && .venv/bin/pip install -c constraints.txt -e"
DEMO = f"{INSTALL} . && .venv/bin/der-fast demo"
NATIVE_SUFFIXES = {".cpp", ".hpp", ".inl", ".cu", ".cuh"}
TEST = f"{INSTALL} '.[test]' && .venv/bin/python -m pytest -n 2"


def requirements_of(distribution: str, extra: str) -> set[str]:
    """Return the normalised names of everything that installing `distribution[extra]` brings here."""
    found: set[str] = set()
    waiting = [(distribution, extra)]
    while waiting:
        name, wanted = waiting.pop()
        try:
            lines = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        for line in lines:
            requirement, _, marker = line.partition(";")
            if not applies(marker, wanted):
                continue
            match = re.match(r"\s*([\w.-]+)(?:\[([\w,-]+)\])?", requirement)
            assert match is not None
            required = normalised(match[1])
            if required == normalised(distribution) or required not in found:
                found.add(required)
                waiting += [(required, part) for part in (match[2] or "").split(",")]
    return found - {normalised(distribution)}


def applies(marker: str, extra: str) -> bool:
    if not marker.strip():
        return True
    from packaging.markers import Marker

    return Marker(marker).evaluate({"extra": extra})


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_readme_and_ci_run_the_same_commands() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert DEMO in readme
    assert TEST in readme
    assert re.sub(r'"\$venv/bin/(\w+)"', r".venv/bin/\1", script).replace('"$venv"', ".venv").count(TEST) == 1


def test_every_dependency_is_pinned() -> None:
    needed = requirements_of("der_fast", "test")
    assert {"torch", "pytest", "rich", "tensorboard", "sympy"} <= needed
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {normalised(line.split("==")[0]) for line in lines if line and not line.startswith("#")}
    # PyTorch pins its own CUDA libraries and its Triton.
    own = {name for name in needed if name.startswith(("nvidia-", "cuda-")) or name == "triton"}
    assert needed - own - pinned == set()


def test_every_pin_is_exact() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert len(pins) > 40
    for pin in pins:
        assert re.fullmatch(r'[\w.-]+==[\w.]+(; python_version (<|>=) "3\.11")?', pin), pin


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_ci_script_is_valid_bash() -> None:
    subprocess.run(["bash", "-n", str(ROOT / ".ci" / "run")], check=True)


def test_lines_of_native_code_are_as_short_as_those_of_python() -> None:
    paths = [path for folder in ("csrc", "kernels") for path in (ROOT / folder).rglob("*") if path.suffix in NATIVE_SUFFIXES]
    assert len(paths) > 20
    lines = [(path, number, line) for path in paths for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)]
    assert [f"{path.relative_to(ROOT)}:{number}" for path, number, line in lines if len(line) > 140] == []


def test_the_wheel_check_finds_what_is_missing(tmp_path: Path) -> None:
    import zipfile

    wheel = tmp_path / "der_fast-0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("der_fast/__init__.py", "")
        archive.writestr("der_fast/left_over.py", "")
        archive.writestr("der_fast-0.dist-info/METADATA", "")
    command = [sys.executable, str(ROOT / ".ci" / "check_wheel.py"), str(wheel)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "missing from the wheel: der_fast/kernels/__init__.py" in ended.stdout
    assert "missing from the wheel: der_fast/config/presets/digits.toml" in ended.stdout
    assert "missing from the wheel: der_fast/_C" in ended.stdout
    assert "missing from the wheel: der_fast/kernels/compact/compact.cuh" in ended.stdout
    assert "superfluous in the wheel: der_fast/left_over.py" in ended.stdout
    assert "missing from the wheel: der_fast/__init__.py" not in ended.stdout
