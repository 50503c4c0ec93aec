"""A tiny run on digits, and folders of plain pictures."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from der_fast.api import train
from der_fast.training import latency

TINY = {
    "model.backbone": "resnet20", "model.width": 2, "data.train_per_class": 6, "data.test_per_class": 4, "memory.total": 20,
    "masks.bn_images": 16, "masks.floor": 0.5, "runtime.threads": 1,
    **{f"{stage}.{key}": value for stage in ("first", "later", "classifier")
       for key, value in {"epochs": 1, "milestones": (), "warmup_epochs": 0, "batch_size": 16, "lr": 0.02}.items()},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread, one call per timing, and no pictures: drawing takes longer than these runs."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(latency, "REPEATS", 1)
    monkeypatch.setattr("der_fast.runs.write_report", lambda run: (run / "report.html").write_text("drawn"))
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny() -> dict[str, Any]:
    return dict(TINY)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of five digits."""
    out = tmp_path_factory.mktemp("api") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("der_fast.runs.write_report", lambda run: None)
        train("digits", "B0-2", out=out, settings=TINY)
    return out


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "run")


def write_folder(place: Path, classes: dict[str, int], side: int = 8) -> Path:
    """Write class folders of plain pictures."""
    for number, (name, count) in enumerate(classes.items()):
        (place / name).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (side, side), (40 * number, 255 - index, 9 * index)).save(place / name / f"{index:02d}.png")
    return place


@pytest.fixture(scope="session")
def folder_of() -> Callable[..., Path]:
    return write_folder
