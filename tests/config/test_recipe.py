"""Recipes in files: read with the place of every mistake, extended, and written so that they read back as what they were."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from der_fast.config.check import check
from der_fast.config.methods import METHODS
from der_fast.config.presets import list_presets, preset_config
from der_fast.config.recipe import recipe_text
from der_fast.config.resolve import resolve_config
from der_fast.config.schema import BACKBONES, BACKENDS, PRECISIONS, READERS, STEMS, Config
from der_fast.config.tree import declared, replace_keys
from der_fast.errors import ConfigError

# Without what no file's name and no TOML can hold.
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12).filter(
    lambda text: text.strip()
)
CHOICES = {
    "model.backbone": BACKBONES,
    "model.stem": STEMS,
    "data.reader": READERS,
    "method.name": tuple(METHODS),
    "runtime.backend": BACKENDS,
    "runtime.precision": PRECISIONS,
    "runtime.device": ("auto", "cpu", "cuda", "cuda:3"),
}
PLAIN = {
    int: st.one_of(st.integers(0, 300), st.integers(0, 2**63 - 1)),
    float: st.floats(0, 1e3) | st.floats(0, 1),
    bool: st.booleans(),
    str: TEXTS,
}


def values(dotted: str) -> st.SearchStrategy[Any]:
    group, name = dotted.split(".")
    hint = typing.get_type_hints(type(getattr(Config(), group)))[name]
    optional = [kind for kind in typing.get_args(hint) if kind is not type(None)] if type(None) in typing.get_args(hint) else None
    hint = optional[0] if optional else hint
    if dotted == "protocol.steps":
        return st.none() | st.lists(st.lists(TEXTS, min_size=1, max_size=3).map(tuple), min_size=1, max_size=3).map(tuple)
    if dotted in CHOICES:
        found: st.SearchStrategy[Any] = st.sampled_from(CHOICES[dotted])
    elif typing.get_origin(hint) is tuple:
        kinds = typing.get_args(hint)
        several = kinds[1] is Ellipsis
        found = st.lists(PLAIN[kinds[0]], max_size=4, unique=True).map(sorted).map(tuple) if several else st.tuples(*map(PLAIN.get, kinds))
    else:
        found = PLAIN[hint]
    return (st.none() if optional else st.nothing()) | found.filter(declared()[dotted].rule.accepts)


KEYS = st.fixed_dictionaries({}, optional={dotted: values(dotted) for dotted in declared()})


@given(KEYS)
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture], deadline=None)
def test_what_is_written_reads_back_as_it_was(tmp_path: Path, keys: dict[str, Any]) -> None:
    method = keys.get("method.name", Config().method.name)
    known = {name: value for name, value in keys.items() if declared()[name].method in (None, method)}
    try:
        config = resolve_config(base=Config(), changes={name: value for name, value in known.items() if name != "data.name"})
    except ConfigError:
        # Values that are each in range may contradict each other.
        assume(False)
    (tmp_path / "r.toml").write_text(recipe_text(config), encoding="utf-8")
    assert resolve_config(preset=str(tmp_path / "r.toml")) == config
    assert recipe_text(preset_config(str(tmp_path / "r.toml"))) == recipe_text(config)


@pytest.mark.parametrize("name", list_presets())
def test_every_preset_can_be_written(name: str, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(recipe_text(resolve_config(preset=name)), encoding="utf-8")
    assert resolve_config(preset=str(tmp_path / "r.toml")) == resolve_config(preset=name)
    assert all(
        f"\n{field.name} = " in recipe_text(Config()) for group in (Config().data, Config().later) for field in dataclasses.fields(group)
    )


def test_a_recipe_extends_a_preset_and_other_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / "ours.toml").write_text('about = "ours"\nextends = "cifar100-b0-10"\n[later]\nepochs = 34\n[masks]\nfloor = 0.1\n')
    (tmp_path / "mine.TOML").write_text('extends = "lab/ours.toml"\nlater.epochs = 17\n[memory]\ntotal = 7\n')
    monkeypatch.chdir(tmp_path / "lab")
    config = resolve_config("digits", preset="../mine.TOML")
    assert (config.data.name, config.protocol.name, config.masks.floor, config.memory.total) == ("digits", "B0-10", 0.1, 7)
    # A shorter schedule keeps its shape, step by step: 170 to 34 to 17 epochs.
    assert (config.later.epochs, config.later.milestones, config.later.warmup_epochs) == (17, (11, 13), 1)
    assert config.first == resolve_config(preset="cifar100-b0-10").first
    assert resolve_config("digits", preset="../mine.TOML", changes={"memory.total": 9}).memory.total == 9


def test_a_recipe_that_extends_nothing_is_over_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text("\ufeff[first]\nepochs = 20\n", encoding="utf-8")
    assert preset_config(str(tmp_path / "r.toml")) == replace_keys(Config(), {"first.epochs": 20, "first.milestones": (10, 15)})


def test_the_home_folder_has_a_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "r.toml").write_text("memory.total = 7\n")
    (tmp_path / "s.toml").write_text('extends = "~/r.toml"\n')
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert preset_config("~/s.toml").memory.total == 7


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[later]\nlr = 0.1\nepoch = 3\n", "r.toml, line 3: unknown configuration key 'later.epoch'; did you mean"),
        ("epochs = 3\n", "r.toml, line 1: unknown configuration key 'epochs'; did you mean first.epochs"),
        ('[later]\n\n"lr" = "fast"\n', "r.toml, line 3: later.lr takes a number, not 'fast'"),
        ("later.lr = -1\n", "r.toml, line 1: later.lr takes a number above 0, not -1"),
        ("[lateer]\n", "r.toml, line 1: unknown configuration key 'lateer'"),
        ("later = 3\n", "r.toml, line 1: 'later' is a group of keys"),
        ("[[later]]\nlr = 3\n", "r.toml: 'later' is a group of keys"),
        ("[model]\nbackbone = 'vgg'", "r.toml, line 2: model.backbone takes one of resnet18"),
        ("[model\n", "r.toml is not valid TOML"),
        ("extends = 3\n", "r.toml, line 1: extends takes a text, not 3"),
        ('extends = "cifar"\n', "unknown preset 'cifar'"),
        ('extends = "other.toml"\n', "other.toml: No such file"),
        ('extends = "r.toml"\n', "presets extend each other in a circle"),
        ("data.reader = 'pillow'\n", "r.toml: data.reader='pillow' reads photos, which need data.random_resized_crop=true"),
        ("[later]\nmilestones = [5, 3]\n", "r.toml, line 2: later.milestones takes epochs in increasing order"),
    ],
)
def test_mistakes_are_named_with_their_place(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises(ConfigError) as raised:
        preset_config(str(tmp_path / "r.toml"))
    assert words in str(raised.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "bytes.toml").write_bytes(b"a = \xff\xfe")
    (tmp_path / "folder.toml").mkdir()
    for name, words in {
        "missing": "No such file or directory",
        "bytes": "not text in UTF-8",
        "folder": "Is a directory|Permission denied",
    }.items():
        with pytest.raises(ConfigError, match=rf"cannot read the recipe .*{name}\.toml: .*({words})"):
            preset_config(str(tmp_path / f"{name}.toml"))


def test_texts_that_look_like_nothing_stay_texts(tmp_path: Path) -> None:
    config = check(replace_keys(Config(), {"protocol.class_order": ("none", "true", "3", 'a "quoted" name', "comma, name")}))
    (tmp_path / "r.toml").write_text(recipe_text(config), encoding="utf-8")
    assert preset_config(str(tmp_path / "r.toml")) == config
