"""Run folders: where a new one goes and what a saved one holds."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import typer

from der_fast.config.run_folder import holds_run
from der_fast.config.schema import Config
from der_fast.config.tree import from_dict
from der_fast.errors import CheckpointError, ConfigError, StorageError


def new_folder(ctx: typer.Context, parent: Path, name: str) -> Path:
    """Make ``parent/name``, or ``parent/name-2``, ``-3`` … if that exists already, and return it; no other process gets the same folder.

    A command that ends before it has written anything there removes it.

    Raises:
        StorageError: it cannot be made.
    """
    slug = re.sub(r"[^a-z0-9._]+", "-", name.lower()).strip("-.") or "run"
    for number in count(1):
        folder = parent / (slug if number == 1 else f"{slug}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError as error:
            # If the parent is a broken link, no number helps.
            if not os.path.lexists(folder):
                raise StorageError(f"cannot make {folder}: {parent} is not a folder; give another --out") from error
            continue
        except OSError as error:
            raise StorageError(f"cannot make {folder}: {error.strerror or error}; give another --out") from error
        ctx.call_on_close(partial(_remove_empty, folder))
        return folder
    raise AssertionError("counting never ends")


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def usable_out(out: Path, resume: bool) -> Path:
    """Return `out` after checking that a run may be written there.

    Raises:
        ConfigError: it is a file, or it holds a run and `resume` is off: a run is never overwritten.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file; give a folder")
    if not resume and holds_run(out):
        raise ConfigError(f"{out} already holds a run; continue it with --resume, or give another --out")
    return out


def how_to_go_on(run: Path) -> str:
    """Say what to type after training in `run` was interrupted."""
    if not holds_run(run):
        return "Nothing was started yet: run the same command again."
    return f"What was learned is saved; continue with: der-fast train --out {shlex.quote(str(run))} --resume"


def begun_config(run: Path) -> Config:
    """Read the configuration that a run was started with; raises CheckpointError if it is missing or damaged."""
    return _config_in(run, "config.json")


def learned_config(run: Path) -> Config:
    """Read the configuration of the last step of a run or a saved learner; raises CheckpointError if it is missing or damaged."""
    return _config_in(run, "metrics.json")


def _config_in(run: Path, name: str) -> Config:
    value = read_json(run, name).get("config")
    if not isinstance(value, dict):
        raise CheckpointError(f"{run / name} is damaged: it holds no configuration; restore it, or train again into another folder")
    return from_dict(value)


def read_json(run: Path, name: str) -> dict[str, Any]:
    """Read one of a run's JSON files; raises CheckpointError with its path if it is missing or damaged."""
    path = run / name
    if not run.is_dir():
        raise CheckpointError(
            f"there is no run folder {run}; give the --out folder of `der-fast train` or the folder that the demo printed"
        )
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{run} holds no {name}: it is not a run, or the run was stopped before its first file was written"
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}; restore it, or train again into another folder") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is damaged: it holds a {type(value).__name__}, not a table; restore it, or train again")
    return value
