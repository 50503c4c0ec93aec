"""From what a user names (data, protocol, preset, single keys) to one checked configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from der_fast.config.check import check, refuse_others
from der_fast.config.datasets import absolute, data_folder
from der_fast.config.presets import find_preset, own_keys, preset_config
from der_fast.config.protocols import Protocol, even_form, protocol_keys, sizes_of, with_order_given
from der_fast.config.rescale import stretched
from der_fast.config.sampled import largest_side
from der_fast.config.schema import Config
from der_fast.config.tree import replace_keys

# Everything that der_fast adds to the paper, switched off.
PAPER = {
    "masks.settle": 0.0,
    "masks.target_params": None,
    "masks.floor": 0.0,
    "masks.multiple": 1,
    "later.views": 0,
    "classifier.views": 0,
}

# Presets for a user's own images, by the images' longer side in pixels.
_BY_SIDE = ((32, "images"), (64, "images64"))
_LARGER = "photos"


def resolve_config(
    data: str | None = None,
    protocol: Protocol | None = None,
    *,
    preset: str | None = None,
    paper: bool = False,
    changes: Mapping[str, Any] | None = None,
    base: Config | None = None,
    begun: Config | None = None,
) -> Config:
    """Return the configuration for a data set: preset, then `data` and `protocol`, then `paper`, then `changes`.

    Args:
        data: data set name or folder (which becomes an absolute path); None keeps the preset's.
        protocol: e.g. ``"B0-10"``, ``"10,10,5"`` or lists of class names, see `protocol_keys`; None keeps the preset's.
        preset: name of a preset, or the path of your own (``"recipe.toml"``, see `load_preset`); None takes the one made for `data` and
            `protocol` (see `preset_for`).
        paper: switch off what is not in the paper (settling, parameter target, floor, whole blocks, fixed views).
        changes: dotted keys, e.g. ``{"later.lr": 0.03}``; they win over everything else. If they change a stage's epochs,
            its milestones and warm-up move in proportion, unless they are given too.
        base: a configuration to change instead of a preset; only used if `preset` is None.
        begun: the configuration of the run to resume, see `stretched`.

    Raises:
        ConfigError: unknown preset or key, a value that the key does not take, or a key among `changes` or in a user's recipe that
            belongs to another method.
    """
    asked = {} if protocol is None else protocol_keys(protocol)
    if preset is not None or base is None:
        name = preset or preset_for(data or Config().data.name, asked.get("protocol.name"), timeout=_timeout(changes or {}))
        base = preset_config(name) if name else Config()
    keys: dict[str, Any] = dict(asked)
    if data is not None:
        keys["data.name"] = data
    if paper:
        keys.update(PAPER)
    keys.update(changes or {})
    if "protocol.name" in (changes or {}) and "protocol.steps" not in (changes or {}):
        # A person who names a protocol means it, whatever lists a preset or a file has.
        keys["protocol.steps"] = None
    keys = with_order_given(keys)
    config = check(_named_by_its_steps(_with_absolute_paths(replace_keys(base, stretched(base, keys, begun)))))
    refuse_others(config, {**dict.fromkeys(sorted(own_keys(preset)) if preset else ()), **(changes or {})})
    return config


def _named_by_its_steps(config: Config) -> Config:
    """Name a protocol of given classes after the sizes of its steps."""
    steps = config.protocol.steps
    return config if steps is None else replace_keys(config, {"protocol.name": sizes_of(steps) or config.protocol.name})


def _timeout(changes: Mapping[str, Any]) -> float:
    """Return the seconds to wait for a drive: the recipe cannot be known yet."""
    return replace_keys(Config(), {key: value for key, value in changes.items() if key == "data.timeout"}).data.timeout


def _with_absolute_paths(config: Config) -> Config:
    """Make the paths of image and archive folders absolute, so that a saved run finds them from any working directory."""
    folder = data_folder(config.data.name)
    return replace_keys(
        config,
        {
            "data.name": config.data.name if folder is None else str(folder),
            **{
                f"data.{key}": absolute(path)
                for key, path in (("root", config.data.root), ("test_list", config.data.test_list))
                if path is not None and path.strip()
            },
        },
    )


def preset_for(data: str, protocol: str | None, *, timeout: float | None = None) -> str | None:
    """Return the preset made for a data set, or for a user's own images the one for their size; None if there is none.

    For folders, lists of files and tars, the headers of a few images decide between ``"images"`` (up to 32 pixels), ``"images64"`` and
    ``"photos"``.

    Args:
        data: data set name, folder, list of files, or tar.
        protocol: e.g. ``"B0-10"``.
        timeout: seconds to wait for the drive; default: that of `data.timeout`.

    Raises:
        DataError: the drive did not answer in time.
    """
    folder = data_folder(data)
    name = find_preset(data if folder is None else str(folder), None if protocol is None else even_form(protocol))
    if name is not None or folder is None:
        return name
    side = largest_side(folder, Config().data.timeout if timeout is None else timeout)
    return next((name for limit, name in _BY_SIDE if side <= limit), _LARGER) if side else None
