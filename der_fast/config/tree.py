"""Reading, changing, checking and writing a `Config`: from TOML, from ``key=value`` texts, to plain dictionaries."""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from der_fast.config.schema import Config
from der_fast.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Node = TypeVar("Node")


def replace_keys(config: Config, changes: Mapping[str, Any]) -> Config:
    """Return `config` with dotted keys replaced, e.g. ``{"later.lr": 0.03}``.

    Raises:
        ConfigError: an unknown key, or a value of the wrong type; the message names the key and what it takes.
    """
    for dotted, value in changes.items():
        config = _replace(config, dotted, dotted.split("."), value)
    return config


def _replace(node: Node, dotted: str, path: Sequence[str], value: Any) -> Node:
    fields = {entry.name: entry for entry in dataclasses.fields(node)}  # type: ignore[arg-type]
    if path[0] not in fields:
        raise ConfigError(f"unknown configuration key {dotted!r}: there is no {path[0]!r} here; choose from {', '.join(fields)}")
    child = getattr(node, path[0])
    if dataclasses.is_dataclass(child):
        if len(path) == 1:
            raise ConfigError(f"{dotted!r} is a group of keys; set one of them, e.g. {dotted}.{dataclasses.fields(child)[0].name}=…")
        changed: Any = _replace(child, dotted, path[1:], value)
    elif len(path) > 1:
        raise ConfigError(f"unknown configuration key {dotted!r}: {path[0]!r} has no keys below it")
    else:
        hints = typing.get_type_hints(type(node))
        changed = _coerce(dotted, value, hints[path[0]])
    return dataclasses.replace(node, **{path[0]: changed})  # type: ignore[type-var]


def _coerce(dotted: str, value: Any, hint: Any) -> Any:
    """Turn a TOML or command-line value into the field's type."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null", "")):
            return None
        hint = next(option for option in typing.get_args(hint) if option is not type(None))
    if typing.get_origin(hint) is tuple:
        return _coerce_tuple(dotted, value, typing.get_args(hint))
    if isinstance(value, str) and hint in (int, float, bool):
        value = _parse_scalar(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{dotted} takes {_name_of(hint)}, not {value!r}")
    return value


def _coerce_tuple(dotted: str, value: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    if isinstance(value, str):
        value = [part.strip() for part in value.strip("[]()").split(",") if part.strip()]
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{dotted} takes a list, e.g. {dotted}=1,2,3, not {value!r}")
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return tuple(_coerce(dotted, entry, arguments[0]) for entry in value)
    if len(value) != len(arguments):
        raise ConfigError(f"{dotted} takes {len(arguments)} values, not {len(value)}: {value!r}")
    return tuple(_coerce(dotted, entry, hint) for entry, hint in zip(value, arguments, strict=True))


def _parse_scalar(text: str) -> Any:
    try:
        return tomllib.loads(f"v = {text.strip()}")["v"]
    except tomllib.TOMLDecodeError:
        return text


def _name_of(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    return names.get(hint, str(hint))


def parse_assignments(texts: Sequence[str]) -> dict[str, Any]:
    """Split ``key=value`` texts, as given to ``--set``; raises ConfigError where there is no ``=``."""
    changes: dict[str, Any] = {}
    for text in texts:
        dotted, sign, value = text.partition("=")
        if not sign or not dotted.strip():
            raise ConfigError(f"--set takes key=value, e.g. later.lr=0.03, not {text!r}")
        changes[dotted.strip()] = value.strip()
    return changes


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
    tree: dict[str, Any] = dataclasses.asdict(config)
    return typing.cast(dict[str, Any], _plain(tree))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    return list(value) if isinstance(value, tuple) else value


def from_dict(tree: Mapping[str, Any]) -> Config:
    """Build a configuration from nested dictionaries (the inverse of `to_dict`); raises ConfigError on unknown keys."""
    return replace_keys(Config(), flatten(tree))


def key_docs() -> dict[str, tuple[Any, str]]:
    """Return every dotted key with its default value and its meaning."""
    docs: dict[str, tuple[Any, str]] = {}
    for group in dataclasses.fields(Config):
        default = getattr(Config(), group.name)
        for entry in dataclasses.fields(default):
            docs[f"{group.name}.{entry.name}"] = (getattr(default, entry.name), entry.metadata["doc"])
    return docs
