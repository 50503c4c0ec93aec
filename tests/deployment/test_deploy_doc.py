"""The program in docs/deploy.md runs where nothing but onnxruntime, numpy and pillow is installed, and says what the learner says."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from PIL import Image, ImageOps, features
from torch import Tensor

import der_fast
from der_fast.data.catalogue.kinds import IMAGE_SUFFIXES
from der_fast.data.decode.pixels import decode
from der_fast.deployment.exporter import export
from der_fast.errors import DataError
from der_fast.training.learner import Learner

# Read where a package of their own is installed.
_NEEDS_A_PACKAGE = {".heic", ".heif", ".hif", ".heics", ".heifs"}
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "deploy.md"


def blocks() -> list[str]:
    """Every block of Python in the document."""
    return re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.S)


def program() -> str:
    """The one block that is a whole program."""
    (found,) = [block for block in blocks() if "onnxruntime" in block]
    return found


def installed_alone(folder: Path, *wanted: str) -> Path:
    """Make a folder of packages that holds these distributions and what they require, as a fresh environment would."""
    waiting, done = list(wanted), set()
    while waiting:
        name = waiting.pop()
        if name in done:
            continue
        done.add(name)
        distribution = metadata.distribution(name)
        for line in distribution.requires or []:
            needed = Requirement(line)
            if needed.marker is None or Marker(str(needed.marker)).evaluate({"extra": ""}):
                waiting.append(needed.name)
        # What lies beside the packages (scripts) is named with '..'.
        for top in {Path(str(file)).parts[0] for file in distribution.files or []} - {".."}:
            target = folder / top
            if not target.exists() and "__pycache__" not in top:
                target.symlink_to(Path(str(distribution.locate_file(top))).resolve())
    return folder


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return installed_alone(tmp_path_factory.mktemp("site"), "onnxruntime", "numpy", "pillow")


def run(packages: Path, code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run code with these packages and the standard library only."""
    start = f"import sys; sys.path.append({str(packages)!r}); sys.argv[0] = 'classify.py'\n"
    command = [sys.executable, "-I", "-S", "-c", start + code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("raw", [False, True])
def test_the_program_of_the_document(raw: bool, packages: Path, every_kind: list[Path], run_folder: Path, tmp_path: Path) -> None:
    export(run_folder, tmp_path / "model.onnx", raw_uint8=raw)
    ended = run(packages, program(), tmp_path / "model.onnx", *every_kind)
    assert ended.returncode == 0, ended.stderr
    rows = [line.rsplit(" ", 2) for line in ended.stdout.splitlines()]
    wanted = der_fast.load(tmp_path / "model.onnx").predict(every_kind, top=1)
    assert [path for path, _, _ in rows] == list(map(str, every_kind))
    for (path, name, probability), row in zip(rows, wanted, strict=True):
        assert name == row.class_name, path
        assert float(probability) == pytest.approx(row.probability, abs=2e-5), path


@pytest.mark.parametrize("size", [(8, 8), (24, 40)])
def test_the_program_reads_the_pixels_that_the_engine_reads(size: tuple[int, int], every_kind: list[Path]) -> None:
    reader = "def read(path):" + program().split("def read(path):")[1].split("images = ")[0]
    names: dict[str, Any] = {"np": np, "Image": Image, "ImageOps": ImageOps, "sys": sys, "rule": {"resize": size}}
    exec(compile(reader, "deploy.md", "exec"), names)
    for path in every_kind:
        assert np.array_equal(names["read"](path), decode(path, size)), path


def test_the_kinds_of_files_are_all_that_are_read(every_kind: list[Path]) -> None:
    left_out = {
        f".{suffix}" for suffix, feature in (("avif", "avif"), ("webp", "webp"), ("jp2", "jpg_2000")) if not features.check(feature)
    }
    assert {path.suffix for path in every_kind} >= IMAGE_SUFFIXES - left_out - _NEEDS_A_PACKAGE


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_of_unknown_range_are_refused(mode: str, packages: Path, run_folder: Path, tmp_path: Path) -> None:
    export(run_folder, tmp_path / "model.onnx")
    Image.new(mode, (9, 9), 1).save(tmp_path / "wide.tif")
    ended = run(packages, program(), tmp_path / "model.onnx", tmp_path / "wide.tif")
    assert ended.returncode == 1 and ended.stdout == ""
    assert ended.stderr.strip() == f"{tmp_path / 'wide.tif'}: 32-bit pixels have no known range"
    with pytest.raises(DataError, match="no known range"):
        der_fast.load(tmp_path / "model.onnx").predict(tmp_path / "wide.tif")


def test_the_program_with_der_fast(every_kind: list[Path], run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (found,) = [block for block in blocks() if "der_fast.export(" in block]
    code = compile(found.replace("runs/photos", str(run_folder)), "deploy.md", "exec")
    wanted = Learner.load(run_folder, device="cpu").predict(every_kind, top=1)
    for path, row in zip(every_kind, wanted, strict=True):
        # The bytes decide what it is, not the name.
        shutil.copy(path, "new.jpg")
        names: dict[str, Any] = {}
        if path == every_kind[0]:
            exec(code, names)
            model = names["model"]
        assert model.predict(["new.jpg"])[0].class_name == row.class_name, path
        assert model.predict(["new.jpg"])[0].probability == pytest.approx(row.probability, abs=1e-5), path


def test_the_program_for_pytorch(digits: Tensor, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (found,) = [block for block in blocks() if "torch.export.load" in block]
    export(run_folder, tmp_path / "model.pt2", raw_uint8=True)
    # Compiling ahead of time takes minutes; tests/deployment/test_graphs.py has the rest of it.
    lines = [line for line in found.split("compiled =")[0].splitlines() if line.strip()]
    names: dict[str, Any] = {"images": digits[:5]}
    exec(compile("\n".join(lines), "deploy.md", "exec"), names)
    wanted = Learner.load(run_folder, device="cpu").predict(digits[:5], top=1)
    assert names["probabilities"].max(1).values.tolist() == pytest.approx([row.probability for row in wanted], abs=1e-5)


@pytest.mark.parametrize("name", ["torch", "der_fast", "safetensors", "onnx"])
def test_nothing_else_is_there(name: str, packages: Path) -> None:
    assert f"No module named '{name}'" in run(packages, f"import {name}").stderr


def test_the_program_is_short() -> None:
    lines = [line for line in program().splitlines() if line.strip()]
    assert len(lines) <= 30
