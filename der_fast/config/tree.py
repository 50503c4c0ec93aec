"""Reading, changing and writing a `Config`: from TOML, from ``key=value`` texts, to plain dictionaries."""

from __future__ import annotations

import csv
import dataclasses
import difflib
import functools
import json
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from der_fast.config.former import present_keys
from der_fast.config.key import Change, Key
from der_fast.config.schema import Config
from der_fast.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def replace_keys(config: Config, changes: Mapping[str, Any]) -> Config:
    """Return `config` with dotted keys replaced, e.g. ``{"later.lr": 0.03}``.

    Values come from TOML, JSON or the command line: texts are read as the key's type, and ``none`` empties an optional key.

    Raises:
        ConfigError: an unknown key, or a value of the wrong type; the message names the key and what it takes.
    """
    for dotted, value in changes.items():
        config = _replace(config, dotted, dotted.split("."), value)
    return config


def _replace(node: Any, dotted: str, path: Sequence[str], value: Any) -> Any:
    fields = [entry.name for entry in dataclasses.fields(node)]
    if path[0] not in fields:
        raise ConfigError(f"unknown configuration key {dotted!r}{_suggestion(dotted, path[0], fields)}")
    child = getattr(node, path[0])
    if dataclasses.is_dataclass(child):
        if len(path) == 1:
            raise ConfigError(f"{dotted!r} is a group of keys; set one of them, e.g. {dotted}.{dataclasses.fields(child)[0].name}=…")
        changed = _replace(child, dotted, path[1:], value)
    elif len(path) > 1:
        raise ConfigError(f"unknown configuration key {dotted!r}: {path[0]!r} has no keys below it")
    else:
        group: Any = type(node)
        changed = _coerce(dotted, value, _hints(group)[path[0]])
    return dataclasses.replace(node, **{path[0]: changed})


@functools.cache
def _hints(group: type) -> dict[str, Any]:
    return typing.get_type_hints(group)


def _suggestion(dotted: str, name: str, fields: Sequence[str]) -> str:
    """Suggest the keys that were probably meant: same last part anywhere, a close spelling, or else all that exist here."""
    known = list(declared())
    last = dotted.rsplit(".", 1)[-1]
    meant = [key for key in known if key.endswith(f".{last}")] or difflib.get_close_matches(dotted, known, n=3)
    if meant:
        return f"; did you mean {', '.join(meant)}?"
    return f": there is no {name!r} here; choose from {', '.join(fields)}"


def _coerce(dotted: str, value: Any, hint: Any) -> Any:
    """Turn a TOML or command-line value into the field's type."""
    value = plain(value)
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        if value is None or (isinstance(value, str) and value.strip().lower() in ("none", "null", "")):
            return None
        options = [option for option in typing.get_args(hint) if option is not type(None)]
        # For a key that takes a name or a list, a text with one entry is the name.
        if len(options) > 1 and isinstance(value, str) and not value.lstrip().startswith("[") and len(split_list(value)) == 1:
            return unquoted(value)
        hint = options[0]
    if typing.get_origin(hint) is tuple:
        return _coerce_tuple(dotted, value, typing.get_args(hint))
    if isinstance(value, str) and hint in (int, float, bool):
        value = _parse_scalar(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{dotted} takes {_name_of(hint)}, not {value!r}")
    return value


def plain(value: Any) -> Any:
    """Return the Python value of a NumPy or PyTorch scalar, or of an array without dimensions; anything else unchanged."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def _coerce_tuple(dotted: str, value: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    if isinstance(value, str):
        value = _parse_lists(dotted, value) if typing.get_origin(arguments[0]) is tuple else split_list(value)
    if isinstance(value, range) or getattr(value, "ndim", None) == 1:
        value = list(value)
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{dotted} takes a list, e.g. {dotted}=1,2,3, not {value!r}")
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return tuple(_coerce(dotted, entry, arguments[0]) for entry in value)
    if len(value) != len(arguments):
        raise ConfigError(f"{dotted} takes {len(arguments)} values, not {len(value)}: {value!r}")
    return tuple(_coerce(dotted, entry, hint) for entry, hint in zip(value, arguments, strict=True))


def _parse_lists(dotted: str, text: str) -> Any:
    """Read a list of lists of texts, which is written as in JSON and TOML."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not (isinstance(value, list) and all(isinstance(entry, list) for entry in value)):
        raise ConfigError(f'{dotted} takes a list of lists, e.g. {dotted}=[["cat","dog"],["car"]], not {text!r}')
    return value


def split_list(text: str) -> list[str]:
    """Split ``a,b,c``, ``[a, b]`` or ``"a, with comma",b`` into its entries; quotes protect commas, empty entries are dropped."""
    text = text.strip()
    if (text[:1], text[-1:]) == ("[", "]"):
        text = text[1:-1]
    row = next(csv.reader([text], skipinitialspace=True), [])
    return [entry for entry in (unquoted(part) for part in row) if entry]


def unquoted(text: str) -> str:
    """Return a text without white space and quotes around it."""
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" and text[0] not in text[1:-1]:
        return text[1:-1]
    return text


def _parse_scalar(text: str) -> Any:
    """Read a number or a truth value as people type them (`.5`, `1e-3`, `True`); other text is returned unchanged."""
    text = text.strip()
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _name_of(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    return names.get(hint, str(hint))


def parse_toml(text: str, source: str) -> dict[str, Any]:
    """Read TOML into nested tables; raises ConfigError naming `source` and the place of the mistake."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source} is not valid TOML: {error}") from error


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested tables into dotted keys."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def to_dict(config: Config) -> dict[str, Any]:
    """Return the configuration as nested dictionaries of plain JSON values."""
    tree: dict[str, Any] = _plain(dataclasses.asdict(config))
    return tree


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def from_dict(tree: Mapping[str, Any]) -> Config:
    """Build a configuration from nested dictionaries (the inverse of `to_dict`), which may hold keys of earlier versions.

    Raises:
        ConfigError: an unknown key, or a value of the wrong type.
    """
    tree = present_keys(tree)
    groups = [entry.name for entry in dataclasses.fields(Config)]
    for name in tree:
        if name not in groups:
            raise ConfigError(f"unknown configuration group {name!r}; choose from {', '.join(groups)}")
    return replace_keys(Config(), flatten(tree))


@functools.cache
def declared() -> Mapping[str, Key]:
    """Return every dotted key with its declaration, in the order of the tree."""
    return {
        f"{group.name}.{entry.name}": entry.metadata["key"]
        for group in dataclasses.fields(Config)
        for entry in dataclasses.fields(getattr(Config(), group.name))
    }


def keys_with(*changes: Change) -> tuple[str, ...]:
    """Return the dotted keys that are declared with one of `changes`, in the order of the tree."""
    return tuple(dotted for dotted, key in declared().items() if key.change in changes)
