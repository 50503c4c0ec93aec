"""Every kind of bad input, as somebody at the command line meets it: exit code 2 and a message, or a note and work goes on."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from der_fast import files
from der_fast.cli.main import app
from der_fast.data import MemorySource
from der_fast.kernels import triton_runtime
from der_fast.training import latency

TINY = [
    "--backbone",
    "resnet20",
    "--width",
    "2",
    "--epochs",
    "1",
    "--batch-size",
    "8",
    "--memory",
    "8",
    "--quiet",
    "--class-order",
    "alphabetical",
]
TINY += [
    f"--set={key}" for key in ("classifier.epochs=1", "runtime.threads=1", "masks.bn_images=8", "masks.floor=0.5", "data.image_size=8")
]
FOUR = {"ant": 5, "bee": 5, "cat": 5, "dog": 5}


def command(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def train(data: object, *options: object) -> Result:
    return command("train", data, "--protocol", "B0-2", *TINY, "--out", "run", *options)


def draw(folder: Path, classes: Mapping[str, int]) -> Path:
    """Write class folders of noise, the same for the same names."""
    for name, count in classes.items():
        (folder / name).mkdir(parents=True)
        noise = np.random.default_rng(sum(name.encode()))
        for index in range(count):
            Image.fromarray(noise.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / name / f"{index}.png")
    return folder


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Any:
    """One thread, one call per timing, no pictures."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(latency, "REPEATS", 1)
    monkeypatch.setattr("der_fast.runs.write_report", lambda run: run)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images, and a run of two steps that learned them."""
    folder = tmp_path_factory.mktemp("place")
    draw(folder / "images", FOUR)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("der_fast.runs.write_report", lambda run: run)
        ended = train("images")
    assert ended.exit_code == 0, ended.output
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with images in it."""
    monkeypatch.chdir(tmp_path)
    draw(tmp_path / "images", FOUR)
    return tmp_path


@pytest.fixture
def finished(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of images and run."""
    copy = shutil.copytree(place, tmp_path / "copy")
    monkeypatch.chdir(copy)
    return copy


def an_empty_class() -> Result:
    Path("images/eel").mkdir()
    return train("images")


def a_class_of_one_image() -> Result:
    draw(Path("images"), {"eel": 1})
    return train("images")


def unreadable_images() -> Result:
    for index in range(4):
        Path(f"images/ant/{index}.png").write_bytes(b"no image")
    return train("images")


def a_class_in_one_part_only() -> Result:
    draw(Path("split/train"), FOUR)
    draw(Path("split/test"), {"ant": 2, "bee": 2, "cat": 2})
    return train("split")


def labels_out_of_range() -> Result:
    def load(share: float) -> Any:
        return (MemorySource(torch.zeros(2, 8, 8, 3, dtype=torch.uint8), torch.tensor([0, 12]), list("0123456789")),) * 2

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("der_fast.data.load.load_digits", load)
        return train("digits")


def no_space_left() -> Result:
    def store(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_store", store)
        return train("images")


# What is done in a folder with images, and what is said.
REFUSED: dict[str, tuple[Callable[[], Result], str]] = {
    "unknown data set": (lambda: train("elephants"), "unknown data set 'elephants': known names are digits, cifar10, cifar100"),
    "protocol": (lambda: train("images", "--protocol", "B0-3"), "'B0-3' does not divide 4 classes evenly: 4 classes after the first 0"),
    "class order": (
        lambda: train("images", "--class-order", "ant,bee,cat,bee"), "class_order names 'bee' more than once; list every class once"
    ),
    "empty class": (an_empty_class, "images/eel; add images or remove the folder"),
    "one-image class": (a_class_of_one_image, "class 'eel' has only 1 image, so none can be held out for testing; add images,"),
    "unreadable images": (unreadable_images, "4 of 20 images in"),
    "a class in one part only": (a_class_in_one_part_only, "no folder for class 'dog' in"),
    "labels out of range": (labels_out_of_range, "label 12 of image 1 is out of range: labels must lie in 0 … 9 for 10 classes"),
    "no finite loss": (
        lambda: train("images", "--lr", "1e30", "--no-prune"),
        "Lower the learning rate (now 1e+30) with --lr. Start again with another --out and the lower value: --resume cannot change the",
    ),
    "no space": (no_space_left, "No space left on device. What was saved there before is unharmed; free some space, then continue"),
    "too small a memory": (
        lambda: train("images", "--memory", "3"), "memory.total = 3 leaves no exemplar for each of 4 classes; use at least 4 (--memory)"
    ),
    "nothing to resume": (lambda: command("train", "--out", "run", "--resume"), "there is no run to resume in run; check --out"),
    "images that need too much memory": (lambda: train("images", "--set", "data.max_gib=1e-9"), "more than data.max_gib=1e-09; raise"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_bad_input_is_refused(kind: str, here: Path) -> None:
    call, words = REFUSED[kind]
    refused(call(), words)


def refused(ended: Result, words: str) -> None:
    assert ended.exit_code == 2, ended.output
    assert ended.stderr.startswith("error: ") or "\nerror: " in ended.stderr
    assert words in ended.stderr
    assert "Traceback" not in ended.output


def changed_images() -> Result:
    Image.new("RGB", (8, 8)).save("images/ant/0.png")
    return train("images", "--resume")


def a_known_class() -> Result:
    draw(Path("more"), {"cat": 5})
    return command("learn", "run", "more", "--quiet", "--set", "classifier.epochs=0")


def a_memory_that_would_be_emptied() -> Result:
    draw(Path("more"), {f"new {number}": 2 for number in range(5)})
    return command("learn", "run", "more", "--quiet")


def nothing_whole() -> Result:
    for path in Path("run").glob("steps/*/learner.json"):
        path.write_bytes(path.read_bytes()[:-20])
    return command("eval", "run")


REFUSED_LATER: dict[str, tuple[Callable[[], Result], str]] = {
    "resume with another configuration": (
        lambda: train("images", "--resume", "--seed", "5"), "was started with another configuration: runtime.seed was 1993, now 5"
    ),
    "resume with other images": (changed_images, "was started with other t"),
    "begin where a run is": (lambda: train("images"), "run already holds a run; continue it with --resume, or give another --out"),
    "a known class without a classifier stage": (a_known_class, "which classifier.epochs = 0 switches off; give --set classifier.epochs"),
    "a memory that would be emptied": (a_memory_that_would_be_emptied, "memory.total = 8 leaves no exemplar for each of 9 classes"),
    "a run of which nothing is whole": (nothing_whole, "no saved step is complete; restore the folder from a copy, or train again"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED_LATER)
def test_bad_input_for_a_run_is_refused_and_leaves_it_alone(kind: str, finished: Path) -> None:
    before = json.loads(Path("run/metrics.json").read_text())
    call, words = REFUSED_LATER[kind]
    refused(call(), words)
    assert json.loads(Path("run/metrics.json").read_text()) == before


def test_a_class_with_fewer_images_than_its_quota_is_noted_once(here: Path) -> None:
    ended = train("images", "--memory", "40")
    assert ended.exit_code == 0, ended.output
    assert ended.stderr.count("quota") == 1
    assert "note: 4 class(es) have fewer training images than their memory quota of 10: 'ant' (4), 'bee' (4)" in ended.stderr
    assert "takes only 4 of every class, as many as the scarcest has. Add images of these classes" in ended.stderr


def test_a_class_with_one_training_image_is_noted_before_training(here: Path) -> None:
    draw(here / "split" / "train", {**FOUR, "cat": 1})
    draw(here / "split" / "test", dict.fromkeys(FOUR, 2))
    ended = train("split", "--lr", "1e30", "--no-prune")
    assert "note: 1 class(es) have fewer training images than their memory quota of 2: 'cat' (1). All are kept, but" in ended.stderr
    assert "takes only 1 of every class" in ended.stderr
    # The loss is no number from the first epoch on, and yet the note is there.
    assert ended.exit_code == 2


def test_images_of_mixed_sizes_and_modes_are_learned(here: Path) -> None:
    for index, (mode, size) in enumerate([("L", (9, 20)), ("RGBA", (30, 8)), ("P", (8, 8)), ("1", (16, 16)), ("CMYK", (12, 7))]):
        suffix = "jpg" if mode == "CMYK" else "png"
        Image.new("RGB", size, (10 * index, 200, 30)).convert(mode).save(here / "images" / "ant" / f"mixed {index}.{suffix}")
    ended = train("images")
    assert ended.exit_code == 0, ended.output


def test_a_single_unreadable_image_is_left_out_and_named(here: Path) -> None:
    (here / "images" / "ant" / "0.png").write_bytes(b"no image")
    ended = train("images")
    assert ended.exit_code == 0, ended.output
    notes = json.loads(Path("run/metrics.json").read_text())["notes"]
    assert any("skipped" in note and "images/ant/0.png" in note for note in notes)


def test_a_damaged_checkpoint_is_passed_over_and_named(here: Path) -> None:
    from der_fast.training.storage.checkpoint import Checkpoints

    class Stopped(Checkpoints):
        def save(self, state: Any) -> None:
            super().save(state)
            if (state.step, state.stage) == (2, "classifier"):
                raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("der_fast.training.run.Checkpoints", Stopped)
        assert train("images").exit_code == 130
    newest = max(Path("run/checkpoints").glob("*.safetensors"))
    newest.write_bytes(newest.read_bytes()[:-30])
    ended = train("images", "--resume")
    assert ended.exit_code == 0, ended.output
    assert f"note: checkpoint {newest.stem} is skipped, going back to the one before" in ended.stderr


@pytest.mark.parametrize("name", ["eval", "predict"])
def test_a_damaged_step_is_passed_over_and_named(name: str, finished: Path) -> None:
    path = Path("run/steps/02/learner.json")
    path.write_bytes(path.read_bytes()[:-20])
    ended = command(name, "run", *(["images"] if name == "predict" else []))
    assert ended.exit_code == 0, ended.output
    assert "note: the state after step 2 cannot be used" in ended.stderr
    assert "going back to the one before" in ended.stderr


def test_a_backend_that_cannot_run_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    draw(Path("images"), FOUR)
    monkeypatch.setattr(triton_runtime, "usable", lambda device: (False, "Triton is not installed (no module of that name)"))
    ended = train("images", "--backend", "fused", "--device", "cpu")
    assert ended.exit_code == 0, ended.output
    said = "fused was asked for, but Triton is not installed (no module of that name)"
    assert said in " ".join(ended.output.split())
    assert json.loads(Path("run/metrics.json").read_text())["backend"] == f"reference ({said})"
    assert train("images", "--backend", "auto", "--device", "cpu", "--out", "auto").exit_code == 0
    assert json.loads(Path("auto/metrics.json").read_text())["backend"] == "reference (auto: no CUDA device in use)"


def test_names_that_are_no_utf8_can_be_shown() -> None:
    code = (
        "from der_fast.cli import main\n"
        "from der_fast.cli.console import output, print_json\n"
        "main.app = lambda: (print_json(['a\\udcff.jpg']), output().print('b\\udcff.jpg'))\n"
        "main.main()\n"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"}, capture_output=True, text=True, timeout=120
    )
    assert shown.returncode == 0, shown.stderr
    listed, _, printed = shown.stdout.rpartition("]")
    assert json.loads(f"{listed}]") == ["a\udcff.jpg"] and printed.split() == [r"b\udcff.jpg"]
