"""Presets: named recipes in TOML, one per protocol of the paper, that may extend one another; and users' own, in files."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from der_fast.config.datasets import absolute, paper_name
from der_fast.config.protocols import with_order_given
from der_fast.config.recipe import SUFFIX, check_recipe, is_recipe, read_recipe
from der_fast.config.rescale import stretched
from der_fast.config.schema import Config
from der_fast.config.tree import flatten, parse_toml, replace_keys
from der_fast.errors import ConfigError


def list_presets() -> list[str]:
    """Return the names of all presets, sorted."""
    folder = resources.files(__package__) / "presets"
    return sorted(entry.name[: -len(".toml")] for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_preset(name: str) -> dict[str, Any]:
    """Return a preset's keys as nested tables, with everything it extends merged in.

    Args:
        name: a preset's name, or the path of a file that ends with ``.toml``. Such a file may extend a preset, or another file by its
            path relative to the first.

    Raises:
        ConfigError: no such preset (the message lists all), a file that cannot be used, or presets that extend each other in a circle.
    """
    tables, _ = _load(_full_name(name, Path()), ())
    return tables


def preset_config(name: str) -> Config:
    """Return the defaults with a preset's keys over them; raises ConfigError like `load_preset`, or if keys of a file contradict."""
    config = _over(Config(), load_preset(name))
    return check_recipe(name, config) if is_recipe(name) else config


def own_keys(name: str) -> set[str]:
    """Return the dotted keys set by a recipe in a file, or by a file that it extends: a person wrote them. Built-in presets have none.

    Raises:
        ConfigError: see `load_preset`.
    """
    return _own_keys(_full_name(name, Path()), ())


def _own_keys(name: str, below: tuple[str, ...]) -> set[str]:
    if not is_recipe(name):
        return set()
    tables = _read_once(name, below)
    parent = tables.pop("extends", None)
    above = set() if parent is None else _own_keys(_full_name(str(parent), Path(name).parent), (*below, name))
    return above | {key for key in flatten(tables) if key != "about"}


def _over(base: Config, tables: Mapping[str, Any]) -> Config:
    return replace_keys(base, stretched(base, flatten(tables)))


def _full_name(name: str, folder: Path) -> str:
    """Return a preset's name, or a file's absolute path; relative paths start in `folder`."""
    if not is_recipe(name):
        return name
    path = Path(absolute(name) if name.startswith("~") else name)
    return absolute(str(folder / path))


def describe_preset(name: str) -> str:
    """Return a preset's one-line description; raises ConfigError if there is no such preset."""
    return _load(name, ())[1]


def find_preset(data_name: str, protocol: str | None = None) -> str | None:
    """Return the preset made for a data set and protocol, or None.

    ``("cifar100", "B0-10")`` gives ``"cifar100-b0-10"``; a protocol without its own preset gets the recipe of its kind
    (``"cifar100-b50"``) or of the data set (``"cifar100"``). Presets that say more than data set and protocol, such as
    ``"cifar10-5x2"``, are only used when named. A folder with the name of a data set of the paper, such as
    ``"/data/imagenet100"``, counts as that data set.
    """
    known = list_presets()
    for own in (data_name.lower(), paper_name(data_name) or data_name.lower()):
        candidates = [own]
        if protocol is not None:
            lowered = protocol.lower()
            candidates = [f"{own}-{lowered}", f"{own}-{lowered.split('-')[0]}", own]
        for name in candidates:
            # A preset for any folder, such as "photos", says nothing about a folder that happens to be called photos.
            if name in known and load_preset(name).get("data", {}).get("name") == own:
                return name
    return None


def _load(name: str, below: tuple[str, ...]) -> tuple[dict[str, Any], str]:
    tables = _read_once(name, below)
    about = str(tables.pop("about", ""))
    parent = tables.pop("extends", None)
    if parent is not None:
        above = _load(_full_name(str(parent), Path(name).parent), (*below, name))[0]
        # A shortened schedule keeps its shape, wherever it is shortened.
        tables = _merged(above, _nested(stretched(_over(Config(), above), with_order_given(flatten(tables)))))
    return tables, about


def _read_once(name: str, below: tuple[str, ...]) -> dict[str, Any]:
    if name in below:
        raise ConfigError(f"presets extend each other in a circle: {' → '.join((*below, name))}")
    return _read(name)


def _read(name: str) -> dict[str, Any]:
    if is_recipe(name):
        return read_recipe(Path(name))
    known = list_presets()
    if name not in known:
        close = difflib.get_close_matches(name.lower(), known, n=3)
        hint = f"did you mean {', '.join(close)}? All presets" if close else "choose from"
        raise ConfigError(f"unknown preset {name!r}; {hint}: {', '.join(known)}, or give a file of your own, ending with {SUFFIX}")
    entry = resources.files(__package__) / "presets" / f"{name}.toml"
    return parse_toml(entry.read_text(encoding="utf-8"), f"preset {name}")


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    tables: dict[str, Any] = {}
    for dotted, value in flat.items():
        group, _, key = dotted.partition(".")
        tables.setdefault(group, {})[key] = value
    return tables


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with the entries of `changes` over it, table by table."""
    result = dict(base)
    for name, value in changes.items():
        below = result.get(name)
        result[name] = _merged(below, value) if isinstance(value, Mapping) and isinstance(below, Mapping) else value
    return result
