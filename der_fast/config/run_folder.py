"""Which folders are runs: what training writes, and what is therefore not a class of images."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from pathlib import Path

# Any of these makes a folder a run; each is written by training.
TRACES = ("config.json", "learner.json", "metrics.json", "history.json", "checkpoints", "steps")
# These exist before any of the traces does.
EARLY_TRACES = ("index.npz", "tars.npz", ".lock")
# The names of a run's own folders.
PARTS = ("checkpoints", "steps", "extractors", "learned", "figures", "tensorboard")
# Where runs go by default.
DEFAULT_PARENT = "runs"

# Keys that a run's own files have, and another program's hardly do.
_PROOFS = {"config.json": ("config", "train", "test"), "metrics.json": ("protocol", "steps", "top1")}


def holds_run(folder: Path) -> bool:
    """Return whether a run was started in `folder`: nothing of it may be overwritten."""
    return any((folder / name).exists() for name in TRACES)


def has_traces(names: Iterable[str]) -> bool:
    """Return whether a folder's entries have names that a run leaves; a folder of images that has them is examined closely."""
    return any(name in TRACES or name in EARLY_TRACES for name in names)


def is_run(folder: Path) -> bool:
    """Return whether a folder is certainly a run: a class folder, too, may hold a `config.json` or a folder `steps`."""
    for name, keys in _PROOFS.items():
        with contextlib.suppress(OSError, ValueError):
            value = json.loads((folder / name).read_text(encoding="utf-8"))
            if isinstance(value, dict) and all(key in value for key in keys):
                return True
    return False
