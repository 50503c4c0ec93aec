"""The size of a few images decides about a recipe: of folders, lists of files and tars, looked at within bounds."""

from __future__ import annotations

import io
import os
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from der_fast.config import sampled
from der_fast.config.resolve import preset_for, resolve_config
from der_fast.config.sampled import largest_side
from der_fast.errors import DataError


def image(path: Path, side: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side, side // 2 + 1)).save(path, format="png")
    return path


def folder_of(root: Path, side: int) -> Path:
    for name in ("big dog", "cat"):
        for number in range(3):
            image(root / name / f"{number}.png", side)
    return root


def listed(root: Path, write: Callable[[str, str], str], prefix: str = "") -> Path:
    lines = [write(f"{prefix}{path.relative_to(root).as_posix()}", path.parent.name) for path in sorted(root.glob("*/*.png"))]
    (root / "list.txt").write_text("\n".join(lines) + "\n")
    return root / "list.txt"


@pytest.mark.parametrize(("side", "preset"), [(28, "images"), (60, "images64"), (300, "photos")])
def test_a_list_gets_the_recipe_of_its_folder(side: int, preset: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "set", side)
    path = listed(folder, lambda file, name: f"{file} {name.split()[-1]}")
    assert preset_for(str(path), "B0-2") == preset_for(str(folder), "B0-2") == preset
    assert resolve_config(str(path)).model == resolve_config(str(folder)).model


@pytest.mark.parametrize(
    "write",
    [
        lambda file, name: f"{file} 3",
        lambda file, name: f"{file}\t{name}",
        lambda file, name: f"{file}   {name}  ",
        lambda file, name: f"{file},{name}",
        lambda file, name: f'"{file}" "{name}"',
        lambda file, name: f"{file} {name}\r",
    ],
)
@pytest.mark.parametrize("absolute", [False, True])
def test_however_a_line_is_written(write: Callable[[str, str], str], absolute: bool, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "my set", 300)
    assert largest_side(listed(folder, write, f"{folder}/" if absolute else ""), 60) == 300


def test_lists_that_say_nothing_have_no_size(tmp_path: Path) -> None:
    for text in (b"", b"\n\n", b"missing.png cat\n", b"alone", b"\xff\xfe\x00 a\n", b"\0 a", b". a\n"):
        (tmp_path / "list.txt").write_bytes(text)
        assert largest_side(tmp_path / "list.txt", 60) == 0
        assert preset_for(str(tmp_path / "list.txt"), None) is None


def test_of_a_long_list_few_lines_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = image(tmp_path / "small.png", 8), image(tmp_path / "large.png", 300)
    with (tmp_path / "list.txt").open("w") as file:
        file.writelines(f"{small} cat\n" for _ in range(100_000))
        file.writelines(f"{large} dog\n" for _ in range(100_000))
    looked: list[object] = []
    side_of = sampled._side
    monkeypatch.setattr(sampled, "_side", lambda path: (looked.append(path), side_of(path))[1])
    assert largest_side(tmp_path / "list.txt", 60) == 300
    assert 2 <= len(looked) <= 40


def test_images_in_folders_of_a_class_count_and_runs_do_not(tmp_path: Path) -> None:
    image(tmp_path / "cat" / "2021" / "may" / "1.png", 20)
    image(tmp_path / "dog" / "1.png", 20)
    image(tmp_path / "runs" / "digits-b0-5" / "figures" / "accuracy.png", 900)
    (tmp_path / "runs" / "digits-b0-5" / "config.json").write_text('{"config": {}, "train": {}, "test": {}}')
    assert largest_side(tmp_path, 60) == 20


@pytest.mark.parametrize("split", ["train", "Train", "training", "test", "valid"])
def test_splits_are_no_classes(split: str, tmp_path: Path) -> None:
    image(tmp_path / split / "ant" / "1.png", 20)
    image(tmp_path / split / "bee" / "1.png", 300)
    assert largest_side(tmp_path, 60) == 300


@pytest.mark.parametrize("place", ["one.tar", "shards", "split"])
def test_tars(place: str, tmp_path: Path) -> None:
    path = {"one.tar": tmp_path / "one.tar", "shards": tmp_path / "shards" / "0.tar", "split": tmp_path / "split" / "train" / "0.tar"}[
        place
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "split" / "val").mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, side in enumerate((8, 300)):
            data = image(tmp_path / "x.png", side).read_bytes()
            for name, content in ((f"{number}.cls", b"1"), (f"{number}.png", data)):
                facts = tarfile.TarInfo(name)
                facts.size = len(content)
                tar.addfile(facts, io.BytesIO(content))
    assert preset_for(str(tmp_path / place), None) == "photos"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with names are POSIX's")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "list.txt").write_text("pipe.png cat\n")
    assert largest_side(tmp_path / "list.txt", 60) == 0


def test_a_dead_drive_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = threading.Event()
    monkeypatch.setattr(sampled, "_sides", lambda place: [int(answers.wait())])
    try:
        with pytest.raises(DataError, match=r"took longer than data.timeout=0.05 seconds; check the drive"):
            resolve_config(str(folder_of(tmp_path / "set", 8)), changes={"data.timeout": "0.05"})
    finally:
        answers.set()
