"""`learn_run` and `evaluate_run`: which images they use, and where they find them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from der_fast.api import evaluate_run, learn_run, train
from der_fast.config.resolve import resolve_config
from der_fast.config.schema import DataConfig
from der_fast.data import load_dataset
from der_fast.errors import CheckpointError, ConfigError, DataError
from der_fast.training.learner import Learner
from der_fast.training.progress import Observer


class Messages(Observer):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def message(self, text: str) -> None:
        self.texts.append(text)


@pytest.fixture
def for_folders(tiny: dict[str, Any]) -> dict[str, Any]:
    """Settings for folders of a few plain pictures."""
    return {**tiny, "memory.total": 8, "data.image_size": 8, "data.train_per_class": None, "data.test_per_class": None}


def test_learning_the_classes_of_a_folder(copy: Path, tmp_path: Path, folder_of: Callable[..., Path]) -> None:
    folder, said = folder_of(tmp_path / "new", {"green": 10, "red": 10}), Messages()
    overrides = {"later.epochs": 2, "later.lr": 0.01, "data.test_per_class": 1, "data.test_share": 0.3, "data.flip": True}
    result = learn_run(copy, folder, overrides=overrides, observer=said)
    assert result.learner.class_names[-2:] == ("green", "red")
    metrics = json.loads((copy / "metrics.json").read_text())
    assert metrics["steps"][-1] == ["green", "red"]
    # One test image of each new class, and the run's own four of every old one.
    assert [sum(row) for row in metrics["confusion"]] == [4] * 10 + [1] * 2
    assert (copy / "report.html").read_text() == "drawn"
    assert not any("cannot be read" in text for text in said.texts)
    data = Learner.load(copy).config.data
    assert (data.name, data.train_per_class, data.test_per_class, data.test_share, data.flip) == ("digits", 6, 4, 0.2, True)
    # The images held out of both data sets can still be measured.
    assert evaluate_run(copy).confusion == metrics["confusion"]


def test_the_limits_of_the_run_do_not_hold_for_the_new_folder(copy: Path, tmp_path: Path, folder_of: Callable[..., Path]) -> None:
    class Images(Observer):
        def step_begins(self, step: int, steps: int, class_names: Sequence[str], images: int) -> None:
            self.count = images

    seen = Images()
    learn_run(copy, folder_of(tmp_path / "new", {"green": 20, "red": 20}), observer=seen)
    # A fifth is held out for testing; two exemplars of each of ten classes are rehearsed.
    assert seen.count == 2 * 16 + 10 * 2


def test_learning_without_the_runs_own_data(tmp_path: Path, tiny: dict[str, Any], folder_of: Callable[..., Path]) -> None:
    run, said = tmp_path / "run", Messages()
    train(load_dataset(resolve_config("digits", changes=tiny).data), "B0-2", out=run, settings=tiny)
    result = learn_run(run, folder_of(tmp_path / "new", {"green": 10, "red": 10}), observer=said)
    assert any("(given as datasets) cannot be read here: accuracy is measured only on the new classes" in text for text in said.texts)
    assert [sum(row) for row in result.metrics["confusion"]] == [0] * 10 + [2] * 2
    assert result.metrics["class_set_top1"][-1][:2] == [None, None]


@pytest.mark.parametrize(
    ("classes", "overrides", "error", "words"),
    [
        ({"3": 4}, {"classifier.epochs": 0}, ConfigError, "classifier.epochs = 0 switches off"),
        ({"green": 4, "red": 4}, {"model.width": 4}, ConfigError, "model.width was 2, now 4"),
        ({"green": 4, "red": 4}, {"data.image_size": 16}, ConfigError, "data.image_size"),
        ({"green": 4, "red": 4}, {"later.speed": 4}, ConfigError, "later.speed"),
        ({"green": 4, "red": 0}, {}, DataError, "red"),
        ({"green": 4, "red": 1}, {}, DataError, "class 'red' has only 1 image"),
    ],
)
def test_what_cannot_be_learned_leaves_the_run_alone(
    classes: dict[str, int],
    overrides: dict[str, Any],
    error: type[Exception],
    words: str,
    copy: Path,
    tmp_path: Path,
    folder_of: Callable[..., Path],
) -> None:
    before = Learner.load(copy).metrics()
    with pytest.raises(error, match=words):
        learn_run(copy, folder_of(tmp_path / "new", classes), overrides=overrides)
    assert Learner.load(copy).metrics() == before


def test_evaluating_on_the_runs_own_test_images(trained: Path) -> None:
    metrics = json.loads((trained / "metrics.json").read_text())
    found = evaluate_run(trained)
    assert (found.top1, found.top5, found.confusion) == (metrics["last_top1"], metrics["top5"][-1], metrics["confusion"])


@pytest.mark.parametrize(("split", "images"), [(False, 4 + 7), (True, 3 + 5)])
def test_evaluating_on_a_folder(split: bool, images: int, trained: Path, tmp_path: Path, folder_of: Callable[..., Path]) -> None:
    folder = tmp_path / "test images"
    if split:
        folder_of(folder / "train", {"0": 4, "7": 7})
        folder_of(folder / "val", {"0": 3, "7": 5})
    else:
        folder_of(folder, {"0": 4, "7": 7}, side=11)
    found = evaluate_run(str(trained), folder)
    assert found.images == images
    assert len(found.class_names) == 10


def test_evaluating_on_a_whole_data_set(trained: Path) -> None:
    # The run itself was tested on four images per class.
    _, test = load_dataset(DataConfig(name="digits"))
    assert evaluate_run(trained, "digits").images == len(test) > 300


def test_images_that_say_nothing_about_the_run(trained: Path, tmp_path: Path, folder_of: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match="never learned: 'green'"):
        evaluate_run(trained, folder_of(tmp_path / "new", {"green": 4, "0": 4}))
    with pytest.raises(DataError, match="unknown data set 'nowhere'"):
        evaluate_run(trained, "nowhere")
    with pytest.raises(CheckpointError, match="holds no saved learner"):
        evaluate_run(tmp_path)


def test_a_run_finds_its_images_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, for_folders: dict[str, Any], folder_of: Callable[..., Path]
) -> None:
    folder_of(tmp_path / "shapes", {"cube": 6, "disc": 6})
    folder_of(tmp_path / "more", {"ball": 6, "cone": 6})
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    metrics = train("shapes/", "B0-2", out="run", settings=for_folders).metrics
    assert metrics["dataset"] == str(tmp_path / "shapes")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert evaluate_run("../run").confusion == metrics["confusion"]
    assert train("../shapes", "B0-2", out="../run", settings=for_folders, resume=True).metrics["top1"] == metrics["top1"]
    said = Messages()
    learned = learn_run("../run", "../more", observer=said)
    assert not any("cannot be read" in text for text in said.texts)
    assert [sum(row) for row in learned.metrics["confusion"]] == [1] * 4
    assert evaluate_run("../run").confusion == learned.metrics["confusion"]


def test_images_that_were_moved(tmp_path: Path, for_folders: dict[str, Any], folder_of: Callable[..., Path]) -> None:
    class Stop(Observer):
        def step_ends(self, summary: dict[str, Any]) -> None:
            raise KeyboardInterrupt

    old, new, run = folder_of(tmp_path / "old", {"cube": 6, "disc": 6}), tmp_path / "new", tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        train(old, "B0-2", out=run, settings=for_folders, observer=Stop())
    straight = train(old, "B0-2", settings=for_folders).metrics
    old.rename(new)
    with pytest.raises(DataError, match=f"there is no folder {old}; .* the new place of one that was moved"):
        train(old, "B0-2", out=run, settings=for_folders, resume=True)
    again = train(new, "B0-2", out=run, settings=for_folders, resume=True).metrics
    assert (again["top1"], again["confusion"], again["dataset"]) == (straight["top1"], straight["confusion"], str(new))
    assert json.loads((run / "config.json").read_text())["config"]["data"]["name"] == str(new)
    assert evaluate_run(run).confusion == again["confusion"]
    new.rename(old)
    with pytest.raises(DataError, match=f"there is no folder {new};.*Give a folder of test images, or .* out='{run}', resume=True"):
        evaluate_run(run)
    Image.new("RGB", (8, 8)).save(old / "cube" / "00.png")
    with pytest.raises(CheckpointError, match="was started with other t[a-z]+ images"):
        train(old, "B0-2", out=run, settings=for_folders, resume=True)
