"""Which method: keys of another one are refused by name where a person set them, and saved configurations of 0.1 are understood."""

from __future__ import annotations

from typing import Any

import pytest

from der_fast.config.former import present_keys
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


def test_the_keys_of_der() -> None:
    owned = {name for name, key in declared().items() if key.method == "der"}
    assert owned == {*(f"masks.{name}" for name in to_dict(Config())["masks"]), "method.aux_weight"}


@pytest.mark.parametrize(
    ("expand", "bound", "name"), [(True, False, "der"), (False, False, "replay"), (True, True, "bound"), (False, True, "bound")]
)
def test_saved_configurations_of_version_0_1_say_which_method_it_was(expand: bool, bound: bool, name: str) -> None:
    old = to_dict(Config())
    old["method"] = {"expand": expand, "aux_weight": 0.5, "bound": bound, "fwt": True}
    before = {**old, "method": dict(old["method"])}
    config = from_dict(old)
    assert (config.method.name, config.method.aux_weight, config.method.fwt) == (name, 0.5, True)
    assert old == before
    assert present_keys(to_dict(config)) == to_dict(config)
