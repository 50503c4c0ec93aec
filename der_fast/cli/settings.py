"""From the options of `der-fast train` and `learn` to configuration changes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from der_fast.config.rules import ORDER, ORDERS
from der_fast.config.schema import Config, ScheduleConfig
from der_fast.config.tree import split_list, unquoted
from der_fast.errors import ConfigError
from der_fast.home import expand

# Options that stand for exactly one key.
_DIRECT = {
    "backbone": "model.backbone",
    "width": "model.width",
    "method": "method.name",
    "train_per_class": "data.train_per_class",
    "test_per_class": "data.test_per_class",
    "data_root": "data.root",
    "target_params": "masks.target_params",
    "seed": "runtime.seed",
    "device": "runtime.device",
    "backend": "runtime.backend",
}
# Flags, each with the key and value that it stands for.
_FLAGS = {
    "no_prune": ("masks.enabled", False),
    "no_aux": ("method.aux_weight", 0.0),
    "no_expand": ("method.name", "replay"),
    "bound": ("method.name", "bound"),
    "fwt": ("method.fwt", True),
    "tensorboard": ("runtime.tensorboard", True),
    "download": ("data.download", True),
}

# "n01440764 tench, Tinca tinca": the form of ImageNet's own list and that of ImageNet-100.
_SYNSET = re.compile(r"^(n\d{8})\s.*$")


def changes_from(options: Mapping[str, Any], base: Config) -> dict[str, Any]:
    """Return the dotted keys that command-line options change in `base`.

    Args:
        options: option names (``"batch_size"``) and values; None, False and missing options change nothing.
        base: the configuration they are applied to; if epochs change, `resolve_config` moves milestones and warm-up.

    Raises:
        ConfigError: options that contradict each other, or a value that cannot be read.
    """
    refuse_contradictions(options)
    changes = {key: options[name] for name, key in _DIRECT.items() if options.get(name) is not None}
    changes.update({key: value for name, (key, value) in _FLAGS.items() if options.get(name)})
    if options.get("class_order") is not None:
        changes.update(class_order_keys(options["class_order"]))
    if options.get("classes") is not None:
        changes["data.classes"] = read_names(options["classes"], "--classes")
    changes.update(_memory_keys(options))
    changes.update(_schedule_keys(options, base))
    changes.update(parse_assignments(options.get("settings") or []))
    return changes


def refuse_contradictions(options: Mapping[str, Any]) -> None:
    """Raise ConfigError for two options if one would silently override the other."""
    pairs = [
        ("memory", "memory_per_class", "one sets the total, the other the number per class"),
        ("target_params", "no_prune", "a target needs pruning"),
        ("target_params", "paper", "the paper's schedule has no target"),
        ("no_expand", "bound", "each names a method"),
        ("method", "no_expand", "each names a method"),
        ("method", "bound", "each names a method"),
    ]
    for one, other, reason in pairs:
        if _given(options, one) and _given(options, other):
            raise ConfigError(f"{_flag(one)} and {_flag(other)} do not go together: {reason}. Leave one out.")


def _given(options: Mapping[str, Any], name: str) -> bool:
    # Not `in (None, False)`: a memory of 0 also counts as given.
    return options.get(name) is not None and options[name] is not False


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def class_order_keys(text: str) -> dict[str, Any]:
    """Read ``--class-order``: 'alphabetical', a published order, class names separated by commas, or a file with one per line (UTF-8)."""
    if text.strip().lower() == "alphabetical":
        return {"protocol.class_order": None, "protocol.class_order_seed": None}
    if ORDER.accepts(text.strip()):
        return {"protocol.class_order": text.strip()}
    return {"protocol.class_order": read_names(text, "--class-order", f"'alphabetical', nor one of {', '.join(ORDERS)}, nor ")}


def read_names(text: str, option: str, other: str = "") -> tuple[str, ...]:
    """Read class names separated by commas, or a file with one name per line (UTF-8); words after an ImageNet synset are dropped.

    Args:
        text: what was given.
        option: the option's name, for messages.
        other: what else it could have been, for messages.

    Raises:
        ConfigError: a file that cannot be read, or fewer than two names.
    """
    path = expand(text)
    if _is_file(path):
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{option}: cannot read {path}: {error}; it takes a text file with one class name per line") from error
        names = [_SYNSET.sub(r"\1", line.strip()) for line in lines if line.strip()]
    else:
        names = split_list(text)
        if len(names) < 2:
            raise ConfigError(f"{option} {text!r} is neither {other}class names separated by commas, nor a file with one name per line")
    return tuple(names)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        # A long list of names is not a valid path.
        return False


def _memory_keys(options: Mapping[str, Any]) -> dict[str, Any]:
    if options.get("memory") is not None:
        return {"memory.total": options["memory"], "memory.per_class": None}
    if options.get("memory_per_class") is not None:
        return {"memory.per_class": options["memory_per_class"]}
    return {}


def _schedule_keys(options: Mapping[str, Any], base: Config) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    if options.get("epochs") is not None:
        first, later = parse_epochs(str(options["epochs"]))
        keys.update({"first.epochs": first, "later.epochs": later})
    if options.get("lr") is not None:
        keys.update(_under("first", _rate_keys(base.first, options["lr"])))
        keys.update(_under("later", _rate_keys(base.later, options["lr"])))
    if options.get("batch_size") is not None:
        keys.update({f"{stage}.batch_size": options["batch_size"] for stage in ("first", "later")})
    return keys


def _rate_keys(schedule: ScheduleConfig, rate: float) -> dict[str, Any]:
    """Scale the start of the warm-up with the rate that it leads to."""
    if rate == schedule.lr:
        # x * rate / rate is not always x, and --resume would take the difference for a changed configuration.
        return {"lr": schedule.lr, "warmup_lr": schedule.warmup_lr}
    return {"lr": rate, "warmup_lr": schedule.warmup_lr * rate / schedule.lr}


def _under(group: str, keys: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{group}.{name}": value for name, value in keys.items()}


def parse_epochs(text: str) -> tuple[int, int]:
    """Read ``--epochs``: one number for every step, or ``first,later``; raises ConfigError on anything else."""
    parts = [part.strip() for part in text.split(",")]
    try:
        numbers = [int(part) for part in parts]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2) or min(numbers) < 1:
        raise ConfigError(f"--epochs takes one whole number, or two as first,later (e.g. 12,10), not {text!r}")
    return numbers[0], numbers[-1]


def parse_assignments(texts: Sequence[str]) -> dict[str, Any]:
    """Split ``key=value`` texts, as given to ``--set``; raises ConfigError if there is no ``=``."""
    changes: dict[str, Any] = {}
    for text in texts:
        dotted, sign, value = text.partition("=")
        if not sign or not dotted.strip():
            raise ConfigError(f"--set takes key=value, e.g. later.lr=0.03, not {text!r}")
        changes[dotted.strip()] = unquoted(value)
    return changes
