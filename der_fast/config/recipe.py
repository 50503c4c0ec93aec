"""A user's own recipe in a file: TOML like the presets, read with the place of every mistake, and written from a configuration."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w

from der_fast.config.check import check
from der_fast.config.schema import Config
from der_fast.config.tree import declared, flatten, parse_toml, replace_keys, to_dict
from der_fast.errors import ConfigError

SUFFIX = ".toml"

# What a recipe may hold in addition to configuration keys.
_OWN = ("about", "extends")
_HEADER = re.compile(r"\s*\[([^\[\]]+)\]\s*(#.*)?")
_KEY = re.compile(r"\s*([\w\s.\"'-]+?)\s*=")


def is_recipe(name: str) -> bool:
    """Whether a preset's name is a file."""
    return name.lower().endswith(SUFFIX)


def read_recipe(path: Path) -> dict[str, Any]:
    """Return the tables of a recipe, with ``about`` and ``extends`` if it has them.

    Raises:
        ConfigError: a file that cannot be read or is not TOML, an unknown key, or a value that its key does not take; the message names
            file, line and key.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"it is not text in UTF-8 ({error.reason})"
        raise ConfigError(
            f"cannot read the recipe {path}: {reason}; a recipe is a TOML file with keys as in docs/configuration.md"
        ) from error
    tables = parse_toml(text, f"the recipe {path}")
    for name in _OWN:
        if not isinstance(tables.get(name, ""), str):
            raise ConfigError(f"{_place(path, text, name)}: {name} takes a text, not {tables[name]!r}")
    for dotted, value in _entries(tables).items():
        try:
            node: Any = replace_keys(Config(), {dotted: value})
            for name in dotted.split("."):
                node = getattr(node, name)
            rule = declared()[dotted].rule
            if node is not None and not rule.accepts(node):
                raise ConfigError(f"{dotted} takes {rule.takes}, not {node!r}")
        except ConfigError as error:
            raise ConfigError(f"{_place(path, text, dotted)}: ", *error.args) from error
    return tables


def check_recipe(name: str, config: Config) -> Config:
    """Return the checked configuration of a recipe in a file; raises ConfigError naming the file if keys contradict each other."""
    try:
        return check(config)
    except ConfigError as error:
        raise ConfigError(f"{name}: ", *error.args) from error


def _entries(tables: Mapping[str, Any]) -> dict[str, Any]:
    """Return dotted keys and values; a table without keys counts as one, since its name may be wrong."""
    empty = {name: value for name, value in tables.items() if value == {} and name not in to_dict(Config())}
    return {**empty, **flatten({name: value for name, value in tables.items() if name not in _OWN})}


def _place(path: Path, text: str, dotted: str) -> str:
    """Name the file and, if it is found, the line of a key."""
    table = ""
    for number, line in enumerate(text.splitlines(), 1):
        if header := _HEADER.fullmatch(line):
            table = _plain(header[1])
            if table == dotted:
                return f"{path}, line {number}"
        elif (found := _KEY.match(line)) and ".".join(filter(None, (table, _plain(found[1])))) == dotted:
            return f"{path}, line {number}"
    return str(path)


def _plain(name: str) -> str:
    return re.sub(r"[\s\"']", "", name)


def recipe_text(config: Config) -> str:
    """Write every key of a configuration's method as a recipe, which gives the same configuration when read again.

    TOML has no word for a key that is empty, so it is written as the text ``"none"``, which such a key takes.
    """
    tables: dict[str, dict[str, Any]] = {}
    # One group after another, in the order of the reference page.
    for dotted, value in flatten(to_dict(config)).items():
        if declared()[dotted].method in (None, config.method.name):
            group, _, name = dotted.partition(".")
            tables.setdefault(group, {})[name] = "none" if value is None else value
    return tomli_w.dumps(tables)
