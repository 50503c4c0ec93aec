"""From what a user names (data, protocol, preset, single keys) to one checked configuration."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import IO, Any

from der_fast.config.check import check, refuse_others
from der_fast.config.datasets import absolute, data_folder
from der_fast.config.presets import find_preset, load_preset
from der_fast.config.protocols import Protocol, even_form, protocol_keys, sizes_of
from der_fast.config.schema import Config
from der_fast.config.tree import flatten, replace_keys

# Everything that is ours and not the paper's, switched off.
PAPER = {"masks.settle": 0.0, "masks.target_params": None, "masks.floor": 0.0, "masks.multiple": 1}

# Presets for folders, by the longer side of the images in pixels.
_BY_SIDE = ((32, "images"), (64, "images64"))
_LARGER = "photos"
_SAMPLED_CLASSES = 20


def resolve_config(
    data: str | None = None,
    protocol: Protocol | None = None,
    *,
    preset: str | None = None,
    paper: bool = False,
    changes: Mapping[str, Any] | None = None,
    base: Config | None = None,
) -> Config:
    """Return the configuration for a data set: preset, then `data` and `protocol`, then `paper`, then `changes`.

    Args:
        data: data set name or folder (which becomes an absolute path); None keeps the preset's.
        protocol: e.g. ``"B0-10"``, ``"10,10,5"`` or lists of class names, see `protocol_keys`; None keeps the preset's.
        preset: name of a preset; None takes the one made for `data` and `protocol` (see `preset_for`).
        paper: switch off what is not the paper's (settling, parameter target, floor, whole blocks).
        changes: dotted keys, e.g. ``{"later.lr": 0.03}``; they win over everything else.
        base: a configuration to change instead of a preset; only used where `preset` is None.

    Raises:
        ConfigError: unknown preset or key, a value that the key does not take, or a key among `changes` that only another method knows.
    """
    asked = {} if protocol is None else protocol_keys(protocol)
    if preset is not None or base is None:
        name = preset or preset_for(data or Config().data.name, asked.get("protocol.name"))
        base = replace_keys(Config(), flatten(load_preset(name))) if name else Config()
    keys: dict[str, Any] = dict(asked)
    if data is not None:
        keys["data.name"] = data
    if paper:
        keys.update(PAPER)
    keys.update(changes or {})
    if "protocol.name" in (changes or {}) and "protocol.steps" not in (changes or {}):
        # Who names a protocol means it, whatever lists a preset or a file has.
        keys["protocol.steps"] = None
    config = check(_named_by_its_steps(_with_absolute_paths(replace_keys(base, keys))))
    refuse_others(config, changes or {})
    return config


def _named_by_its_steps(config: Config) -> Config:
    """Call a protocol of given classes by the sizes of its steps."""
    steps = config.protocol.steps
    return config if steps is None else replace_keys(config, {"protocol.name": sizes_of(steps) or config.protocol.name})


def _with_absolute_paths(config: Config) -> Config:
    """Write folders of images and archives in full, so that a saved run finds them again from wherever it is called."""
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


def preset_for(data: str, protocol: str | None) -> str | None:
    """Return the preset made for a data set, or for folders one by the size of their images; None where there is none.

    A folder's images are not read: the sizes in the headers of a few files decide between ``"images"`` (up to 32 pixels),
    ``"images64"`` and ``"photos"``.
    """
    folder = data_folder(data)
    name = find_preset(data if folder is None else str(folder), None if protocol is None else even_form(protocol))
    if name is not None or folder is None or folder.suffix == ".txt":
        return name
    side = max(_sampled_sides(folder), default=0)
    return next((name for limit, name in _BY_SIDE if side <= limit), _LARGER) if side else None


def _sampled_sides(folder: Path) -> Iterator[int]:
    """Yield the longer side of the first readable image of each of the first class folders, or tars where there are none."""
    train = folder / "train"
    entries = [folder] if folder.is_file() else sorted((train if train.is_dir() else folder).iterdir())
    for class_folder in [entry for entry in entries if entry.is_dir()][:_SAMPLED_CLASSES]:
        sides = (_side(path) for path in islice(sorted(class_folder.iterdir()), 5) if path.is_file())
        yield next((side for side in sides if side), 0)
    if not any(entry.is_dir() for entry in entries):
        yield from map(_side_in_tar, [entry for entry in entries if entry.suffix == ".tar"][:_SAMPLED_CLASSES])


def _side_in_tar(path: Path) -> int:
    try:
        with tarfile.open(path, "r:") as tar:
            sides = (_side(file) for member in islice(tar, 10) if (file := tar.extractfile(member)) is not None)
            return next((side for side in sides if side), 0)
    except (OSError, tarfile.TarError):
        return 0


def _side(path: Path | IO[bytes]) -> int:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return max(image.size)
    except (OSError, ValueError, Image.DecompressionBombError):
        return 0
