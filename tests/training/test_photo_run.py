"""Whole runs over images that stay in their files: memory as paths, resume, a data set that was moved, broken files in the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from der_fast import api, runs
from der_fast.data.photos import PhotoSource
from der_fast.errors import CheckpointError, DataError
from der_fast.training.learner import Learner

KEYS: dict[str, Any] = {
    "data.reader": "pillow", "data.workers": 0, "data.image_size": 40, "data.random_resized_crop": True, "data.brightness": 0.0,
    "protocol.class_order_seed": None, "model.backbone": "resnet20", "model.width": 2, "model.stem": "small",
    "masks.bn_images": 8, "memory.total": 6, "runtime.device": "cpu", "runtime.threads": 1, "runtime.eval_batch_size": 4,
    **{f"{stage}.{name}": value for stage in ("first", "later", "classifier")
       for name, value in {"epochs": 1, "milestones": (), "warmup_epochs": 0, "batch_size": 4}.items()},
}  # fmt: skip


def write(folder: Path, names: str, parts: dict[str, int]) -> Path:
    for part, count in parts.items():
        for number, name in enumerate(names):
            (folder / part / name).mkdir(parents=True)
            for index in range(count):
                pixels = np.random.default_rng([number, index, part == "val"]).integers(0, 255, (4, 5, 3), dtype=np.uint8)
                Image.fromarray(pixels).resize((60, 50)).save(folder / part / name / f"{index}.jpg")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "images", "abcd", {"train": 6, "val": 3})


def files_of(learner: Learner) -> list[str]:
    memory = learner.model.memory
    assert isinstance(memory, PhotoSource)
    return list(memory.files)


class StopHere(Exception):
    pass


def test_a_run_stopped_in_its_middle_goes_on_where_the_images_are_now(folder: Path, tmp_path: Path) -> None:
    whole = api.train(folder, "B0-2", out=tmp_path / "whole", settings=KEYS)
    assert [len(whole.learner.class_names), len(files_of(whole.learner))] == [4, 4]

    class Stopping(api.Observer):
        def step_begins(self, step: int, *rest: Any) -> None:
            if step == 2:
                raise StopHere

    with pytest.raises(StopHere):
        api.train(folder, "B0-2", out=tmp_path / "cut", settings=KEYS, observer=Stopping())
    moved = folder.rename(tmp_path / "moved")
    again = api.train(moved, "B0-2", out=tmp_path / "cut", settings=KEYS, resume=True)
    assert files_of(again.learner) == files_of(whole.learner)
    assert torch.equal(again.learner.model.network.head.weight, whole.learner.model.network.head.weight)  # type: ignore[union-attr]
    manifest = json.loads((tmp_path / "cut" / "steps" / "02" / "learner.json").read_text())
    assert manifest["memory"]["files"]["roots"] == [str(moved)]
    assert sum(path.stat().st_size for path in (tmp_path / "cut").glob("steps/02/memory-*")) < 4000


def test_an_index_lies_beside_the_run_and_other_images_are_refused(folder: Path, tmp_path: Path) -> None:
    api.train(folder, "B0-2", out=tmp_path / "run", settings=KEYS)
    assert (tmp_path / "run" / "index.npz").is_file()
    (folder / "train" / "a" / "5.jpg").unlink()
    with pytest.raises(CheckpointError, match="other train images"):
        api.train(folder, "B0-2", out=tmp_path / "run", settings=KEYS, resume=True)


def test_learning_more_after_the_images_were_moved(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    api.train(folder, "B0-2", out=run, settings=KEYS)
    more = write(tmp_path / "more", "xy", {"train": 6, "val": 3})
    moved = folder.rename(tmp_path / "moved")
    with pytest.raises(DataError, match="rehearsal memory are not where they were"):
        api.learn_run(run, more)
    api.learn_run(run, more, data=moved)
    learner = Learner.load(run)
    assert learner.class_names == tuple("abcdxy") and len(files_of(learner)) == 6
    assert learner.config.data.name == str(moved)
    assert sum(map(sum, learner.results[-1].confusion or [])) == 18
    assert api.evaluate_run(run).images == 18 and api.evaluate_run(run, more).images == 6


def test_broken_files_are_in_the_report(folder: Path, tmp_path: Path) -> None:
    broken = [folder / "train" / "b" / "2.jpg", folder / "val" / "a" / "1.jpg"]
    for path in broken:
        path.write_bytes(path.read_bytes()[:300])
    result = api.train(folder, "B0-2", out=tmp_path / "run", settings=KEYS)
    notes = result.metrics["notes"]
    assert all(0 < part < whole for part, whole in zip(result.metrics["data_seconds"], result.metrics["training_seconds"], strict=True))
    assert all(any(str(path) in note for note in notes) for path in broken)
    assert any("decoded by Pillow" in note for note in notes)
    assert any("herding over 12 images" in note and "MiB of features" in note for note in notes)
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert all(path.name in page for path in broken) and "could not be read" in page and "waiting for images" in page
    # The broken test image is in no count.
    assert sum(map(sum, result.learner.results[-1].confusion or [])) == 11


def test_more_than_one_broken_file_in_a_hundred_stops_the_run_with_the_list(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = [folder / "train" / name / f"{index}.jpg" for name in "ab" for index in (1, 4)]
    for path in broken:
        path.write_bytes(b"")
    with pytest.raises(DataError, match="4 of the first images read, of 12 in all, cannot be read") as refused:
        api.train(folder, "B0-2", out=tmp_path / "run", settings=KEYS)
    assert all(f"{path}: the file is empty" in str(refused.value) and str(path) in caplog.text for path in broken)


def test_a_resident_cache_is_in_the_report_and_the_log(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    said = []

    class Listening(api.Observer):
        def message(self, text: str) -> None:
            said.append(text)

    with caplog.at_level("INFO", logger="der_fast.data"):
        result = api.train(folder, "B0-2", out=tmp_path / "run", settings={**KEYS, "data.cache_gib": 1.0}, observer=Listening())
    line = "resident cache: 12 images decoded once, "
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert line in page and line in caplog.text
    for lines in (said, result.metrics["notes"]):
        assert any(text.startswith(line) and "of 1 GiB" in text for text in lines)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than these runs."""
    monkeypatch.setattr(runs, "write_report", lambda run: run)


@pytest.mark.usefixtures("undrawn")
def test_photos_of_known_classes_are_chosen_among_with_the_memorys(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    before = api.train(folder, "B0-2", out=run, settings={**KEYS, "memory.total": 8}).learner
    more = tmp_path / "more"
    write(more, "ab", {"train": 7, "val": 2})
    for path in more.rglob("*.jpg"):
        # Each turned a little further than the folder's own; one is a copy of an exemplar.
        Image.open(path).rotate(90).save(path)
    exemplar = next(name for name in files_of(before) if name.split("/")[-2] == "a")
    (more / "train" / "a" / "copy.jpg").write_bytes((folder / exemplar).read_bytes())
    result = api.learn_run(run, more)
    learner = Learner.load(run)
    (event,) = learner.events
    assert (event.kind, event.class_names, event.images) == ("refreshed", ("a", "b"), 14)
    assert len(files_of(learner)) == 8 and result.metrics["confusion"] is not None
    assert sum(map(sum, result.metrics["confusion"])) == 4 * 3 + 2 * 2
    assert {name for name in files_of(learner) if name.split("/")[-2] in "cd"} == {n for n in files_of(before) if n.split("/")[-2] in "cd"}
    assert not any(name.endswith("copy.jpg") for name in files_of(learner))


@pytest.mark.usefixtures("undrawn")
def test_renamed_and_forgotten_photos(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    api.train(folder, "B0-2", out=run, settings=KEYS)
    assert api.rename_class(run, "a", "ant").learner.class_names == ("ant", "b", "c", "d")
    assert sum(api.evaluate_run(run).confusion[0]) == 3
    result = api.forget_class(run, "b", "d")
    assert (run / "index.npz").exists() is False
    memory = Learner.load(run).model.memory
    assert isinstance(memory, PhotoSource)
    assert {name.split("/")[-2] for name in memory.files} == {"a", "c"}
    for path in run.rglob("*.safetensors"):
        assert b"train/b" not in path.read_bytes()
    assert not any("train/b" in path.read_text() for path in run.rglob("*.json"))
    assert [sum(row) for row in result.metrics["confusion"]] == [3, 3]
    assert api.evaluate_run(run).images == 6
    again = api.train(folder, "B0-2", out=run, settings=KEYS, resume=True)
    assert again.learner.class_names == ("ant", "c")
    learned = api.learn_run(run, write(tmp_path / "more", "b", {"train": 6, "val": 3}))
    assert learned.learner.class_names == ("ant", "c", "b")
    # Its own images of the folder are known again, too.
    assert api.evaluate_run(run).images == 9
