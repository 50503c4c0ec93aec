"""Presets: the paper's recipes as docs/method.md and the paper give them, and how they are found."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from pathlib import Path

import pytest

from der_fast.config import presets
from der_fast.config.presets import describe_preset, find_preset, list_presets, load_preset
from der_fast.config.resolve import resolve_config
from der_fast.config.schema import Config, ScheduleConfig
from der_fast.config.tree import flatten, from_dict
from der_fast.errors import ConfigError

CIFAR_STEP = ScheduleConfig(
    epochs=170, lr=0.1, milestones=(110, 130), gamma=0.1, warmup_epochs=10, warmup_lr=0.01, momentum=0.9, weight_decay=5e-4, batch_size=128
)
CIFAR_BASE = replace(CIFAR_STEP, epochs=200, milestones=(60, 120, 160), warmup_epochs=0)
IMAGENET_STEP = ScheduleConfig(
    epochs=220,
    lr=0.1,
    milestones=(80, 140, 180, 200),
    gamma=0.1,
    warmup_epochs=20,
    warmup_lr=0.01,
    momentum=0.9,
    weight_decay=5e-4,
    batch_size=256,
)
B0 = [f"cifar100-b0-{steps}" for steps in (5, 10, 20, 50)]
B50 = [f"cifar100-b50-{steps}" for steps in (2, 5, 10)]
IMAGENET = ["imagenet100-b0-10", "imagenet100-b50-10", "imagenet1000-b0-10"]


def sgd(stage: ScheduleConfig) -> ScheduleConfig:
    """The keys that every stage has."""
    return ScheduleConfig(**{field.name: getattr(stage, field.name) for field in fields(ScheduleConfig)})


def config_of(name: str) -> Config:
    return resolve_config(preset=name)


@pytest.mark.parametrize("name", [*B0, *B50])
def test_cifar100(name: str) -> None:
    config = config_of(name)
    assert config.data.name == "cifar100"
    assert config.protocol.name == name.removeprefix("cifar100-").upper()
    assert config.protocol.class_order == "icarl"
    assert (config.model.backbone, config.model.stem, config.model.width) == ("resnet18", "small", None)
    assert (config.data.crop_padding, config.data.flip, config.data.random_resized_crop) == (4, True, False)
    assert config.data.brightness == 63 / 255
    assert config.data.mean == (0.5071, 0.4867, 0.4408)
    assert config.data.std == (0.2675, 0.2565, 0.2761)
    assert sgd(config.later) == CIFAR_STEP
    assert config.method.aux_weight == 1.0


@pytest.mark.parametrize("name", B0)
def test_cifar100_b0_steps_and_memory(name: str) -> None:
    config = config_of(name)
    assert config.first == CIFAR_STEP
    assert (config.memory.total, config.memory.per_class) == (2000, None)


@pytest.mark.parametrize("name", B50)
def test_cifar100_b50_steps_and_memory(name: str) -> None:
    config = config_of(name)
    assert config.first == CIFAR_BASE
    assert config.memory.per_class == 20


@pytest.mark.parametrize(("names", "temperature", "batch"), [([*B0, *B50], 5.0, 128), (IMAGENET, 1.0, 256)])
def test_classifier_stage(names: list[str], temperature: float, batch: int) -> None:
    for name in names:
        stage = config_of(name).classifier
        assert (stage.epochs, stage.lr, stage.milestones, stage.gamma) == (30, 0.1, (15,), 0.1)
        assert (stage.weight_decay, stage.warmup_epochs, stage.momentum) == (5e-4, 0, 0.9)
        assert (stage.temperature, stage.batch_size) == (temperature, batch)


@pytest.mark.parametrize("name", IMAGENET)
def test_imagenet(name: str) -> None:
    config = config_of(name)
    assert name == f"{config.data.name}-{config.protocol.name.lower()}"
    assert config.first == sgd(config.later) == IMAGENET_STEP
    assert config.protocol.class_order == "numpy-1993"
    assert (config.model.backbone, config.model.stem) == ("resnet18", "imagenet")
    assert (config.data.image_size, config.data.random_resized_crop, config.data.flip, config.data.brightness) == (224, True, True, 0.0)
    assert config.data.mean == (0.485, 0.456, 0.406)
    assert config.data.std == (0.229, 0.224, 0.225)


def test_imagenet_memory() -> None:
    assert [config_of(name).memory.total for name in IMAGENET] == [2000, 2000, 20000]
    assert [config_of(name).memory.per_class for name in IMAGENET] == [None, 20, None]


def test_cifar10_in_five_steps() -> None:
    config = config_of("cifar10-5x2")
    assert (config.data.name, config.protocol.name, config.model.backbone) == ("cifar10", "B0-5", "resnet32")
    assert (config.protocol.class_order, config.protocol.class_order_seed) == (None, None)
    assert (config.data.train_per_class, config.data.test_per_class) == (1000, 500)
    assert (config.data.crop_padding, config.data.flip, config.data.brightness) == (4, True, 0.0)
    first, later = config.first, config.later
    assert (first.epochs, first.lr, first.milestones, first.gamma, first.weight_decay) == (12, 0.03, (4, 7, 10), 0.1, 5e-4)
    assert (later.epochs, later.lr, later.milestones, later.gamma, later.weight_decay) == (10, 0.03, (5, 7, 9), 0.1, 2e-4)
    assert {first.batch_size, later.batch_size} == {128}
    assert {first.momentum, later.momentum} == {0.9}
    assert {first.warmup_epochs, later.warmup_epochs} == {0}
    assert (config.memory.total, config.memory.per_class) == (200, None)


def test_digits_is_the_demo() -> None:
    config = config_of("digits")
    assert (config.data.name, config.protocol.name, config.model.backbone, config.model.stem) == ("digits", "B0-5", "resnet20", "small")
    assert (config.data.crop_padding, config.data.flip, config.data.brightness) == (1, False, 0.0)


def test_every_preset_says_what_it_is_and_only_sets_known_keys() -> None:
    names = list_presets()
    assert {*B0, *B50, *IMAGENET, "cifar10-5x2", "digits"} <= set(names)
    for name in names:
        assert len(describe_preset(name)) > 10
        assert not {"about", "extends"} & set(flatten(load_preset(name)))
        from_dict(load_preset(name))


@pytest.mark.parametrize(
    ("data", "protocol", "expected"),
    [
        ("cifar100", "B0-10", "cifar100-b0-10"),
        ("cifar100", "b50-5", "cifar100-b50-5"),
        ("cifar100", "B50-25", "cifar100-b50"),
        ("cifar100", "B0-25", "cifar100"),
        ("cifar100", None, "cifar100"),
        ("cifar10", "B0-5", "cifar10"),
        ("digits", "B2-4", "digits"),
        ("photos", None, None),
        ("images", "B0-5", None),
        ("nowhere", "B0-5", None),
        ("/data/imagenet100", "B0-10", "imagenet100-b0-10"),
        ("/data/ImageNet-100/", "B50-10", "imagenet100-b50-10"),
        ("imagenet_subset", "B0-20", "imagenet100"),
        ("D:\\ILSVRC2012", "B0-10", "imagenet1000-b0-10"),
        ("~/imagenet", "B0-20", None),
        ("pictures/cifar100", "B0-5", "cifar100-b0-5"),
        ("pictures/photos", "B0-5", None),
        ("pictures/digits", "B0-5", None),
    ],
)
def test_finding(data: str, protocol: str | None, expected: str | None) -> None:
    assert find_preset(data, protocol) == expected


def test_unknown_presets_name_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown preset 'cifar100-b0-15'; did you mean .*cifar100-b0-5.*All presets: cifar10,"):
        load_preset("cifar100-b0-15")
    with pytest.raises(ConfigError, match=re.escape("unknown preset '../../x'")):
        load_preset("../../x")


def test_circles_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = {"a": {"extends": "b"}, "b": {"extends": "a"}}
    monkeypatch.setattr(presets, "_read", lambda name: dict(tables[name]))
    with pytest.raises(ConfigError, match="in a circle: a → b → a"):
        load_preset("a")


def test_extending_merges_table_by_table(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = {"a": {"extends": "b", "first": {"lr": 1.0}}, "b": {"first": {"lr": 2.0, "epochs": 3}, "memory": {"total": 5}}}
    monkeypatch.setattr(presets, "_read", lambda name: dict(tables[name]))
    assert load_preset("a") == {"first": {"lr": 1.0, "epochs": 3}, "memory": {"total": 5}}


def test_presets_lie_where_they_are_looked_for() -> None:
    folder = Path(presets.__file__).parent / "presets"
    assert list_presets() == sorted(path.stem for path in folder.glob("*.toml"))
