"""A whole run: the loop of a protocol over `Learner.learn`, with checkpoints and resume."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from der_fast.config.schema import Config
from der_fast.config.tree import flatten, to_dict
from der_fast.data.source import ImageSource
from der_fast.errors import CheckpointError, ConfigError, DataError
from der_fast.training.checkpoint import Checkpoints
from der_fast.training.learner import Learner
from der_fast.training.progress import Observer
from der_fast.training.protocol import class_order, split_steps
from der_fast.training.saved import saved_steps
from der_fast.training.state import StepState
from der_fast.training.store import load_manifest, save_manifest

# These decide where and how a run computes, not what it learns.
FREE_KEYS = ("runtime.device", "runtime.backend", "runtime.threads", "runtime.tune_allocator", "runtime.keep_checkpoints", "data.root")


def run_protocol(
    config: Config,
    train: ImageSource,
    test: ImageSource,
    out: Path | None,
    *,
    resume: bool = False,
    observer: Observer | None = None,
) -> Learner:
    """Learn all steps of `config.protocol`.

    Args:
        config: the resolved configuration.
        train, test: all classes.
        out: the run's folder; None keeps everything in memory.
        resume: go on with what is in `out`, from its last checkpoint.
        observer: told about progress.

    Raises:
        ConfigError: the protocol does not fit the classes; `out` holds a run and `resume` is off.
        CheckpointError: the run in `out` belongs to another configuration or data set, or nothing in it can be read.
        DataError, DivergenceError, StorageError: see `Learner.learn` and `Learner.save`.
    """
    watcher = observer or Observer()
    steps = split_steps(class_order(train.class_names, config.protocol), config.protocol.name)
    _check_quota(config, train, [name for names in steps for name in names], watcher)
    learner = Learner(config, observer=watcher)
    if out is not None:
        learner = _open(out, config, train, test, resume, learner, watcher)
    watcher.run_begins(len(steps), config)
    watcher.message(f"backend {learner.backend.name} ({learner.backend.reason}), device {learner.device}")
    checkpoints = None if out is None else Checkpoints(out, config.runtime.keep_checkpoints)
    for number in range(len(learner.results), len(steps)):
        seen = [name for names in steps[: number + 1] for name in names]
        images = train.of_classes(seen if config.method.bound else steps[number])
        learner.learn(
            images,
            test.of_classes(seen),
            begin=None if checkpoints is None else _restorer(checkpoints, watcher),
            save=None if checkpoints is None else checkpoints.save,
        )
        if out is not None and checkpoints is not None:
            learner.save(out)
            checkpoints.clear()
    return learner


def _restorer(checkpoints: Checkpoints, watcher: Observer) -> Callable[[StepState], bool]:
    return lambda state: checkpoints.restore(state, watcher.message)


def _open(
    out: Path, config: Config, train: ImageSource, test: ImageSource, resume: bool, fresh: Learner, watcher: Observer
) -> Learner:
    """Start a new run in `out`, or take up the one that is there."""
    facts = {"config": to_dict(config), "train": train.fingerprint(), "test": test.fingerprint()}
    path = out / "config.json"
    holds_run = path.exists() or bool(saved_steps(out))
    if holds_run and not resume:
        raise ConfigError(f"{out} already holds a run. Continue it with --resume, or choose another folder with --out.")
    for left_over in out.glob("**/.*.tmp"):
        left_over.unlink(missing_ok=True)
    if not holds_run:
        save_manifest(path, facts)
        return fresh
    _check_same(path, facts)
    if not saved_steps(out):
        return fresh
    learner = Learner.load(out, device=config.runtime.device, backend=config.runtime.backend, observer=watcher)
    learner.config = config
    return learner


def _check_same(path: Path, facts: dict[str, Any]) -> None:
    """Refuse to go on with a run under another configuration or with other data."""
    old = load_manifest(path)
    before, now = flatten(old["config"]), flatten(facts["config"])
    changed = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key) and key not in FREE_KEYS]
    if changed:
        rows = ", ".join(f"{key} was {before.get(key)!r}, now {now.get(key)!r}" for key in changed[:5])
        raise CheckpointError(f"{path.parent} was started with another configuration: {rows}. Use the old values, or another --out.")
    for part in ("train", "test"):
        if old[part] != facts[part]:
            raise CheckpointError(
                f"{path.parent} was started with other {part} images: their checksum was {old[part][:12]}…, now {facts[part][:12]}…. "
                "Restore the data set, or start a new run with another --out."
            )


def _check_quota(config: Config, train: ImageSource, names: Sequence[str], watcher: Observer) -> None:
    """Say before anything is trained where a memory cannot work."""
    count = config.memory.per_class if config.memory.per_class is not None else config.memory.total // len(names)
    if config.memory.per_class is None and 0 < config.memory.total < len(names):
        raise ConfigError(
            f"memory.total = {config.memory.total} leaves no exemplar for each of {len(names)} classes; use at least {len(names)}, or 0"
        )
    small = [name for name in names if int((train.labels == train.class_names.index(name)).sum()) < count]
    if small:
        watcher.message(f"{len(small)} class(es) have fewer images than their memory quota of {count}, e.g. {small[0]!r}: all are kept")


def learn_more(
    run: Path, train: ImageSource, test: ImageSource | None, config: Config, *, observer: Observer | None = None
) -> Learner:
    """Teach a saved learner the classes of `train` and save it again.

    Args:
        run: the learner's folder.
        train: the new classes.
        test: images of any known or new classes, or None.
        config: the configuration of this step; backbone and image size must be those of the run.
        observer: told about progress.

    Raises:
        DataError: a class that is already known, or images of another size.
    """
    watcher = observer or Observer()
    learner = Learner.load(run, device=config.runtime.device, backend=config.runtime.backend, observer=watcher)
    if learner.config.model != config.model:
        raise ConfigError("the backbone of a saved run cannot be changed (model.*); leave those keys as they are")
    learner.config = replace(config, runtime=learner.config.runtime)
    watcher.run_begins(1, config)
    checkpoints = Checkpoints(run, config.runtime.keep_checkpoints)
    checkpoints.clear()
    learner.learn(train, test, save=None)
    learner.save(run)
    return learner


def old_test_images(config: Config, names: Sequence[str], load: Callable[[Any], tuple[ImageSource, ImageSource]]) -> ImageSource | None:
    """Return the test images of a run's own data set for the given known classes; None where it cannot be read any more."""
    with contextlib.suppress(DataError):
        _, test = load(config.data)
        present = [name for name in names if name in test.class_names]
        return test.of_classes(present) if present else None
    return None
