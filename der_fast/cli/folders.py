"""Run folders: where a new one goes, what a saved one holds."""

from __future__ import annotations

import json
import re
from itertools import count
from pathlib import Path
from typing import Any

from der_fast.config.run_folder import holds_run
from der_fast.config.schema import Config
from der_fast.config.tree import from_dict
from der_fast.errors import CheckpointError, ConfigError


def new_folder(parent: Path, name: str) -> Path:
    """Return ``parent/name``, or ``parent/name-2``, ``-3`` … if runs lie there already."""
    slug = re.sub(r"[^a-z0-9._]+", "-", name.lower()).strip("-.") or "run"
    for number in count(1):
        folder = parent / (slug if number == 1 else f"{slug}-{number}")
        if not folder.exists():
            return folder
    raise AssertionError("counting never ends")


def usable_out(out: Path, resume: bool) -> Path:
    """Return `out` after checking that a run may be written there.

    Raises:
        ConfigError: it is a file, or it holds a run and `resume` is off: nothing is ever overwritten.
        CheckpointError: `resume` is on and it holds none.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file; give a folder")
    if resume and not holds_run(out):
        raise CheckpointError(f"there is no run to resume in {out}; check --out, or leave --resume out to start a new run")
    if not resume and holds_run(out):
        raise ConfigError(f"{out} already holds a run; go on with it by --resume, or give another --out")
    return out


def begun_config(run: Path) -> Config:
    """Read the configuration that a run was begun with; raises CheckpointError where it is missing or damaged."""
    return _config_in(run, "config.json")


def learned_config(run: Path) -> Config:
    """Read the configuration of a run's, or a saved learner's, last step; raises CheckpointError where it is missing or damaged."""
    return _config_in(run, "metrics.json")


def _config_in(run: Path, name: str) -> Config:
    value = read_json(run, name).get("config")
    if not isinstance(value, dict):
        raise CheckpointError(f"{run / name} is damaged: it holds no configuration; restore it, or train again into another folder")
    return from_dict(value)


def read_json(run: Path, name: str) -> dict[str, Any]:
    """Read one of a run's JSON files; raises CheckpointError with its path where it is missing or damaged."""
    path = run / name
    if not run.is_dir():
        raise CheckpointError(f"there is no run folder {run}; give the --out folder of `der-fast train` or the one that the demo printed")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{run} holds no {name}: it is no run, or the run was stopped before its first file was written") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}; restore it, or train again into another folder") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is damaged: it holds a {type(value).__name__}, not a table; restore it, or train again")
    return value
