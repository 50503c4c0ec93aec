"""What `eval` and `learn` measure: the held-out images of every data set that a run learned, and never one that it was trained on."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from der_fast import api, runs
from der_fast.config.resolve import resolve_config
from der_fast.data import MemorySource, load_dataset
from der_fast.errors import CheckpointError, DataError
from der_fast.training import provenance
from der_fast.training.learner import Learner
from der_fast.training.storage import saved

KEYS: dict[str, Any] = {
    "protocol.class_order_seed": None, "model.backbone": "resnet20", "model.width": 2, "model.stem": "small", "masks.bn_images": 8,
    "memory.total": 12, "runtime.device": "cpu", "runtime.threads": 1, "data.workers": 0, "data.image_size": 12,
    **{f"{stage}.{name}": value for stage in ("first", "later", "classifier")
       for name, value in {"epochs": 1, "milestones": (), "warmup_epochs": 0, "batch_size": 8}.items()},
}  # fmt: skip
FILES = {**KEYS, "data.reader": "pillow", "data.image_size": 40, "data.random_resized_crop": True, "memory.total": 8}


def noise(place: Path, classes: Mapping[str, int], seed: int = 0, side: int = 12) -> Path:
    """Class folders of pictures that nobody can tell apart but by having seen them."""
    for number, (name, count) in enumerate(classes.items()):
        (place / name).mkdir(parents=True)
        for index in range(count):
            pixels = np.random.default_rng([seed, number, index]).integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(place / name / f"{index:02d}.png")
    return place


class Said(api.Observer):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def message(self, text: str) -> None:
        self.texts.append(text)


def measured(run: Path, data: Any = None) -> tuple[dict[str, int], list[str]]:
    """Return class → number of images that were measured, and what was said."""
    said = Said()
    found = api.evaluate_run(run, data, observer=said)
    counts = {name: sum(row) for name, row in zip(found.class_names, found.confusion, strict=True)}
    assert found.images == sum(counts.values()) and list(found.notes) == said.texts
    assert found.without_images == tuple(name for name, count in counts.items() if not count)
    return {name: count for name, count in counts.items() if count}, said.texts


@pytest.fixture(scope="module", autouse=True)
def _undrawn() -> Iterator[None]:
    """Drawing reports takes longer than these runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "write_report", lambda run: None)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that learned noise/ (a, b in memory), then more/ (x, y); nothing here may be written to."""
    place = tmp_path_factory.mktemp("measured")
    api.train(noise(place / "noise", {"a": 10, "b": 10}, 1), "B0-2", out=place / "run", settings=KEYS)
    api.learn_run(place / "run", noise(place / "more", {"x": 10, "y": 5}, 2))
    return place


@pytest.fixture
def place(whole: Path, tmp_path: Path) -> Path:
    """The same, to be played with."""
    copied = shutil.copytree(whole, tmp_path / "place")
    relocate(copied / "run", str(whole), str(copied))
    return copied


def relocate(run: Path, old: str, new: str) -> None:
    """Let a copied run know the copies of its data sets."""
    for path in run.glob("steps/*/learner.json"):
        text = json.dumps(saved.load_manifest(path)).replace(json.dumps(old)[1:-1], json.dumps(new)[1:-1])
        saved.save_manifest(path, json.loads(text))


def test_after_learn_the_held_out_images_of_both_data_sets_are_measured(whole: Path) -> None:
    metrics = json.loads((whole / "run" / "metrics.json").read_text())
    assert [sum(row) for row in metrics["confusion"]] == [2, 2, 2, 1]
    assert api.evaluate_run(whole / "run").images == 7
    assert measured(whole / "run") == ({"a": 2, "b": 2, "x": 2, "y": 1}, [])
    assert api.evaluate_run(whole / "run").confusion == metrics["confusion"]


def test_the_folder_that_was_trained_on_gives_its_held_out_images_only(whole: Path) -> None:
    assert api.evaluate_run(whole / "run", whole / "noise").images == 4
    counts, said = measured(whole / "run", whole / "noise")
    assert counts == {"a": 2, "b": 2}
    assert said == [f"16 of 20 image(s) of {whole / 'noise'} are left out because the run was trained on them"]
    assert api.evaluate_run(whole / "run", whole / "noise").left_out == 16
    counts, said = measured(whole / "run", whole / "more")
    assert counts == {"x": 2, "y": 1} and said[0].startswith("12 of 15 image(s)")


def test_trained_images_are_known_under_other_names_in_another_split(whole: Path, tmp_path: Path) -> None:
    trained = tmp_path / "split" / "test" / "a"
    trained.mkdir(parents=True)
    for index, path in enumerate(sorted((whole / "noise" / "a").iterdir())):
        shutil.copy(path, trained / f"other name {index}.PNG")
    noise(tmp_path / "split" / "train", {"a": 3, "b": 3}, 5)
    counts, said = measured(whole / "run", tmp_path / "split")
    assert counts == {"a": 2} and said[0].startswith("8 of 10 image(s)")


def test_a_folder_of_nothing_but_trained_images_is_refused(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "seen" / "a").mkdir(parents=True)
    _, test = load_dataset(Learner.load(whole / "run").config.data)
    held_out = {name.rpartition("/")[2] for name in test.files or ()}
    for path in (whole / "noise" / "a").iterdir():
        if path.name not in held_out:
            shutil.copy(path, tmp_path / "seen" / "a")
    with pytest.raises(DataError, match="was trained on all"):
        api.evaluate_run(whole / "run", tmp_path / "seen")


@pytest.mark.parametrize(
    ("parts", "counts", "said"),
    [
        ({"": {"a": 1, "b": 1, "x": 1}}, {"a": 1, "b": 1, "x": 1}, []),
        ({"test": {"a": 2, "x": 1}}, {"a": 2, "x": 1}, []),
        ({"": {"a": 3, "b": 0}}, {"a": 3}, ["no images in class(es) 'b' of "]),
        ({"train": {"a": 3, "b": 3}, "val": {"a": 1, "b": 0}}, {"a": 1}, []),
        ({"train": {"a": 3, "b": 3}}, {"a": 3, "b": 3}, []),
        ({"train": {"a": 3}, "test": {"b": 2}}, {"b": 2}, []),
    ],
)
def test_a_folder_to_measure_is_measured_whole(
    parts: dict[str, dict[str, int]], counts: dict[str, int], said: list[str], whole: Path, tmp_path: Path
) -> None:
    for number, (part, classes) in enumerate(parts.items()):
        noise(tmp_path / "given" / part, classes, 20 + number)
    found, texts = measured(whole / "run", tmp_path / "given")
    assert found == counts
    assert [text.partition(str(tmp_path))[0] for text in texts] == said


def test_a_folder_without_any_image_is_refused(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no images to measure"):
        api.evaluate_run(whole / "run", noise(tmp_path / "given", {"a": 0}))


def test_a_renamed_class_folder_is_measured_and_named(place: Path) -> None:
    (place / "noise" / "a").rename(place / "noise" / "kitty")
    assert api.evaluate_run(place / "run").images == 7
    run, said = place / "run", f"held-out images of class 'a' are now in class 'kitty' of {place / 'noise'}"
    assert measured(run) == ({"a": 2, "b": 2, "x": 2, "y": 1}, [said])
    counts, texts = measured(run, place / "noise")
    assert counts == {"a": 2, "b": 2} and texts[0] == f"class 'kitty' of {place / 'noise'} is the class that the run calls 'a'"
    heard = Said()
    metrics = api.learn_run(run, noise(place / "third", {"p": 5}, 3), observer=heard).metrics
    assert said in heard.texts and said in metrics["notes"]
    assert [sum(row) for row in metrics["confusion"]] == [2, 2, 2, 1, 1]


def test_images_that_were_added_change_nothing(place: Path) -> None:
    for path in noise(place / "added", {"a": 30}, 9).glob("a/*.png"):
        path.rename(place / "noise" / "a" / f"new {path.name}")
    assert measured(place / "run") == ({"a": 2, "b": 2, "x": 2, "y": 1}, [])
    counts, _ = measured(place / "run", place / "noise")
    assert counts == {"a": 32, "b": 2}


def test_what_is_missing_is_named(place: Path) -> None:
    shutil.rmtree(place / "noise" / "b")
    (place / "more").rename(place / "elsewhere")
    counts, said = measured(place / "run")
    assert counts == {"a": 2}
    assert said[0] == f"2 of 2 held-out image(s) of class 'b' are no longer in {place / 'noise'}"
    assert said[1].startswith(f"3 held-out image(s) of 2 class(es) (x, y) can no longer be read: there is no folder {place / 'more'}")
    metrics = api.learn_run(place / "run", noise(place / "third", {"p": 5}, 3)).metrics
    assert [sum(row) for row in metrics["confusion"]] == [2, 0, 0, 0, 1]
    assert {*said, "step 4: no test images of 3 of 5 known classes: 'b', 'x', 'y'"} <= set(metrics["notes"])
    # Its images are known wherever they lie.
    assert measured(place / "run", place / "elsewhere")[0] == {"x": 2, "y": 1}


def test_the_own_data_set_may_be_moved(place: Path) -> None:
    moved = (place / "noise").rename(place / "moved")
    with_its_place = api.learn_run(place / "run", noise(place / "third", {"p": 5}, 3), data=moved).metrics
    assert [sum(row) for row in with_its_place["confusion"]] == [2, 2, 2, 1, 1]
    assert measured(place / "run") == ({"a": 2, "b": 2, "x": 2, "y": 1, "p": 1}, [])
    assert Learner.load(place / "run").learned[0].name == str(moved)


def test_a_run_without_the_record_is_measured_as_before_and_says_so(place: Path) -> None:
    for path in (place / "run").glob("steps/*/learner.json"):
        manifest = saved.load_manifest(path)
        saved.save_manifest(path, {name: value for name, value in manifest.items() if name != "learned"})
    counts, said = measured(place / "run")
    assert counts == {"a": 2, "b": 2}
    assert len(said) == 1 and "were not recorded when they were learned" in said[0] and "has no 'x', 'y'" in said[0]
    counts, said = measured(place / "run", place / "noise")
    assert counts == {"a": 2, "b": 2} and "3 of 3 step(s)" in said[0] and "would be held out today" in said[0]
    counts, said = measured(place / "run", place / "more")
    assert counts == {"x": 10, "y": 5} and "cannot be told from others" in said[0]
    api.learn_run(place / "run", noise(place / "third", {"p": 5}, 3))
    assert measured(place / "run")[0] == {"a": 2, "b": 2, "p": 1}
    (place / "noise").rename(place / "moved")
    counts, said = measured(place / "run")
    assert counts == {"p": 1} and "the data set cannot be read" in said[0]


def test_a_damaged_record_costs_only_itself(place: Path) -> None:
    (path,) = (place / "run" / "learned").glob("03-*")
    path.write_bytes(path.read_bytes()[:-1])
    said = Said()
    assert Learner.load(place / "run", observer=said).class_names == ("a", "b", "x", "y")
    assert len(said.texts) == 1 and str(path) in said.texts[0]


class Killed(BaseException):
    pass


def test_killed_while_the_record_is_saved(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, third = place / "run", noise(place / "third", {"p": 5}, 3)

    def killed(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(saved, "save_manifest", killed)
        with pytest.raises(Killed):
            api.learn_run(run, third)
    assert measured(run) == ({"a": 2, "b": 2, "x": 2, "y": 1}, [])
    api.learn_run(run, third)
    assert measured(run)[0] == {"a": 2, "b": 2, "x": 2, "y": 1, "p": 1}
    named = {row["file"] for path in run.glob("steps/*/learner.json") for row in saved.load_manifest(path)["learned"]}
    assert {path.name for path in (run / "learned").iterdir()} == named


def test_digits_then_a_folder(tmp_path: Path) -> None:
    run, keys = tmp_path / "run", {**KEYS, "data.image_size": None, "data.train_per_class": 6, "data.test_per_class": 3, "memory.total": 30}
    api.train("digits", "B0-2", out=run, settings=keys)
    metrics = api.learn_run(run, noise(tmp_path / "more", {"x": 5, "y": 5}, 2, side=8)).metrics
    assert [sum(row) for row in metrics["confusion"]] == [3] * 10 + [1] * 2
    assert api.evaluate_run(run).confusion == metrics["confusion"]


def test_images_given_as_data_sets_are_remembered_too(tmp_path: Path) -> None:
    noise(tmp_path / "noise", {"a": 6, "b": 6}, 1)
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(path))) for path in sorted((tmp_path / "noise").rglob("*.png"))])
    labels = torch.arange(12) // 6
    train, test = (
        MemorySource(pixels, labels, "ab").subset(part) for part in (torch.tensor([0, 1, 2, 3, 6, 7, 8, 9]), torch.tensor([4, 10]))
    )
    learner = Learner(resolve_config("digits", changes=KEYS))
    learner.learn(train, test)
    run = learner.save(tmp_path / "run")
    with pytest.raises(DataError, match=r"2 held-out image\(s\) of 2 class\(es\) \(a, b\) were given as datasets and cannot be read here"):
        api.evaluate_run(run)
    counts, said = measured(run, tmp_path / "noise")
    assert counts == {"a": 2, "b": 2} and said[0].startswith("8 of 12")
    api.learn_run(run, noise(tmp_path / "more", {"x": 5, "y": 5}, 2))
    counts, said = measured(run)
    assert counts == {"x": 1, "y": 1} and "were given as datasets" in said[0]


def as_list(folder: Path, path: Path) -> Path:
    files = sorted(folder.rglob("*.png"))
    path.write_text("".join(f"{file} {file.parent.name}\n" for file in files))
    return path


def as_tar(folder: Path, path: Path) -> Path:
    with tarfile.open(path, "w") as tar:
        for number, file in enumerate(sorted(folder.rglob("*.png"))):
            for suffix, data in (("png", file.read_bytes()), ("cls", file.parent.name.encode())):
                entry = tarfile.TarInfo(f"{number:04d}.{suffix}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    return path


@pytest.mark.parametrize("settings", [KEYS, FILES], ids=["memory", "files"])
@pytest.mark.parametrize("form", ["folder", "list", "tar"])
def test_folders_lists_and_tars_of_the_same_images(form: str, settings: dict[str, Any], tmp_path: Path) -> None:
    folder, run = noise(tmp_path / "noise", {"a": 10, "b": 10}, 1, side=60), tmp_path / "run"
    forms = {"folder": folder, "list": as_list(folder, tmp_path / "noise.txt"), "tar": as_tar(folder, tmp_path / "noise.tar")}
    api.train(forms[form], "B0-2", out=run, settings=settings)
    metrics = json.loads((run / "metrics.json").read_text())
    assert measured(run) == ({"a": 2, "b": 2}, [])
    assert api.evaluate_run(run).confusion == metrics["confusion"]
    for other in forms.values():
        counts, said = measured(run, other)
        assert counts == {"a": 2, "b": 2} and said == [f"16 of 20 image(s) of {other} are left out because the run was trained on them"]


def test_photos_of_renamed_classes_are_found_among_all(tmp_path: Path) -> None:
    folder, run = noise(tmp_path / "noise", {"a": 10, "b": 10}, 1, side=60), tmp_path / "run"
    api.train(folder, "B0-2", out=run, settings=FILES)
    (folder / "a").rename(folder / "zebra")
    assert measured(run) == ({"a": 2, "b": 2}, [f"held-out images of class 'a' are now in class 'zebra' of {folder}"])


def test_a_class_that_the_learner_renamed_keeps_its_images(place: Path) -> None:
    learner = Learner.load(place / "run")
    model = learner.model
    model.class_sets[0] = ("kitty",)
    learner.learned = provenance.renamed(learner.learned, "a", "kitty")
    learner.save(place / "run")
    assert measured(place / "run") == ({"kitty": 2, "b": 2, "x": 2, "y": 1}, [])
    counts, said = measured(place / "run", place / "noise")
    assert counts == {"kitty": 2, "b": 2} and said[0].endswith("is the class that the run calls 'kitty'")


def test_a_class_that_the_learner_does_not_know_is_refused(whole: Path, tmp_path: Path) -> None:
    strange = noise(tmp_path / "strange", {"a": 2, "new": 19}, 30)
    for path in (whole / "noise" / "b").iterdir():
        # Ten of 29 are known: that makes it no class of the run's.
        shutil.copy(path, strange / "new" / f"b {path.name}")
    with pytest.raises(DataError, match="never learned: 'new'"):
        api.evaluate_run(whole / "run", strange)
    with pytest.raises(DataError, match="never learned: 'new'"):
        api.evaluate_run(whole / "run", noise(tmp_path / "given", {"a": 2, "new": 2}, 30))
    with pytest.raises(DataError, match="unknown data set 'nowhere'"):
        api.evaluate_run(whole / "run", "nowhere")
    with pytest.raises(CheckpointError):
        api.evaluate_run(tmp_path)


def test_test_images_alone_are_not_learned(place: Path) -> None:
    with pytest.raises(DataError, match="holds nothing but test/"):
        api.learn_run(place / "run", noise(place / "only" / "test", {"p": 5}, 3).parent)


def test_two_lists_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    as_list(noise(tmp_path / "one", {"a": 5, "b": 5}, 1), tmp_path / "train.txt")
    as_list(noise(tmp_path / "two", {"a": 2, "b": 3}, 2), tmp_path / "test.txt")
    api.train("train.txt", "B0-2", out=tmp_path / "run", settings={**KEYS, "data.test_list": "test.txt"})
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert measured(tmp_path / "run") == ({"a": 2, "b": 3}, [])
    with pytest.raises(DataError, match="was trained on all 10"):
        api.evaluate_run(tmp_path / "run", tmp_path / "train.txt")
