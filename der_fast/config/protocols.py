"""How a protocol is written: 'B0-10', 'B50-5', sizes such as '10,10,5', or lists of class names, also in a file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from der_fast.config.schema import Config
from der_fast.config.tree import replace_keys, split_list
from der_fast.errors import ConfigError
from der_fast.home import expand

FORMS = "B0-<steps>, B<base>-<steps> or the sizes of all steps, e.g. B0-10, B50-5 or 10,10,5"
_MOST_SHOWN = 6

Protocol = str | Path | Sequence[int] | Sequence[Sequence[str]]


def parse_even(text: str) -> tuple[int, int] | None:
    """Return (base, steps) of 'B<base>-<steps>'; None for any other text."""
    match = re.fullmatch(r"[Bb](\d+)-(\d+)", text.strip())
    return (int(match[1]), int(match[2])) if match else None


def parse_sizes(text: str) -> tuple[int, ...] | None:
    """Return the sizes of '10,10,5'; None for any other text."""
    if not re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*", text):
        return None
    return tuple(int(part) for part in text.split(","))


def planned_steps(text: str) -> int:
    """Return the number of steps of a protocol, 0 if the text is not a protocol."""
    even = parse_even(text)
    return even[1] + (even[0] > 0) if even else len(parse_sizes(text) or ())


def even_form(text: str) -> str:
    """Return 'B50-5' for '50,10,10,10,10,10': recipes and the paper's curves use it. Other texts are returned unchanged."""
    sizes = parse_sizes(text)
    if not sizes or len(set(sizes[1:])) > 1:
        return text
    return f"B0-{len(sizes)}" if len(set(sizes)) == 1 else f"B{sizes[0]}-{len(sizes) - 1}"


def shown(text: str) -> str:
    """Return a protocol short enough for a title or a folder's name: long lists of sizes are cut."""
    sizes = parse_sizes(text) or ()
    if len(sizes) <= _MOST_SHOWN:
        return text
    return f"{','.join(map(str, sizes[:_MOST_SHOWN]))},… ({len(sizes)} steps)"


def protocol_keys(protocol: Protocol) -> dict[str, Any]:
    """Return the configuration keys that a protocol stands for.

    Args:
        protocol: 'B0-n', 'B<base>-n', '10,10,5', a text file with one step per line, its class names separated by commas, a list of
            sizes, or a list of lists of class names.

    Raises:
        ConfigError: a file that cannot be read, or a list of anything else.
    """
    if isinstance(protocol, Path):
        return _steps_keys(_read_steps(protocol))
    if isinstance(protocol, str):
        sizes = parse_sizes(protocol)
        if sizes or parse_even(protocol):
            return {"protocol.name": ",".join(map(str, sizes)) if sizes else protocol, "protocol.steps": None}
        if _is_file(protocol):
            return _steps_keys(_read_steps(expand(protocol)))
        if Path(protocol).suffix or len(Path(protocol).parts) > 1:
            raise ConfigError(f"there is no protocol file {protocol}; a protocol is {FORMS}, or such a file")
        return {"protocol.name": protocol, "protocol.steps": None}
    entries = list(protocol)
    if entries and all(isinstance(entry, int) and not isinstance(entry, bool) for entry in entries):
        return {"protocol.name": ",".join(map(str, entries)), "protocol.steps": None}
    if not entries or any(isinstance(entry, (str, bytes)) or not isinstance(entry, Sequence) for entry in entries):
        raise ConfigError(
            f"a protocol is a text, a list of sizes such as [10, 10, 5], or a list of lists of class names, e.g. "
            f"[['cat', 'dog'], ['car']], not {entries!r}"
        )
    return _steps_keys([[str(name) for name in entry] for entry in entries if isinstance(entry, Sequence)])


def _steps_keys(steps: Sequence[Sequence[str]]) -> dict[str, Any]:
    return {"protocol.steps": [list(names) for names in steps], "protocol.name": sizes_of(steps), "protocol.class_order": None}


def with_order_given(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return `changes`; if they give steps or a seed but no class order, they also empty the class order.

    A person who gives these means them, whatever order a preset or a file has.

    Args:
        changes: dotted keys and values, as for `replace_keys`.
    """
    steps = replace_keys(Config(), {"protocol.steps": changes.get("protocol.steps")}).protocol.steps
    given = steps is not None or "protocol.class_order_seed" in changes
    return {"protocol.class_order": None, **changes} if given else dict(changes)


def sizes_of(steps: Sequence[Sequence[str]]) -> str:
    """Return the name of a protocol with these steps: '2,1' for two classes and then one."""
    return ",".join(str(len(names)) for names in steps)


def _read_steps(path: Path) -> list[list[str]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"the protocol cannot be read from {path}: {error}; it takes a text file (UTF-8) with one step per line, its class names "
            "separated by commas"
        ) from error
    steps = [split_list(line) for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not steps:
        raise ConfigError(f"{path} names no class; a protocol's file has one step per line, its class names separated by commas")
    return steps


def _is_file(text: str) -> bool:
    try:
        return expand(text).is_file()
    except (OSError, RuntimeError, ValueError):
        # A long text is not a valid path, and the home folder may be unknown.
        return False
