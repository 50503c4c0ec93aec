"""Which method: keys of another one are refused by name where a person set them, and saved configurations of 0.1 are understood."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from der_fast.config.check import check
from der_fast.config.former import present_keys
from der_fast.config.presets import own_keys
from der_fast.config.recipe import recipe_text
from der_fast.config.resolve import resolve_config
from der_fast.config.schema import Config
from der_fast.config.tree import declared, from_dict, to_dict
from der_fast.errors import ConfigError


@pytest.mark.parametrize("name", ["replay", "bound"])
@pytest.mark.parametrize(("key", "value"), [("masks.sparsity", 0.5), ("masks.enabled", False), ("method.aux_weight", 0.0)])
def test_a_key_of_another_method_is_refused_by_name(name: str, key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{key} is a key of 'der', but method.name is '{name}'"):
        resolve_config("digits", changes={"method.name": name, key: value})
    assert resolve_config("digits", changes={"method.name": "der", key: value}).method.name == "der"


def test_what_presets_and_common_options_hold_is_not_refused() -> None:
    config = resolve_config("cifar100", "B0-10", paper=True, changes={"method.name": "replay", "later.lr": 0.05, "method.fwt": True})
    assert (config.method.name, config.later.lr) == ("replay", 0.05)


@pytest.mark.parametrize("place", ["mine", "extended"])
def test_a_key_of_another_method_in_a_recipe_of_ones_own_is_refused_by_name(place: str, tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text('extends = "cifar100-b0-10"\nmasks.floor = 0.1\n[method]\nfwt = true\n')
    if place == "extended":
        (tmp_path / "more.toml").write_text('extends = "mine.toml"\nabout = "more"\n')
        mine = tmp_path / "more.toml"
    assert resolve_config(preset=str(mine)).masks.floor == 0.1
    with pytest.raises(ConfigError, match=r"^masks.floor is a key of 'der', but method.name is 'replay'"):
        resolve_config(preset=str(mine), changes={"method.name": "replay"})
    # What a preset holds that the recipe extends is not the person's.
    assert own_keys(str(mine)) == {"masks.floor", "method.fwt"}
    assert own_keys("cifar100-b0-10") == set()


def test_a_recipe_that_is_written_holds_the_keys_of_its_method(tmp_path: Path) -> None:
    config = resolve_config("cifar100", "B0-10", changes={"method.name": "replay"})
    (tmp_path / "r.toml").write_text(recipe_text(config), encoding="utf-8")
    again = resolve_config(preset=str(tmp_path / "r.toml"))
    assert "masks" not in recipe_text(config) and "aux_weight" not in recipe_text(config)
    assert replace(again, masks=config.masks) == config
    with pytest.raises(ConfigError, match="masks.enabled is a key of 'der'"):
        resolve_config(preset=str(tmp_path / "r.toml"), changes={"masks.enabled": False})


def test_the_keys_of_der() -> None:
    owned = {name for name, key in declared().items() if key.method == "der"}
    assert owned == {*(f"masks.{name}" for name in to_dict(Config())["masks"]), "method.aux_weight", "later.views"}


@pytest.mark.parametrize(
    ("protocol", "order"),
    [
        ({}, "torch-1993"),
        ({"class_order_seed": 2**63 - 1}, f"torch-{2**63 - 1}"),
        ({"class_order_seed": None}, None),
        ({"class_order": ["b", "a"], "class_order_seed": 2**40}, ("b", "a")),
        ({"steps": [["b"], ["a"]], "class_order_seed": 5}, None),
    ],
)
def test_saved_configurations_of_version_0_1_name_their_order(protocol: dict[str, Any], order: Any) -> None:
    config = check(from_dict({"method": {"expand": True}, "protocol": protocol}))
    assert (config.protocol.class_order, config.protocol.class_order_seed) == (order, None)
    assert from_dict({"protocol": {"class_order_seed": 5}}).protocol.class_order is None


@pytest.mark.parametrize(
    ("expand", "bound", "name"), [(True, False, "der"), (False, False, "replay"), (True, True, "bound"), (False, True, "bound")]
)
def test_saved_configurations_of_version_0_1_say_which_method_it_was(expand: bool, bound: bool, name: str) -> None:
    old = to_dict(Config())
    old["method"] = {"expand": expand, "aux_weight": 0.5, "bound": bound, "fwt": True}
    before = {**old, "method": dict(old["method"])}
    config = from_dict(old)
    assert (config.method.name, config.method.aux_weight, config.method.fwt) == (name, 0.5, True)
    # Then a seed of the class order was one of PyTorch's generator, and the order of the remaining steps follows from it.
    assert (config.protocol.class_order, config.protocol.class_order_seed) == ("torch-1993", None)
    assert old == before
    assert present_keys(to_dict(config)) == to_dict(config)


def test_runs_saved_before_there_were_fixed_views_keep_fresh_crops() -> None:
    old = to_dict(Config())
    del old["later"]["views"], old["classifier"]["views"], old["runtime"]["features_gib"]
    assert present_keys(old)["later"]["views"] == present_keys(old)["classifier"]["views"] == 0
    given = {"classifier": {"epochs": 3}}
    assert present_keys(given) == given
