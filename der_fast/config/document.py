"""The reference page of all configuration keys and presets.

python -m der_fast.config.document docs/configuration.md
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from der_fast.config.presets import describe_preset, list_presets
from der_fast.config.tree import declared
from der_fast.errors import ConfigError
from der_fast.files import write_bytes

_HEAD = """# Configuration

<!-- Written by `python -m der_fast.config.document docs/configuration.md`; a test compares the two. -->

A run has one configuration: a tree of frozen dataclasses (`der_fast.Config`). It is built in this order; later entries win:

1. the defaults below,
2. a preset: the one made for data set and protocol, or the one named by `--preset`, or a file of your own, `--preset FILE.toml`,
3. `DATA` and `--protocol`, then `--paper`,
4. the other options of `der-fast train`,
5. `--set key=value`, for any key below; in Python `der_fast.train(..., settings={"later.lr": 0.03})`.

`der-fast train DATA … --print-config` writes the result as a file for `--preset`, without training; every run saves it in `config.json`.
Such a file may hold any of the keys below. What it leaves out comes from `extends = "photos"`, or from another file, named by its path
relative to this one. If a stage's epochs change, its milestones and warm-up move in proportion unless they are given too. Lists are written
`--set first.milestones=4,7,10`; `none` empties a key that may be empty. A value out of range is refused before anything is loaded. So is a
key that belongs to another method, if an option, `--set` or a file of your own sets it; such keys in presets do not count.

Folders, lists and tars of images get the preset `images`, `images64` or `photos` by the size of their images. A folder with the name of a
data set of the paper gets that recipe: `der-fast train /data/imagenet100 --protocol B0-10` takes `imagenet100-b0-10`, and so does any
folder with `--preset imagenet100-b0-10`. Folders are stored as absolute paths. If the images have moved, the run continues with
`der-fast train NEW_PLACE --out RUN --resume` as long as they are still the same, by their checksum.

The last column says what may change a key once something was learned. `never`: nothing, since what was learned depends on it. `learn`:
`der-fast learn`, from its step on; with `--resume` a run continues as it was started. `resume`: `--resume` too, since the key decides where
and how a run computes, not what it learns. `place`: like `resume`; it says where the images are now.

Class orders are those of the field. The paper's results on CIFAR-100 are means over three orders, `icarl`, `podnet-2` and `podnet-3`; the
presets take the first, and `--class-order podnet-2` and `--class-order podnet-3` run the other two. On ImageNet the order is `numpy-1993`.
All are orders of the alphabetical class names. Setting steps or a `protocol.class_order_seed` replaces a preset's order.

One thing differs from the authors' code: random-resized-crop draws its crops from the stored square (256/224 of the network's input), not
from the whole photo.
"""


def configuration_page() -> str:
    """Return the page as Markdown: every key with default, range and meaning, then every preset."""
    parts = [_HEAD]
    group = ""
    for dotted, key in declared().items():
        if dotted.split(".")[0] != group:
            group = dotted.split(".")[0]
            parts.append(f"\n## {group}\n\n| key | default | takes | meaning | change |\n| --- | --- | --- | --- | --- |")
        cells = (f"`{dotted}`", f"`{_written(key.default)}`", _cell(key.rule.takes), _cell(key.doc), key.change.value)
        parts.append(f"| {' | '.join(cells)} |")
    parts.append("\n## Presets\n\n| name | what it is |\n| --- | --- |")
    parts += [f"| `{name}` | {_cell(describe_preset(name))} |" for name in list_presets()]
    return "\n".join(parts) + "\n"


def _written(value: Any) -> str:
    """Write a default in the form that --set takes."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(_written(entry) for entry in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def main(arguments: list[str]) -> None:
    """Write the page to the path given; raises ConfigError without one."""
    if len(arguments) != 1:
        raise ConfigError("give one path, e.g. docs/configuration.md")
    write_bytes(Path(arguments[0]), configuration_page().encode())


if __name__ == "__main__":
    main(sys.argv[1:])
