"""Ranges: every value outside is refused by key, value and range."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from der_fast.config.check import check
from der_fast.config.presets import list_presets
from der_fast.config.resolve import resolve_config
from der_fast.config.schema import Config, ScheduleConfig
from der_fast.config.tree import declared, replace_keys
from der_fast.errors import ConfigError

# For every key of which some value of the right type is refused: such values.
REFUSED: dict[str, list[Any]] = {
    "data.name": ["", "  "],
    "data.image_size": [3, 0, -1, 2000],
    "data.train_per_class": [0],
    "data.test_per_class": [0],
    "data.test_share": [0.0, 1.0, -0.1, float("nan")],
    "data.crop_padding": [-1, 1000],
    "data.brightness": [-0.1, 1.1],
    "data.mean": [(0.5, 0.5, 1.5)],
    "data.std": [(0.5, 0.0, 0.5), (0.5, float("inf"), 0.5)],
    "data.max_gib": [0.0, float("nan")],
    "data.classes": [(), ("a", "a"), ("a", "")],
    "data.reader": ["opencv"],
    "data.workers": [-1],
    "data.prefetch": [0, 65],
    "data.timeout": [0.0],
    "data.cache_gib": [-1.0],
    "data.hardware_load": [-0.1, 1.1],
    "data.width_hint": [-1],
    "data.height_hint": [-1],
    "protocol.name": [""],
    "protocol.steps": [(), ((),), (("a",), ("b", ""))],
    "protocol.class_order": [(), ("a",), ("a", ""), "paper", "torch-", "podnet-1"],
    "protocol.class_order_seed": [-1, 2**32],
    "model.backbone": ["resnet19", ""],
    "model.width": [0, 5000],
    "model.stem": ["large"],
    "masks.s_max": [1.0, float("inf")],
    "masks.lr": [-0.1],
    "masks.init_low": [-200.0],
    "masks.init_high": [200.0],
    "masks.clamp": [0.0],
    "masks.sparsity": [-1.0, float("nan")],
    "masks.target_params": [0.0, 1.5],
    "masks.price_power": [-0.5],
    "masks.settle": [-0.1, 1.0],
    "masks.floor": [-0.1, 1.1],
    "masks.multiple": [0, 1025],
    "masks.bn_images": [-1],
    **{
        f"{stage}.{name}": values
        for stage in ("first", "later", "classifier")
        for name, values in {
            "epochs": [-1],
            "lr": [0.0, -1.0, float("nan"), float("inf")],
            "milestones": [(0,), (3, 3), (5, 2), (-1, 2)],
            "gamma": [0.0, 2.0],
            "warmup_epochs": [-1],
            "warmup_lr": [-0.1],
            "momentum": [-0.1, 1.0],
            "weight_decay": [-1e-4],
            "batch_size": [1, 0],
        }.items()
    },
    "classifier.temperature": [0.0],
    "classifier.views": [-1],
    "later.views": [-1],
    "memory.total": [-1],
    "memory.per_class": [-1],
    "method.name": ["", "wa", "DER"],
    "method.aux_weight": [-0.5],
    "runtime.seed": [-1, 2**63],
    "runtime.device": ["tpu", "cuda:", "cuda:x", "CPU"],
    "runtime.backend": ["fast"],
    "runtime.precision": ["fp16", ""],
    "runtime.threads": [0],
    "runtime.eval_batch_size": [0],
    "runtime.keep_checkpoints": [0],
    "runtime.features_gib": [-1.0, float("inf")],
    "runtime.checkpoint_seconds": [-1.0, float("inf")],
}


def test_every_key_that_is_no_switch_refuses_something() -> None:
    switches = {dotted for dotted, key in declared().items() if isinstance(key.default, bool)}
    # Any text may name a folder; whether it is one is seen when it is opened.
    assert set(REFUSED) == set(declared()) - switches - {"data.root", "data.test_list"}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in REFUSED.items() for value in values])
def test_values_out_of_range_are_refused(key: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        check(replace_keys(Config(), {key: value}))
    assert str(caught.value).startswith(f"{key} takes {declared()[key].rule.takes}, not ")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("classifier.epochs", 0),
        ("memory.total", 0),
        ("masks.settle", 0.0),
        ("masks.target_params", 1.0),
        ("runtime.device", "cuda:3"),
        ("first.milestones", ()),
        ("first.milestones", (500,)),
        ("masks.floor", 1.0),
        ("data.image_size", 4),
    ],
)
def test_borders_are_accepted(key: str, value: Any) -> None:
    check(replace_keys(Config(), {key: value}))


@pytest.mark.parametrize("key", [f"{stage}.epochs" for stage in ("first", "later")])
def test_training_stages_need_an_epoch(key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key} takes a whole number of at least 1, not 0"):
        check(replace_keys(Config(), {key: 0}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"masks.init_low": 1.5, "masks.init_high": 1.0}, r"masks.init_low \(1.5\) must not be above masks.init_high \(1.0\)"),
        ({"masks.init_high": 7.0}, "must lie within ± masks.clamp"),
        ({"masks.init_low": -2.0, "masks.init_high": -1.0}, "would start dead"),
        ({"first.epochs": 5, "first.warmup_epochs": 5}, r"first.warmup_epochs \(5\) must be below first.epochs \(5\)"),
    ],
)
def test_contradictions_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check(replace_keys(Config(), changes))


def test_classes_that_are_named_twice_are_named() -> None:
    order = (*(f"class {index}" for index in range(100)), "class 7", "class 98", "class 7")
    with pytest.raises(ConfigError) as caught:
        check(replace_keys(Config(), {"protocol.class_order": order}))
    assert str(caught.value) == "protocol.class_order names 'class 7', 'class 98' more than once; list every class once"


def test_an_unknown_order_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"takes icarl, podnet-2, podnet-3, numpy-1993, torch-<seed>, or two or more .*, not 'paper'"):
        check(replace_keys(Config(), {"protocol.class_order": "paper"}))


def test_trees_built_by_hand_are_normalised() -> None:
    by_hand = dataclasses.replace(Config(), first=ScheduleConfig(lr=1, milestones=[3, 4]))  # type: ignore[arg-type]
    checked = check(by_hand)
    assert checked == replace_keys(Config(), {"first.lr": 1.0, "first.milestones": (3, 4)})
    assert isinstance(checked.first.milestones, tuple)
    assert isinstance(checked.first.lr, float)


def test_trees_built_by_hand_with_wrong_types_are_refused() -> None:
    with pytest.raises(ConfigError, match="first.lr takes a number, not None"):
        check(dataclasses.replace(Config(), first=ScheduleConfig(lr=None)))  # type: ignore[arg-type]


def test_defaults_and_presets_pass() -> None:
    assert check(Config()) == Config()
    for name in list_presets():
        config = resolve_config(preset=name)
        assert check(config) == config
