"""`der_fast.train`: what it accepts, what it writes, and how a run is resumed."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import der_fast
from der_fast.api import evaluate_run, train
from der_fast.config.resolve import resolve_config
from der_fast.data import MemorySource, load_dataset
from der_fast.errors import CheckpointError, ConfigError, DataError
from der_fast.runs import train_run
from der_fast.training.learner import Learner
from der_fast.training.progress import Observer
from der_fast.training.provenance import GIVEN
from der_fast.training.storage.named_files import load_manifest, save_manifest


class Pictures:
    """A map-style data set of Pillow images of several sizes."""

    classes = ("cat", "dog", "eel", "fox")

    def __init__(self, count: int = 16, sizes: Sequence[tuple[int, int]] = ((20, 14), (15, 15), (9, 30))) -> None:
        self.count, self.sizes = count, sizes

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        width, height = self.sizes[index % len(self.sizes)]
        return Image.fromarray(np.random.default_rng(index).integers(0, 256, (height, width, 3), dtype=np.uint8)), index % 4


def test_the_face_of_the_package() -> None:
    for name in der_fast.__all__:
        assert getattr(der_fast, name) is not None
    assert der_fast.train is train
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        der_fast.nothing  # noqa: B018


def test_a_run_draws_its_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: dict[str, Any]) -> None:
    from der_fast.report import write_report

    monkeypatch.setattr("der_fast.runs.write_report", write_report)
    result = train("digits", "B0-2", out=str(tmp_path / "run"), settings=tiny)
    assert result.out == tmp_path / "run"
    assert result.metrics == json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert result.learner.class_names == tuple(result.metrics["class_names"])
    assert (result.metrics["dataset"], result.metrics["protocol"]) == ("digits", "B0-2")
    assert "<html" in (tmp_path / "run" / "report.html").read_text()


def test_the_presets_of_a_data_set_are_used_and_settings_win(tiny: dict[str, Any]) -> None:
    seen: list[Any] = []

    class Stop(Observer):
        def run_begins(self, steps: int, config: Any) -> None:
            seen.append(config)
            raise KeyboardInterrupt

    for keys in ({}, {"paper": True}, {"preset": "images"}, {"settings": {**tiny, "masks.settle": 0.25}, "paper": True}):
        with pytest.raises(KeyboardInterrupt):
            train("digits", "B0-2", observer=Stop(), **keys)
    plain, paper, preset, set_by_hand = seen
    # What 'auto' stands for here is written down with the run.
    own = {"runtime.precision": "bf16" if torch.cuda.is_available() else "fp32"}
    assert plain == resolve_config("digits", "B0-2", changes=own)
    assert paper.masks.settle == 0
    assert preset == resolve_config("digits", "B0-2", preset="images", changes=own)
    assert (set_by_hand.masks.settle, set_by_hand.model.width) == (0.25, 2)


def test_a_pair_of_sources_leaves_nothing_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: dict[str, Any]) -> None:
    monkeypatch.chdir(tmp_path)
    sources = load_dataset(resolve_config("digits", changes=tiny).data)
    result = train(sources, "B5-1", settings=tiny)
    assert result.out is None
    assert [len(names) for names in result.metrics["steps"]] == [5, 5]
    assert result.metrics["dataset"] == GIVEN
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "stored"),
    [({}, (32, 32)), ({"data.image_size": 12}, (12, 12)), ({"data.image_size": 14, "data.random_resized_crop": True}, (16, 16))],
)
def test_a_pair_of_data_sets_of_mixed_sizes(changes: dict[str, Any], stored: tuple[int, int], tmp_path: Path, tiny: dict[str, Any]) -> None:
    result = train((Pictures(), Pictures(8, [(40, 40)])), "B0-2", out=tmp_path / "run", settings={**tiny, **changes})
    assert sorted(result.learner.class_names) == ["cat", "dog", "eel", "fox"]
    assert result.learner.image_size == stored
    loaded = Learner.load(tmp_path / "run")
    assert loaded.predict([Pictures()[0][0]]) == result.learner.predict([Pictures()[0][0]])
    assert loaded.evaluate(Pictures(8, [(40, 40)])).confusion == result.metrics["confusion"]


def test_a_folder_of_class_folders(tmp_path: Path, tiny: dict[str, Any], folder_of: Callable[..., Path]) -> None:
    folder = folder_of(tmp_path / "shapes", {"cube": 6, "disc": 6})
    result = train(folder, "B0-2", settings={**tiny, "memory.total": 4, "data.image_size": 8})
    assert sorted(result.learner.class_names) == ["cube", "disc"]
    assert result.metrics["dataset"] == str(folder)


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        ("no-such-data", DataError, "unknown data set 'no-such-data'"),
        (3, ConfigError, "not int"),
        ([Pictures(), Pictures()], ConfigError, "pair .train, test., not list"),
        ((Pictures(),), ConfigError, "not tuple"),
        ((Pictures(), 5), DataError, "is not a map-style data set"),
        ((Pictures(0), Pictures()), DataError, "is empty"),
    ],
)
def test_data_that_cannot_be_used(data: Any, error: type[Exception], words: str, tmp_path: Path, tiny: dict[str, Any]) -> None:
    with pytest.raises(error, match=words):
        train(data, "B0-2", out=tmp_path / "run", settings=tiny)
    assert not (tmp_path / "run").exists()


def test_a_finished_run_is_resumed(copy: Path, tiny: dict[str, Any]) -> None:
    before = (copy / "metrics.json").read_text()
    result = train("digits", "B0-2", out=copy, settings=tiny, resume=True)
    assert json.loads(before)["top1"] == result.metrics["top1"]
    with pytest.raises(CheckpointError, match="later.lr was 0.02, now 0.5"):
        train("digits", "B0-2", out=copy, settings={**tiny, "later.lr": 0.5}, resume=True)
    with pytest.raises(ConfigError, match="already holds a run"):
        train("digits", "B0-2", out=copy, settings=tiny)


def test_a_run_whose_data_set_has_no_name(tmp_path: Path, tiny: dict[str, Any]) -> None:
    learner = Learner(resolve_config("digits", changes=tiny))
    colours = torch.arange(8, dtype=torch.uint8)[:, None, None, None].expand(-1, 8, 8, 3) * 30
    learner.learn(MemorySource(colours, torch.tensor([0, 1] * 4), ["black", "white"]))
    learner.save(tmp_path / "one")
    with pytest.raises(DataError, match="none of the images .* can be read"):
        evaluate_run(tmp_path / "one")
    train((Pictures(), Pictures()), "B0-2", out=tmp_path / "two", settings=tiny)
    with pytest.raises(DataError, match=r"16 held-out .* of 4 class.* were given as datasets and cannot be read here. Give a folder"):
        evaluate_run(tmp_path / "two")


def test_tensorboard_files_are_closed_whatever_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: dict[str, Any]) -> None:
    pytest.importorskip("tensorboard")
    from der_fast.report.tensorboard import TensorBoardObserver

    closed: list[int] = []
    close = TensorBoardObserver.close
    monkeypatch.setattr(TensorBoardObserver, "close", lambda own: (closed.append(1), close(own))[1])
    config = resolve_config("digits", "B0-2", changes={**tiny, "runtime.tensorboard": True})
    train_run(config, tmp_path / "run")
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1
    # A folder that is refused gets no files.
    with pytest.raises(ConfigError, match="already holds a run"):
        train_run(config, tmp_path / "run")
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1
    with pytest.raises(ConfigError, match="does not divide"):
        train_run(resolve_config("digits", "B0-3", changes={**tiny, "runtime.tensorboard": True}), tmp_path / "other")
    assert len(closed) == 2


class Begun(Exception):
    """Raised where a run begins: it holds the configuration."""


class Stopped(Observer):
    def run_begins(self, steps: int, config: Any) -> None:
        raise Begun(config)


def begun(*arguments: Any, **keys: Any) -> Any:
    with pytest.raises(Begun) as raised:
        train(*arguments, observer=Stopped(), **keys)
    return raised.value.args[0]


def test_a_recipe_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('extends = "digits"\n[later]\nepochs = 4\n')
    for preset in (tmp_path / "mine.toml", str(tmp_path / "mine.toml")):
        config = begun("digits", "B0-2", preset=preset)
        assert (config.later.epochs, config.later.milestones, config.first.epochs) == (4, (2, 3), 20)


def test_where_and_how_it_runs_are_plain_arguments() -> None:
    config = begun("digits", "B0-2", backend="reference", device="cpu", precision="bf16", settings={"runtime.device": "cpu"})
    assert (config.runtime.backend, config.runtime.device, config.runtime.precision) == ("reference", "cpu", "bf16")
    with pytest.raises(ConfigError, match=r"device='cpu', but settings have runtime.device='cuda'; give one of them"):
        begun("digits", "B0-2", device="cpu", settings={"runtime.device": "cuda"})


def test_integers_of_numpy_are_integers() -> None:
    given = {"later.epochs": np.int64(4), "first.epochs": np.array(4), "model.width": np.uint8(2), "memory.total": torch.tensor(20),
             "later.lr": np.float32(0.5), "data.flip": np.bool_(True), "first.milestones": np.array([1, 3]),
             "runtime.threads": np.int32(1)}  # fmt: skip
    plain = {"later.epochs": 4, "first.epochs": 4, "model.width": 2, "memory.total": 20, "later.lr": 0.5, "data.flip": True,
             "first.milestones": (1, 3), "runtime.threads": 1}  # fmt: skip
    config = begun("digits", "B0-2", settings=given)
    assert config == resolve_config("digits", "B0-2", changes={**plain, "runtime.precision": config.runtime.precision})
    json.dumps(config.__dict__, default=vars)
    for wrong in (np.float64(1.5), np.bool_(True), np.array([1, 2])):
        with pytest.raises(ConfigError, match="model.width takes a whole number"):
            begun("digits", settings={"model.width": wrong})


def test_top_is_any_integer(trained: Path) -> None:
    learner, image = Learner.load(trained), np.zeros((8, 8, 3), dtype=np.uint8)
    for top in (np.int64(2), np.array(2), torch.tensor(2)):
        assert learner.predict([image], top=top) == learner.predict([image], top=2)  # type: ignore[arg-type]
    for wrong in (0, True, 1.5, np.float32(2), None, "2"):
        with pytest.raises(ConfigError, match="^top takes a whole number of at least 1, not"):
            learner.predict([image], top=wrong)  # type: ignore[arg-type]


def test_a_run_is_gone_on_with_as_it_was_begun(copy: Path, tiny: dict[str, Any]) -> None:
    facts = load_manifest(copy / "config.json")
    # As earlier versions began it: milestones were left where the recipe has them.
    facts["config"]["later"].update(epochs=5, milestones=[10, 15])
    save_manifest(copy / "config.json", facts)
    again = {"out": copy, "resume": True}
    settings = {key: value for key, value in tiny.items() if not key.startswith("later.")}
    changes = {**settings, "later.epochs": 5, "later.batch_size": 16, "later.lr": 0.02}
    for keys in ({}, {"settings": changes}, {"preset": "digits", "settings": changes}):
        config = begun("digits", "B0-2", **again, **keys)
        assert (config.later.epochs, config.later.milestones) == (5, (10, 15))


def test_messages_name_arguments(copy: Path, tiny: dict[str, Any]) -> None:
    with pytest.raises(
        ConfigError, match=r"already holds a run. Continue it with resume=True, or choose another folder with out\."
    ) as raised:
        train("digits", "B0-2", out=copy, settings=tiny)
    assert raised.value.on_command_line().endswith("Continue it with --resume, or choose another folder with --out.")
