"""From names to one configuration, and schedules that stretch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from der_fast.config.datasets import KNOWN_NAMES
from der_fast.config.presets import list_presets
from der_fast.config.rescale import rescaled_keys, unreached_note
from der_fast.config.resolve import preset_for, resolve_config
from der_fast.config.schema import Config, ScheduleConfig
from der_fast.config.tree import replace_keys
from der_fast.data.sets.cifar import ARCHIVES
from der_fast.errors import ConfigError


def folder_of(root: Path, sides: list[int], train: bool = False) -> Path:
    for label, side in enumerate(sides):
        folder = root / ("train" if train else ".") / f"class{label}"
        folder.mkdir(parents=True)
        Image.new("RGB", (side, side // 2 + 1)).save(folder / "1.png")
    return root


def test_changes_win_over_protocol_over_preset() -> None:
    config = resolve_config("cifar100", "B0-10", changes={"later.epochs": 3, "later.warmup_epochs": 0})
    assert (config.protocol.name, config.first.epochs, config.later.epochs) == ("B0-10", 170, 3)
    assert resolve_config("cifar100", "B50-5").first.epochs == 200
    assert resolve_config("digits", "B2-4").protocol.name == "B2-4"


def test_a_named_preset_keeps_the_users_data() -> None:
    config = resolve_config("./pictures", preset="cifar10-5x2")
    assert (config.data.name, config.data.train_per_class) == ("./pictures", 1000)


@pytest.mark.parametrize("typed", ["pictures", "./pictures/", "../{here}/pictures", "link", "{absolute}/pictures/"])
def test_folders_are_written_in_full(typed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "link").symlink_to("pictures")
    monkeypatch.chdir(tmp_path)
    data = resolve_config(typed.format(here=tmp_path.name, absolute=tmp_path), changes={"data.root": "archives"}).data
    # A link keeps its name: reports and presets go by it.
    assert data.name == str(tmp_path / ("link" if typed == "link" else "pictures"))
    assert data.root == str(tmp_path / "archives")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_config("~/pictures").data.name == str(tmp_path / "pictures")
    assert resolve_config(changes={"data.name": "pictures"}).data.name == str(tmp_path / "pictures")


def test_known_names_are_no_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    assert resolve_config("digits").data.name == "digits"
    assert resolve_config("./digits").data.name == str(tmp_path / "digits")
    assert resolve_config("no-folder").data.name == "no-folder"
    assert set(KNOWN_NAMES) == {"digits", *ARCHIVES}


@pytest.mark.parametrize(("name", "preset"), [("imagenet100", "imagenet100-b0-10"), ("others", "photos")])
def test_a_folder_of_the_papers_gets_the_papers_recipe(name: str, preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(tmp_path / name, [300])
    assert preset_for(str(folder), "B0-10") == preset
    assert resolve_config(str(folder), "B0-10").data.name == str(folder)
    monkeypatch.chdir(folder)
    assert preset_for(".", "B0-10") == preset


def test_a_base_is_used_instead_of_a_preset() -> None:
    base = replace_keys(Config(), {"data.name": "cifar100", "first.epochs": 7})
    assert resolve_config("cifar100", base=base).first.epochs == 7
    assert resolve_config("cifar100", preset="cifar100", base=base).first.epochs == 170


def test_paper_switches_off_what_is_ours() -> None:
    base = replace_keys(Config(), {"masks.multiple": 8, "masks.floor": 0.5})
    config = resolve_config("digits", paper=True, base=base, changes={"masks.sparsity": 2.0})
    assert (config.masks.settle, config.masks.target_params, config.masks.floor, config.masks.multiple) == (0.0, None, 0.0, 1)
    assert config.masks.enabled


def test_wrong_values_are_refused_here() -> None:
    with pytest.raises(ConfigError, match="masks.settle takes"):
        resolve_config("digits", changes={"masks.settle": 1.0})


@pytest.mark.parametrize(("sides", "expected"), [([28, 32], "images"), ([32, 64], "images64"), ([32, 300], "photos")])
@pytest.mark.parametrize("train", [False, True])
def test_folders_get_a_recipe_by_their_images(tmp_path: Path, sides: list[int], expected: str, train: bool) -> None:
    assert preset_for(str(folder_of(tmp_path / "set", sides, train)), "B0-2") == expected


def test_folders_without_readable_images_get_none(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.jpg").write_bytes(b"no image")
    assert preset_for(str(tmp_path), None) is None
    assert preset_for(str(tmp_path / "missing"), None) is None


def test_a_broken_first_file_does_not_decide(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, [300])
    (folder / "class0" / "0.png").write_bytes(b"")
    assert preset_for(str(folder), None) == "photos"


PAPER = ScheduleConfig(epochs=170, milestones=(110, 130), warmup_epochs=10)


def test_schedules_keep_their_shape() -> None:
    assert rescaled_keys(PAPER, 17) == {"epochs": 17, "milestones": (11, 13), "warmup_epochs": 1}
    assert rescaled_keys(PAPER, 340) == {"epochs": 340, "milestones": (220, 260), "warmup_epochs": 20}
    assert rescaled_keys(PAPER, 170) == {"epochs": 170, "milestones": (110, 130), "warmup_epochs": 10}


def test_very_short_schedules() -> None:
    assert rescaled_keys(PAPER, 1) == {"epochs": 1, "milestones": (), "warmup_epochs": 0}
    assert rescaled_keys(PAPER, 2) == {"epochs": 2, "milestones": (1,), "warmup_epochs": 1}
    four = ScheduleConfig(epochs=220, milestones=(80, 140, 180, 200))
    assert rescaled_keys(four, 4)["milestones"] == (1, 2, 3)


def test_a_milestone_that_is_never_reached_is_not_brought_in() -> None:
    assert rescaled_keys(ScheduleConfig(epochs=10, milestones=(5, 30)), 20)["milestones"] == (10,)


@given(
    st.integers(1, 300),
    st.lists(st.integers(1, 320), unique=True, max_size=6).map(sorted),
    st.integers(0, 30),
    st.integers(1, 400),
)
def test_every_stretched_schedule_is_a_valid_one(old: int, milestones: list[int], warmup: int, new: int) -> None:
    keys = rescaled_keys(ScheduleConfig(epochs=old, milestones=tuple(milestones), warmup_epochs=min(warmup, old - 1)), new)
    found = keys["milestones"]
    assert keys["epochs"] == new
    assert list(found) == sorted(set(found))
    assert keys["warmup_epochs"] < new
    if new != old:
        assert all(1 <= milestone < new for milestone in found)
    resolve_config("digits", changes={f"first.{name}": value for name, value in keys.items()})


@pytest.mark.parametrize("stage", ["first", "later"])
@pytest.mark.parametrize("epochs", [17, "17", 17.0, np.int64(17)])
def test_a_key_moves_milestones_and_warmup(stage: str, epochs: object) -> None:
    changed = getattr(resolve_config("cifar100", "B0-10", changes={f"{stage}.epochs": epochs}), stage)
    assert (changed.epochs, changed.milestones, changed.warmup_epochs) == (17, (11, 13), 1)


def test_what_is_named_beside_epochs_stays() -> None:
    named = {"later.epochs": 17, "later.milestones": (3,), "classifier.epochs": 10}
    config = resolve_config("cifar100", "B0-10", changes=named)
    assert (config.later.milestones, config.later.warmup_epochs) == ((3,), 1)
    assert config.classifier.milestones == (5,)
    assert resolve_config("cifar100", changes={"later.epochs": 17, "later.warmup_epochs": 0}).later.milestones == (11, 13)
    assert resolve_config("cifar100", changes={"later.epochs": 170}).later == resolve_config("cifar100").later
    assert resolve_config("cifar100", changes={"classifier.epochs": 0}).classifier.milestones == (15,)


@pytest.mark.parametrize("epochs", [0, -3, "none", 1.5, "many", True])
def test_epochs_that_are_none_are_refused(epochs: object) -> None:
    with pytest.raises(ConfigError, match="later.epochs takes a whole number"):
        resolve_config("digits", changes={"later.epochs": epochs})


def test_a_run_of_an_earlier_version_keeps_its_milestones() -> None:
    old = replace_keys(resolve_config("digits"), {"later.epochs": 10})
    assert resolve_config("digits", changes={"later.epochs": 10}, begun=old).later == old.later
    assert resolve_config("digits", changes={"later.epochs": 8}, begun=old).later.milestones == (4, 6)
    assert resolve_config("digits", changes={"later.epochs": 10}).later.milestones == (5, 8)


def test_milestones_that_are_never_reached_are_named() -> None:
    config = replace_keys(Config(), {"later.epochs": 20, "classifier.milestones": (3, 30)})
    assert unreached_note(config) == (
        "milestones that are never reached: later.milestones 20, 30 of 20 epochs: the learning rate never falls; "
        "classifier.milestones 30 of 30 epochs: the learning rate falls less often than written"
    )
    assert unreached_note(config, ("first",)) is None
    assert all(unreached_note(resolve_config(preset=name)) is None for name in list_presets())
