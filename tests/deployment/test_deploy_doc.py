"""The program in docs/deploy.md runs where nothing but onnxruntime, numpy and pillow is installed, and says what the learner says."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from PIL import Image
from torch import Tensor

from der_fast.deployment.exporter import export
from der_fast.training.learner import Learner

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "deploy.md"


def program() -> str:
    """The one block of the document that is a whole program."""
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.S)
    (found,) = [block for block in blocks if "onnxruntime" in block]
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


@pytest.fixture(scope="module")
def photos(digits: Tensor, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Digits as grey PNG, as large JPEG (decoded at a reduced scale), wide, and lying on its side by EXIF."""
    folder = tmp_path_factory.mktemp("photos")
    pictures = [Image.fromarray(pixels.numpy()) for pixels in digits[:4]]
    lying = Image.Exif()
    lying[0x0112] = 6
    pictures[0].convert("L").save(folder / "grey.png")
    pictures[1].resize((640, 640)).save(folder / "large.jpg", quality=95)
    pictures[2].resize((30, 12)).save(folder / "wide.png")
    pictures[3].resize((64, 48)).save(folder / "lying.jpg", exif=lying)
    return sorted(folder.iterdir())


@pytest.mark.parametrize("raw", [False, True])
def test_the_program_of_the_document(
    raw: bool, packages: Path, photos: list[Path], run_folder: Path, learner: Learner, tmp_path: Path
) -> None:
    export(run_folder, tmp_path / "model.onnx", raw_uint8=raw)
    ended = run(packages, program(), tmp_path / "model.onnx", *photos)
    assert ended.returncode == 0, ended.stderr
    rows = [line.split() for line in ended.stdout.splitlines()]
    wanted = learner.predict(photos, top=1)
    assert [(path, name) for path, name, _ in rows] == [(str(path), row.class_name) for path, row in zip(photos, wanted, strict=True)]
    assert [float(row[2]) for row in rows] == pytest.approx([row.probability for row in wanted], abs=2e-5)


@pytest.mark.parametrize("name", ["torch", "der_fast", "safetensors", "onnx"])
def test_nothing_else_is_there(name: str, packages: Path) -> None:
    assert f"No module named '{name}'" in run(packages, f"import {name}").stderr


def test_the_program_is_short() -> None:
    lines = [line for line in program().splitlines() if line.strip()]
    assert len(lines) <= 30
