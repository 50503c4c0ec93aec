"""The ImageNet presets on folders in ImageNet's layout, with few and tiny images: two steps of each, over files and synset lists."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from der_fast import api
from der_fast.cli.settings import changes_from
from der_fast.config.resolve import resolve_config
from der_fast.data.photos import PhotoSource
from der_fast.training.learner import Learner
from der_fast.training.protocol import class_order, split_steps

# As little as a test can afford; nothing else of a preset is touched.
TINY: dict[str, Any] = {
    "data.reader": "pillow", "data.workers": 0, "data.image_size": 40, "model.width": 4,
    "runtime.device": "cpu", "runtime.threads": 1,
    **{f"{stage}.{name}": value for stage in ("first", "later", "classifier")
       for name, value in {"epochs": 1, "milestones": (), "warmup_epochs": 0}.items()},
}  # fmt: skip
PER_CLASS = {"train": 3, "val": 1}
# Preset → synsets in the folder, those that a list names of them, sizes of the first two steps, and exemplars per class after these.
CASES = {
    "imagenet100-b0-10": (110, 100, (10, 10), 100),
    "imagenet100-b50-10": (100, None, (50, 5), 20),
    "imagenet1000-b0-10": (1000, None, (100, 100), 100),
}


class Stop(Exception):
    """Two steps are enough."""


class TwoSteps(api.Observer):
    """Stops a run before its third step."""

    def step_begins(self, step: int, *rest: Any) -> None:
        if step == 3:
            raise Stop


def synset(number: int) -> str:
    return f"n{1440764 + 1009 * number:08d}"


def lay_out(folder: Path, synsets: int) -> Path:
    """Write train/<synset>/<synset>_<number>.JPEG and val/<synset>/ILSVRC2012_val_<number>.JPEG."""
    for number in range(synsets):
        name, buffer = synset(number), io.BytesIO()
        pixels = np.random.default_rng(number).integers(0, 255, (3, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((56, 44)).save(buffer, "JPEG")
        for part, count in PER_CLASS.items():
            place = folder / part / name
            place.mkdir(parents=True)
            for index in range(count):
                file = f"{name}_{index}.JPEG" if part == "train" else f"ILSVRC2012_val_{number:08d}.JPEG"
                (place / file).write_bytes(buffer.getvalue())
    return folder


@pytest.mark.parametrize("preset", CASES)
def test_a_preset_runs_from_a_folder_in_the_standard_layout(tmp_path: Path, preset: str) -> None:
    there, wanted, sizes, quota = CASES[preset]
    folder, names, settings = lay_out(tmp_path / "ILSVRC2012", there), [synset(number) for number in range(there)], dict(TINY)
    if wanted is not None:
        names = names[::-1][:wanted]
        (tmp_path / "synsets.txt").write_text("".join(f"{name} the meaning, of {name}\n" for name in names))
        settings.update(changes_from({"classes": str(tmp_path / "synsets.txt")}, resolve_config(preset=preset)))
    with pytest.raises(Stop):
        api.train(folder, preset=preset, out=tmp_path / "run", settings=settings, observer=TwoSteps())
    learner = Learner.load(tmp_path / "run")
    config = learner.config
    assert (config.protocol.name, config.model.backbone) == (preset.partition("-")[2].upper(), "resnet18")
    assert config.data.random_resized_crop and (config.classifier.temperature, config.first.batch_size) == (1.0, 256)
    steps = split_steps(class_order(sorted(names), config.protocol), config.protocol.name)
    assert [len(names) for names in steps][:2] == list(sizes) and sum(map(len, steps)) == len(names)
    assert [result.class_names for result in learner.results] == steps[:2]
    for seen, result in zip(np.cumsum(sizes), learner.results, strict=True):
        assert sum(map(sum, result.confusion or [])) == seen * PER_CLASS["val"] and result.kept_share < 1
    memory = learner.model.memory
    assert isinstance(memory, PhotoSource) and memory.class_names == learner.class_names
    assert learner.results[-1].memory_per_class == min(quota, PER_CLASS["train"])
    assert set(memory.files) == {f"train/{name}/{name}_{index}.JPEG" for name in memory.class_names for index in range(3)}
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert any(note.startswith(f"index of {there * 4:,} files made") for note in metrics["notes"])
