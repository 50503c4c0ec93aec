"""What the name of a data set says: one known here, or a folder, and whether it is one of the paper's."""

from __future__ import annotations

import re
from pathlib import Path

from der_fast.home import expand

# These win over folders of the same name; write ./digits for the folder.
KNOWN_NAMES = ("digits", "cifar10", "cifar100")

# Data sets of the paper, by what folders with them are called (lower case, letters and digits only).
_PAPER = {
    "cifar100": "cifar100",
    "imagenet100": "imagenet100",
    "imagenetsubset": "imagenet100",
    "imagenet": "imagenet1000",
    "imagenet1k": "imagenet1000",
    "imagenet1000": "imagenet1000",
    "ilsvrc2012": "imagenet1000",
}


def own_name(dataset: str) -> str:
    """Return a data set's name, or of a folder its own name without the path."""
    return re.split(r"[/\\]", dataset.rstrip("/\\"))[-1] or dataset


def paper_name(dataset: str) -> str | None:
    """Return which data set of the paper a name or a folder (by its own name, e.g. ``/data/ImageNet-100``) stands for, or None."""
    return _PAPER.get(re.sub(r"[^a-z0-9]", "", own_name(dataset).lower()))


def data_folder(name: str) -> Path | None:
    """Return the folder, the list of files, or the tar, that a data set's name stands for, as an absolute path; None for anything else."""
    folder = expand(name)
    return (
        Path(absolute(name))
        if name not in KNOWN_NAMES and (folder.is_dir() or (folder.suffix in (".txt", ".tar") and folder.is_file()))
        else None
    )


def absolute(path: str) -> str:
    """Return `path` (``~`` for the home folder) as it can be written down: absolute, without ``.``, ``..`` and a slash at its end.

    A link's own name is kept, because presets and reports go by the name of the folder; only ``..`` makes it necessary to follow links.
    """
    expanded = expand(path)
    return str(expanded.resolve()) if ".." in expanded.parts else str(expanded.absolute())
