from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from der_fast.config.check import check
from der_fast.config.protocols import even_form, planned_steps, protocol_keys, shown
from der_fast.config.resolve import preset_for, resolve_config
from der_fast.config.schema import Config
from der_fast.config.tree import from_dict, replace_keys, to_dict
from der_fast.errors import ConfigError

STEPS = (("cat", "dog"), ("car",))


@pytest.mark.parametrize(
    ("text", "steps"), [("B0-10", 10), ("b50-5", 6), ("10,10,5", 3), (" 4 , 1", 2), ("7", 1), ("", 0), ("4,", 0), ("-1,2", 0), ("B0", 0)]
)
def test_steps_are_counted(text: str, steps: int) -> None:
    assert planned_steps(text) == steps


@pytest.mark.parametrize(
    ("text", "form"),
    [("50,10,10", "B50-2"), ("5,5", "B0-2"), ("7", "B0-1"), ("10,10,5", "10,10,5"), ("2,3", "B2-1"), ("B0-5", "B0-5"), ("?", "?")],
)
def test_sizes_that_are_even_have_the_papers_name(text: str, form: str) -> None:
    assert even_form(text) == form


def test_recipes_go_by_the_even_form() -> None:
    assert preset_for("cifar100", "50,10,10,10,10,10") == preset_for("cifar100", "B50-5")
    assert preset_for("cifar100", "40,60") == "cifar100"


def test_titles_have_room_for_few_sizes() -> None:
    assert shown("1,2,3,4,5,6") == "1,2,3,4,5,6"
    assert shown(",".join(["9"] * 40)) == "9,9,9,9,9,9,… (40 steps)"


@pytest.mark.parametrize("given", [STEPS, [["cat", "dog"], ["car"]], "steps.txt", Path("steps.txt")])
def test_lists_of_classes(given: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("steps.txt").write_text("# two steps\ncat, dog\n\n'car'\n", encoding="utf-8")
    config = resolve_config("digits", given)
    assert (config.protocol.steps, config.protocol.name) == (STEPS, "2,1")
    assert from_dict(to_dict(config)) == config


def test_names_with_commas_are_quoted_in_files(tmp_path: Path) -> None:
    (tmp_path / "steps").write_text('"tench, Tinca tinca",eel\ncar\n')
    assert protocol_keys(str(tmp_path / "steps"))["protocol.steps"] == [["tench, Tinca tinca", "eel"], ["car"]]


def test_sizes() -> None:
    for given in ("4,3,3", " 4 , 3,03 ", [4, 3, 3], (4, 3, 3)):
        assert resolve_config("digits", given).protocol.name == "4,3,3"


def test_steps_by_key(tmp_path: Path) -> None:
    config = resolve_config("digits", changes={"protocol.steps": '[["cat", "dog"], ["car"]]'})
    assert (config.protocol.steps, config.protocol.name) == (STEPS, "2,1")
    # Whoever names another protocol afterwards means it.
    assert resolve_config(protocol="B0-3", base=config).protocol.steps is None
    assert resolve_config(changes={"protocol.name": "B0-3"}, base=config).protocol == resolve_config("digits", "B0-3").protocol
    assert resolve_config(base=config) == config


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "a protocol is a text, a list of sizes"),
        (["cat", "dog"], "a list of lists of class names"),
        ([True, False], "a list of lists of class names"),
        ([["cat"], []], "protocol.steps takes one or more lists of class names"),
        ([["cat"], ["dog", "cat"]], "protocol.steps names 'cat' more than once"),
    ],
)
def test_lists_that_are_no_protocol(given: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        resolve_config("digits", given)


def test_files_that_are_no_protocol(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n# nothing\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="there is no protocol file .*none.txt; a protocol is B0-<steps>"):
        protocol_keys(str(tmp_path / "none.txt"))
    for name, words in (("empty", "names no class"), ("binary", "cannot be read"), ("none", "cannot be read")):
        with pytest.raises(ConfigError, match=words):
            protocol_keys(tmp_path / name)


@pytest.mark.parametrize("text", ["cat,dog", '["cat"]', '{"a": 1}', '[["cat"], "dog"]'])
def test_texts_that_are_no_lists_of_lists(text: str) -> None:
    with pytest.raises(ConfigError, match=r"protocol\.steps takes a list of lists"):
        replace_keys(Config(), {"protocol.steps": text})


@pytest.mark.parametrize("where", ["settings", "recipe"])
@pytest.mark.parametrize(
    ("key", "value", "order"),
    [
        ("class_order_seed", "7", None),
        ("class_order_seed", '"none"', None),
        ("steps", '[["cat", "dog"], ["car"]]', None),
        ("steps", '"none"', "icarl"),
        ("name", '"B0-20"', "icarl"),
    ],
)
def test_steps_and_seeds_replace_the_order_of_a_preset(where: str, key: str, value: str, order: str | None, tmp_path: Path) -> None:
    if where == "recipe":
        (tmp_path / "r.toml").write_text(f'extends = "cifar100-b0-10"\n[protocol]\n{key} = {value}\n')
        config = resolve_config(preset=str(tmp_path / "r.toml"))
    else:
        config = resolve_config("cifar100", "B0-10", changes={f"protocol.{key}": value.strip('"')})
    assert config.protocol.class_order == order
    both = {"protocol.class_order_seed": 7, "protocol.class_order": "podnet-3"}
    assert resolve_config("cifar100", changes=both).protocol.class_order == "podnet-3"


def test_two_orders_contradict_each_other() -> None:
    with pytest.raises(ConfigError, match="both set the order in which"):
        check(replace_keys(Config(), {"protocol.steps": STEPS, "protocol.class_order": ["cat", "dog"]}))
