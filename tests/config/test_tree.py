"""Configuration trees: changing keys, reading values as people type them, JSON and back."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from der_fast.config.schema import Config
from der_fast.config.tree import declared, from_dict, parse_toml, replace_keys, split_list, to_dict
from der_fast.errors import ConfigError


def value_after(key: str, value: Any) -> Any:
    node: Any = replace_keys(Config(), {key: value})
    for part in key.split("."):
        node = getattr(node, part)
    return node


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("later.lr", "0.03", 0.03),
        ("later.lr", ".5", 0.5),
        ("later.lr", "1e-3", 1e-3),
        ("later.lr", 1, 1.0),
        ("first.epochs", "12", 12),
        ("first.epochs", "1e2", 100),
        ("masks.enabled", "False", False),
        ("masks.enabled", "true", True),
        ("masks.target_params", "none", None),
        ("masks.target_params", "0.1", 0.1),
        ("masks.target_params", None, None),
        ("runtime.threads", "", None),
        ("protocol.class_order_seed", "none", None),
        ("data.name", "7", "7"),
        ("first.milestones", "4,7,10", (4, 7, 10)),
        ("first.milestones", "[4, 7, 10]", (4, 7, 10)),
        ("first.milestones", [4, 7.0], (4, 7)),
        ("first.milestones", "", ()),
        ("data.mean", "0.1, .2, 0.3", (0.1, 0.2, 0.3)),
        ("protocol.class_order", "cat,dog", ("cat", "dog")),
        ("protocol.class_order", '"cat, wild", dog', ("cat, wild", "dog")),
        ("protocol.class_order", "['cat', 'dog']", ("cat", "dog")),
        ("protocol.class_order", "owl (barn),owl (snow)", ("owl (barn)", "owl (snow)")),
        ("protocol.class_order", "1,2", ("1", "2")),
        ("protocol.class_order", "icarl", "icarl"),
        ("data.root", " 'a, b' ", " 'a, b' "),
        ("protocol.class_order", " 'podnet-2' ", "podnet-2"),
        ("protocol.class_order", ["icarl"], ("icarl",)),
        ("protocol.class_order", "[icarl]", ("icarl",)),
        ("protocol.class_order", "none", None),
    ],
)
def test_values_are_read_as_the_keys_type(key: str, value: Any, expected: Any) -> None:
    found = value_after(key, value)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("later.lr", "fast", "later.lr takes a number, not 'fast'"),
        ("first.epochs", "2.5", "first.epochs takes a whole number, not 2.5"),
        ("first.epochs", True, "first.epochs takes a whole number, not True"),
        ("first.epochs", "true", "first.epochs takes a whole number, not True"),
        ("masks.enabled", "1", "masks.enabled takes true or false, not 1"),
        ("masks.enabled", 1, "masks.enabled takes true or false, not 1"),
        ("data.name", 5, "data.name takes a text, not 5"),
        ("first.epochs", "none", "first.epochs takes a whole number"),
        ("first.milestones", 5, "first.milestones takes a list"),
        ("first.milestones", "4,late", "first.milestones takes a whole number, not 'late'"),
        ("data.std", "1,2", "data.std takes 3 values, not 2"),
        ("first.epoch", 3, "did you mean first.epochs"),
        ("lr", 3, "did you mean masks.lr, first.lr, later.lr, classifier.lr"),
        ("nothing.like.it", 3, "choose from data, protocol"),
        ("first", 3, "'first' is a group of keys"),
        ("first.lr.x", 3, "'lr' has no keys below it"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(key: str, value: Any, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        replace_keys(Config(), {key: value})
    assert words in str(caught.value)


def test_replacing_leaves_the_original_alone() -> None:
    original = Config()
    changed = replace_keys(original, {"later.lr": 0.03, "masks.enabled": False})
    assert (changed.later.lr, changed.masks.enabled) == (0.03, False)
    assert original == Config()
    assert changed.first == original.first


_changes = st.fixed_dictionaries(
    {},
    optional={
        "later.lr": st.floats(1e-6, 1e3),
        "first.milestones": st.lists(st.integers(1, 10**6), max_size=5),
        "protocol.class_order": st.none() | st.lists(st.text(max_size=8), max_size=4) | st.just("icarl"),
        "masks.target_params": st.none() | st.floats(0.001, 1),
        "data.mean": st.lists(st.floats(0, 1), min_size=3, max_size=3),
        "data.name": st.text(min_size=1, max_size=20),
        "runtime.seed": st.integers(0, 2**63 - 1),
        "method.name": st.sampled_from(["der", "replay", "bound"]),
    },
)


@given(_changes)
def test_json_and_back_gives_the_same_tree(changes: dict[str, Any]) -> None:
    config = replace_keys(Config(), changes)
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


@given(st.lists(st.text("abc xyz()[]._-", min_size=1).map(str.strip).filter(lambda name: bool(name)), min_size=2, max_size=5))
def test_lists_of_names_survive_the_command_line(names: list[str]) -> None:
    if (names[0][0], names[-1][-1]) == ("[", "]"):
        names = [*names, "end"]
    assert split_list(",".join(names)) == names


def test_unknown_groups_are_refused() -> None:
    with pytest.raises(ConfigError, match="unknown configuration group 'modle'; choose from data"):
        from_dict({"modle": {"width": 3}})


def test_broken_toml_names_its_source() -> None:
    with pytest.raises(ConfigError, match="preset x is not valid TOML"):
        parse_toml("a = ", "preset x")


def test_every_key_has_a_meaning() -> None:
    keys = declared()
    assert {"data.name", "masks.settle", "classifier.temperature", "runtime.tensorboard"} <= set(keys)
    assert keys["masks.s_max"].default == Config().masks.s_max
    assert all(len(key.doc) > 4 for key in keys.values())
