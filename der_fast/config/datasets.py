"""What the name of a data set stands for: a known data set or a folder, and whether it is one of the paper's."""

from __future__ import annotations

import re
from pathlib import Path

from der_fast.home import expand

# These take precedence over folders of the same name; write ./digits for the folder.
KNOWN_NAMES = ("digits", "cifar10", "cifar100")

# Data sets of the paper, by the names of folders that hold them (lower case, letters and digits only).
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
    """Return a data set's name; for a folder, its name without the path."""
    return re.split(r"[/\\]", dataset.rstrip("/\\"))[-1] or dataset


def paper_name(dataset: str) -> str | None:
    """Return the data set of the paper that a name, or a folder by its name (e.g. ``/data/ImageNet-100``), stands for, or None."""
    return _PAPER.get(re.sub(r"[^a-z0-9]", "", own_name(dataset).lower()))


def data_folder(name: str) -> Path | None:
    """Return the absolute path of the folder, list of files or tar that a data set's name stands for; None for anything else."""
    folder = expand(name)
    return (
        Path(absolute(name))
        if name not in KNOWN_NAMES and (folder.is_dir() or (folder.suffix in (".txt", ".tar") and folder.is_file()))
        else None
    )


def absolute(path: str) -> str:
    """Return `path` (``~`` is the home folder) in the form that is saved: absolute, without ``.``, ``..`` and a slash at its end.

    A link's own name is kept, because presets and reports use the folder's name; links are followed only if the path contains ``..``.
    """
    expanded = expand(path)
    return str(expanded.resolve()) if ".." in expanded.parts else str(expanded.absolute())
