"""Runs over image files that were killed with SIGKILL in the middle of an epoch go on to the same weights, by every reader."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from der_fast.training.progress import Observer

SCRIPT = Path(__file__).with_name("killed_photos.py")
NAMES = runpy.run_path(str(SCRIPT))
learn, READERS, PLACES = NAMES["learn"], NAMES["READERS"], NAMES["PLACES"]
BROKEN = ("train/d/2.jpg", "train/a/4.jpg")

pytestmark = pytest.mark.skipif(os.name != "posix", reason="kills processes with SIGKILL")


def write(folder: Path) -> Path:
    """Six training and three test images of each of four classes; two training images are cut off."""
    for part, count in (("train", 6), ("val", 3)):
        for number, name in enumerate("abcd"):
            (folder / part / name).mkdir(parents=True)
            for index in range(count):
                pixels = np.random.default_rng([number, index, part == "val"]).integers(0, 255, (4, 5, 3), dtype=np.uint8)
                Image.fromarray(pixels).resize((60, 50)).save(folder / part / name / f"{index}.jpg")
    for name in BROKEN:
        (folder / name).write_bytes((folder / name).read_bytes()[:300])
    return folder


class FirstBatch(Observer):
    """Notes the first batch that it is told of."""

    def __init__(self) -> None:
        self.place: tuple[Any, ...] | None = None

    def batch_ends(self, step: int, stage: str, epoch: int, epochs: int, batch: int, *rest: Any) -> None:
        self.place = self.place or (step, stage, epoch, batch)


@pytest.fixture(scope="module", params=READERS)
def killed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with what every killed process left, and the name of the reader."""
    if request.param == "dali":
        pytest.importorskip("nvidia.dali", reason="needs nvidia-dali (the extra 'dali'), which has no package for this system or Python")
    folder = tmp_path_factory.mktemp(request.param.replace(" ", "-"))
    write(folder / "images")
    ended = subprocess.run([sys.executable, SCRIPT, folder, request.param], capture_output=True, text=True, check=False, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout) == dict.fromkeys(PLACES, signal.SIGKILL), ended.stderr
    return folder, request.param


def notes_of(run: Path) -> list[str]:
    return sorted(note for note in json.loads((run / "metrics.json").read_text())["notes"] if "could not be read" in note or "jpg" in note)


def test_it_goes_on_with_the_next_batch_to_the_same_end(killed: tuple[Path, str], run_facts: Callable[[Path], dict[str, Any]]) -> None:
    folder, reader = killed
    learn(folder, "straight", READERS[reader])
    wanted = run_facts(folder / "straight")
    assert len(notes_of(folder / "straight")) == 4
    for name, place in PLACES.items():
        # How files are read may change; what is read may not.
        seen = FirstBatch()
        workers = {"data.workers": 1} if name == "first epoch" else {}
        learn(folder, name, {**READERS[reader], **workers}, seen, resume=True)
        assert seen.place == place
        found = run_facts(folder / name)
        assert (found["files"], found["history"]) == (wanted["files"], wanted["history"]), name
        assert notes_of(folder / name) == notes_of(folder / "straight")
