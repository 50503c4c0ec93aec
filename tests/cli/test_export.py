"""`der-fast export`, and `der-fast predict` from what it wrote."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from typer.testing import Result

from der_fast.api import train
from der_fast.training import latency
from der_fast.training.learner import Learner

Run = Callable[..., Result]
TINY = {
    "model.backbone": "resnet20", "model.width": 2, "data.train_per_class": 8, "data.test_per_class": 2, "memory.total": 20,
    "masks.bn_images": 16, "masks.floor": 0.5, "runtime.threads": 1,
    **{f"{stage}.{key}": value for stage in ("first", "later", "classifier")
       for key, value in {"epochs": 1, "milestones": (), "warmup_epochs": 0, "batch_size": 16, "lr": 0.05}.items()},
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One step of ten digits."""
    out = tmp_path_factory.mktemp("export") / "run"
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("der_fast.runs.write_report", lambda run: None)
        patch.setattr(latency, "REPEATS", 1)
        train("digits", "B0-1", out=out, settings=TINY)
    yield out
    torch.set_num_threads(threads)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    Image.fromarray((load_digits().images[7] * 15).astype("uint8")).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.mark.parametrize("name", ["model.onnx", "model.safetensors"])
def test_predict_works_without_the_run(name: str, run: Run, trained: Path, photo: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(trained, tmp_path / "run")
    wanted = json.loads(run("predict", copy, photo, "--json", "--top", 10).stdout)
    ended = run("export", copy, f"out/{name}")
    assert ended.exit_code == 0, ended.output
    assert f"model: out/{name}" in ended.stdout
    assert "10 classes" in ended.stdout
    shutil.rmtree(copy)
    found = json.loads(run("predict", f"out/{name}", photo, "--json", "--top", 10).stdout)
    assert [row["class_name"] for row in found] == [row["class_name"] for row in wanted]
    assert found[0]["probability"] == pytest.approx(wanted[0]["probability"], abs=1e-5)
    assert len(found[0]["top"]) == 10
    assert wanted[0]["class_name"] in run("predict", f"out/{name}", photo).stdout


def test_json_and_options(run: Run, trained: Path, photo: Path) -> None:
    ended = run("export", trained, "raw.onnx", "--raw-uint8", "--check", photo, "--json")
    assert ended.exit_code == 0, ended.output
    done = json.loads(ended.stdout)
    assert (done["path"], done["images"], done["nbytes"]) == ("raw.onnx", 1, Path("raw.onnx").stat().st_size)
    assert done["difference"] < 1e-4
    assert json.loads(run("predict", "raw.onnx", photo, "--json").stdout)[0]["class_name"] in "0123456789"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["RUN", "model.h5"], "unknown format .h5"),
        (["RUN", "model.onnx", "--aoti"], "AOTInductor writes .pt2"),
        (["RUN", "a.onnx/model.onnx"], "is a file, not a folder"),
        (["RUN", "folder.onnx"], "is a folder"),
        (["RUN", "model.onnx", "--check", "none.png"], "none.png"),
        (["none", "model.onnx"], "there is no run folder none"),
        (["begun", "model.onnx"], "no finished step yet"),
    ],
)
def test_what_cannot_be_exported(arguments: list[str], words: str, run: Run, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_text("x")
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "begun").mkdir()
    shutil.copy(trained / "config.json", tmp_path / "begun")
    before = sorted(tmp_path.rglob("*"))
    ended = run("export", *[trained if argument == "RUN" else argument for argument in arguments])
    assert ended.exit_code == 2
    assert words in ended.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_files_that_cannot_predict(run: Run, photo: Path, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_text("no model")
    for arguments, words in (
        (["model.onnx"], "not an ONNX file that onnxruntime can run"),
        (["model.onnx", "--backend", "reference"], "--backend is for runs"),
        (["none.onnx"], "there is no file or folder none.onnx"),
        (["photo.png"], "unknown kind of file"),
    ):
        ended = run("predict", arguments[0], photo, *arguments[1:])
        assert (ended.exit_code, words in ended.stderr) == (2, True), ended.stderr


def test_backend_and_device_still_reach_a_run(run: Run, trained: Path, photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    load = Learner.load
    monkeypatch.setattr(Learner, "load", lambda folder, **rest: asked.append(rest) or load(folder, **rest))
    assert run("predict", trained, photo, "--backend", "reference", "--device", "cpu").exit_code == 0
    assert [{key: rest[key] for key in ("device", "backend")} for rest in asked] == [{"device": "cpu", "backend": "reference"}]
