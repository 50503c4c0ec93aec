"""Each option of `der-fast train` changes its keys and no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from der_fast.cli.settings import changes_from, parse_assignments, parse_epochs, read_names
from der_fast.config.resolve import resolve_config
from der_fast.config.schema import Config
from der_fast.config.tree import replace_keys
from der_fast.errors import ConfigError


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({}, {}),
        ({"backbone": None, "no_prune": False}, {}),
        ({"backbone": "resnet18"}, {"model.backbone": "resnet18"}),
        ({"width": 8}, {"model.width": 8}),
        ({"train_per_class": 5, "test_per_class": 4}, {"data.train_per_class": 5, "data.test_per_class": 4}),
        ({"data_root": "archives", "download": True}, {"data.root": "archives", "data.download": True}),
        ({"target_params": 0.1}, {"masks.target_params": 0.1}),
        ({"seed": 0}, {"runtime.seed": 0}),
        ({"device": "cpu", "backend": "reference"}, {"runtime.device": "cpu", "runtime.backend": "reference"}),
        ({"no_prune": True}, {"masks.enabled": False}),
        ({"no_aux": True}, {"method.aux_weight": 0.0}),
        ({"no_expand": True}, {"method.name": "replay"}),
        ({"bound": True}, {"method.name": "bound"}),
        ({"fwt": True}, {"method.fwt": True}),
        ({"tensorboard": True}, {"runtime.tensorboard": True}),
        ({"memory": 500}, {"memory.total": 500, "memory.per_class": None}),
        ({"memory_per_class": 20}, {"memory.per_class": 20}),
        ({"batch_size": 64}, {"first.batch_size": 64, "later.batch_size": 64}),
        ({"class_order": "alphabetical"}, {"protocol.class_order": None, "protocol.class_order_seed": None}),
        ({"class_order": "b, a"}, {"protocol.class_order": ("b", "a")}),
        ({"class_order": "podnet-2"}, {"protocol.class_order": "podnet-2"}),
        ({"class_order": "torch-7"}, {"protocol.class_order": "torch-7"}),
        ({"classes": "b, a"}, {"data.classes": ("b", "a")}),
        ({"settings": ["later.lr=0.5", "data.flip=false"]}, {"later.lr": "0.5", "data.flip": "false"}),
    ],
)
def test_options(options: dict[str, Any], changes: dict[str, Any]) -> None:
    found = changes_from(options, Config())
    assert found == changes
    replace_keys(Config(), found)


def test_epochs_stretch_the_recipe() -> None:
    base = resolve_config(preset="cifar100-b50-5")
    config = resolve_config(base=base, changes=changes_from({"epochs": "20,17"}, base))
    assert (config.first.epochs, config.first.milestones, config.first.warmup_epochs) == (20, (6, 12, 16), 0)
    assert (config.later.epochs, config.later.milestones, config.later.warmup_epochs) == (17, (11, 13), 1)
    assert config.classifier == base.classifier


def test_a_key_wins_over_the_option_and_its_schedule_is_the_recipes() -> None:
    base = resolve_config(preset="cifar100-b0-10")
    config = resolve_config(base=base, changes=changes_from({"epochs": "12", "settings": ["later.epochs=17"]}, base))
    assert (config.first.epochs, config.first.milestones) == (12, (8, 9))
    assert (config.later.epochs, config.later.milestones, config.later.warmup_epochs) == (17, (11, 13), 1)


def test_learning_rate_moves_the_warmup_with_it() -> None:
    base = resolve_config(preset="cifar100-b0-5")
    config = replace_keys(base, changes_from({"lr": 0.05}, base))
    assert (config.first.lr, config.later.lr, config.classifier.lr) == (0.05, 0.05, 0.1)
    assert config.later.warmup_lr == pytest.approx(0.005)


def test_the_classifier_stage_keeps_its_batches() -> None:
    base = resolve_config(preset="cifar10-5x2")
    config = replace_keys(base, changes_from({"batch_size": 64}, base))
    assert (config.first.batch_size, config.later.batch_size, config.classifier.batch_size) == (64, 64, 16)


def test_set_wins_over_options() -> None:
    config = replace_keys(Config(), changes_from({"lr": 0.05, "settings": ["later.lr=0.2"]}, Config()))
    assert (config.first.lr, config.later.lr) == (0.05, 0.2)


def test_class_order_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "order.txt"
    path.write_text("zebra\n\n  ant eater \nbee\n", encoding="utf-8")
    assert changes_from({"class_order": str(path)}, Config()) == {"protocol.class_order": ("zebra", "ant eater", "bee")}


def test_class_order_from_a_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "order.txt"
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ConfigError, match="cannot read .*order.txt"):
        changes_from({"class_order": str(path)}, Config())


def test_class_order_that_is_neither_list_nor_file() -> None:
    with pytest.raises(
        ConfigError, match="neither 'alphabetical', nor one of icarl, .*, numpy-1993, nor class names separated by commas, nor a file"
    ):
        changes_from({"class_order": "missing.txt"}, Config())


def test_a_long_list_of_names_is_not_taken_for_a_path() -> None:
    names = [f"class number {index}" for index in range(2000)]
    assert changes_from({"class_order": ",".join(names)}, Config())["protocol.class_order"] == tuple(names)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"memory": 0}, {"memory_per_class": 20}),
        ({"target_params": 0.1}, {"no_prune": True}),
        ({"target_params": 0.1}, {"paper": True}),
        ({"no_expand": True}, {"bound": True}),
        ({"method": "der"}, {"no_expand": True}),
        ({"method": "bound"}, {"bound": True}),
    ],
)
def test_contradictions_are_refused(one: dict[str, Any], other: dict[str, Any]) -> None:
    changes_from(one, Config())
    changes_from(other, Config())
    with pytest.raises(ConfigError, match="do not go together"):
        changes_from({**one, **other}, Config())


def test_a_list_of_classes_with_a_mark_in_front(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("n01440764 tench\ngoldfish\n", encoding="utf-8-sig")
    assert read_names(str(tmp_path / "classes.txt"), "--classes") == ("n01440764", "goldfish")


@pytest.mark.parametrize(("text", "expected"), [("12", (12, 12)), ("12,10", (12, 10)), (" 3 , 4 ", (3, 4))])
def test_epochs_option(text: str, expected: tuple[int, int]) -> None:
    assert parse_epochs(text) == expected


@pytest.mark.parametrize("text", ["", "0", "3,0", "-1", "1,2,3", "many", "1.5"])
def test_epochs_option_refuses(text: str) -> None:
    with pytest.raises(ConfigError, match="--epochs takes one whole number, or two"):
        parse_epochs(text)


def test_assignments() -> None:
    assert parse_assignments(["later.lr = 0.03", "data.name=a=b", 'data.root="x y"']) == {
        "later.lr": "0.03",
        "data.name": "a=b",
        "data.root": "x y",
    }
    for text in ("later.lr", "=3", " = 3"):
        with pytest.raises(ConfigError, match="--set takes key=value"):
            parse_assignments([text])
