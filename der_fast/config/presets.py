"""Presets: named recipes in TOML, one per protocol of the paper, that may extend one another."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib import resources
from typing import Any

from der_fast.config.datasets import paper_name
from der_fast.config.tree import parse_toml
from der_fast.errors import ConfigError


def list_presets() -> list[str]:
    """Return the names of all presets, sorted."""
    folder = resources.files(__package__) / "presets"
    return sorted(entry.name[: -len(".toml")] for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_preset(name: str) -> dict[str, Any]:
    """Return a preset's keys as nested tables, with everything it extends merged in.

    Raises:
        ConfigError: no such preset (the message lists all), or presets that extend each other in a circle.
    """
    tables, _ = _load(name, ())
    return tables


def describe_preset(name: str) -> str:
    """Return a preset's one-line description; raises ConfigError where there is no such preset."""
    return _load(name, ())[1]


def find_preset(data_name: str, protocol: str | None = None) -> str | None:
    """Return the preset made for a data set and protocol, or None.

    ``("cifar100", "B0-10")`` gives ``"cifar100-b0-10"``; a protocol without a preset of its own gets the recipe of its kind
    (``"cifar100-b50"``) or of the data set (``"cifar100"``). Presets that say more than data set and protocol, such as
    ``"cifar10-5x2"``, are only used when asked for by name. A folder that is called like a data set of the paper, such as
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
    if name in below:
        raise ConfigError(f"presets extend each other in a circle: {' → '.join((*below, name))}")
    tables = _read(name)
    about = str(tables.pop("about", ""))
    parent = tables.pop("extends", None)
    if parent is not None:
        tables = _merged(_load(str(parent), (*below, name))[0], tables)
    return tables, about


def _read(name: str) -> dict[str, Any]:
    known = list_presets()
    if name not in known:
        close = difflib.get_close_matches(name.lower(), known, n=3)
        hint = f"did you mean {', '.join(close)}? All presets" if close else "choose from"
        raise ConfigError(f"unknown preset {name!r}; {hint}: {', '.join(known)}")
    entry = resources.files(__package__) / "presets" / f"{name}.toml"
    return parse_toml(entry.read_text(encoding="utf-8"), f"preset {name}")


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with the entries of `changes` over it, table by table."""
    result = dict(base)
    for name, value in changes.items():
        below = result.get(name)
        result[name] = _merged(below, value) if isinstance(value, Mapping) and isinstance(below, Mapping) else value
    return result
