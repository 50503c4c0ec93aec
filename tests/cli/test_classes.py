"""`der-fast learn` with known classes, `rename`, `forget` and `train --protocol` with uneven steps, on a tiny real run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from der_fast.cli.main import app

TINY = ["--width", "2", "--epochs", "1", "--memory", "12", "--set", "classifier.epochs=1", "--set", "runtime.threads=1"]
TINY += ["--set", "masks.bn_images=8", "--quiet"]
COLOURS = {"cat": (200, 30, 20), "dog": (20, 200, 30), "eel": (30, 20, 200), "fox": (200, 200, 20), "[b]gnu": (20, 200, 200)}
Run = Callable[..., Result]


def command(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def draw(folder: Path, counts: dict[str, int], shift: int = 0) -> Path:
    for name, count in counts.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            colour = tuple((part + 2 * index + shift) % 256 for part in COLOURS[name])
            Image.new("RGB", (9, 8), colour).save(folder / name / f"{shift}-{index:02}.png")
    return folder


def metrics_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "metrics.json").read_text())


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than these runs; tests/report looks at what is drawn."""
    monkeypatch.setattr("der_fast.runs.write_report", lambda run: run)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    draw(folder / "images", dict.fromkeys(COLOURS, 6))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("der_fast.runs.write_report", lambda run: run)
        ended = command("train", folder / "images", "--protocol", "2,1,2", "--class-order", "alphabetical", *TINY, "--out", folder / "run")
    assert ended.exit_code == 0, ended.output
    return folder


@pytest.fixture
def here(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained / "run", tmp_path / "run")


def test_uneven_steps(trained: Path) -> None:
    metrics = metrics_of(trained / "run")
    assert (metrics["protocol"], metrics["steps"]) == ("2,1,2", [["[b]gnu", "cat"], ["dog"], ["eel", "fox"]])
    assert metrics["bwt"] is not None
    ended = command("train", "--out", trained / "run", "--resume", "--quiet")
    assert ended.exit_code == 0, ended.output
    refused = command("train", trained / "images", "--protocol", "2,2,2", *TINY, "--out", trained / "other")
    assert (refused.exit_code, "has 6 classes in total, but there are 5" in refused.stderr) == (2, True)


def test_steps_from_a_file(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "steps.txt").write_text("dog, cat\nfox\n")
    run = tmp_path / "run"
    ended = command("train", trained / "images", "--protocol", tmp_path / "steps.txt", *TINY, "--out", run)
    assert ended.exit_code == 0, ended.output
    assert "2 class(es) of the data set are in no step and are not learned: '[b]gnu', 'eel'" in ended.stderr
    assert metrics_of(run)["steps"] == [["dog", "cat"], ["fox"]]
    (tmp_path / "steps.txt").unlink()
    ended = command("train", "--out", run, "--resume", "--quiet")
    assert (ended.exit_code, metrics_of(run)["protocol"]) == (0, "2,1")
    (tmp_path / "steps.txt").write_text("dog\ncat, fox\n")
    ended = command("train", "--out", run, "--resume", "--quiet", "--protocol", tmp_path / "steps.txt")
    assert (ended.exit_code, "was started with another configuration" in ended.stderr) == (2, True)


@pytest.mark.parametrize(
    ("lines", "options", "words"),
    [
        ("dog\nwolf, cat\n", [], "step 2 of protocol.steps names wolf, which the data set does not have"),
        ("dog\ndog\n", [], "names 'dog' more than once"),
        ("\n", [], "names no class"),
        ("dog\ncat\n", ["--class-order", "alphabetical"], "--class-order does not apply to a protocol that names"),
    ],
)
def test_files_of_steps_that_are_refused(lines: str, options: list[str], words: str, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "steps.txt").write_text(lines)
    ended = command("train", trained / "images", "--protocol", tmp_path / "steps.txt", *options, *TINY, "--out", tmp_path / "run")
    assert ended.exit_code == 2, ended.output
    assert words in ended.stderr


def test_a_long_protocol_makes_a_short_folder_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ended = command("train", "digits", "--protocol", ",".join(["1"] * 400))
    assert (ended.exit_code, "has 400 classes in total, but there are 10" in ended.stderr) == (2, True)
    assert "writing to runs/digits-1-1-1-1-1-1-400-steps" in ended.stderr


def test_more_images_of_known_classes(here: Path, tmp_path: Path) -> None:
    before = metrics_of(here)
    ended = command("learn", here, draw(tmp_path / "more", {"cat": 6, "fox": 6}, shift=1))
    assert ended.exit_code == 0, ended.output
    assert "already known: 'cat', 'fox'; they refresh rehearsal memory and classifier; extractors do not change" in ended.stderr
    assert "refreshed: cat, fox" in ended.stdout
    assert "3 refreshed" in ended.stdout
    metrics = metrics_of(here)
    assert (metrics["steps"], metrics["params"], metrics["final_params"]) == (before["steps"], before["params"], before["final_params"])
    again = command("learn", here, tmp_path / "more")
    assert (again.exit_code, "exactly the images that were learned last" in again.stderr) == (2, True)


def test_rename_and_forget(here: Path, trained: Path, tmp_path: Path) -> None:
    ended = command("rename", here, "cat", "[red]tom")
    assert (ended.exit_code, "class 'cat' is now '[red]tom'" in ended.stdout) == (0, True)
    ended = command("forget", here, "[b]gnu", "fox")
    assert ended.exit_code == 0, ended.output
    assert "forgotten: '[b]gnu', 'fox'; 3 class(es) are left" in ended.stdout
    assert "what remains: the extractors" in ended.stdout
    metrics = metrics_of(here)
    assert metrics["steps"] == [["[red]tom"], ["dog"], ["eel"]]
    assert [event["kind"] for event in metrics["events"]] == ["renamed", "forgotten"]
    assert metrics["last_top1"] is not None
    shown = json.loads(command("eval", here, "--json").stdout)
    assert (shown["class_names"], shown["top1"], shown["images"]) == (["[red]tom", "dog", "eel"], metrics["last_top1"], 3)
    rows = json.loads(command("predict", here, trained / "images", "--json").stdout)
    assert {row["class_name"] for row in rows} <= {"[red]tom", "dog", "eel"}
    model = tmp_path / "model.safetensors"
    assert command("export", here, model, "--json").exit_code == 0
    rows = json.loads(command("predict", model, trained / "images", "--json").stdout)
    assert {row["class_name"] for row in rows} <= {"[red]tom", "dog", "eel"}
    assert command("train", "--out", here, "--resume", "--quiet").exit_code == 0
    assert command("learn", here, draw(tmp_path / "again", {"fox": 6}), "--quiet").exit_code == 0
    assert metrics_of(here)["steps"] == [["[red]tom"], ["dog"], ["eel"], ["fox"]]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["rename", "run", "wolf", "x"], "there is no class 'wolf'; the known ones are '[b]gnu', 'cat'"),
        (["rename", "run", "cat", "dog"], "there is already a class 'dog'"),
        (["rename", "run", "cat", ""], "a text that is not empty"),
        (["rename", "nowhere", "cat", "x"], "nowhere holds no saved learner"),
        (["forget", "run", "wolf"], "there is no class 'wolf'"),
        (["forget", "run", "cat", "dog", "eel", "fox", "[b]gnu"], "the last known classes cannot be forgotten"),
        (["forget", "nowhere", "cat"], "nowhere holds no saved learner"),
    ],
)
def test_what_is_refused(arguments: list[str], words: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(here.parent)
    before = metrics_of(here)
    ended = command(*arguments)
    assert ended.exit_code == 2, ended.output
    assert words in ended.stderr
    assert metrics_of(here) == before
    assert not Path("nowhere").exists()
