"""A whole run: the loop of a protocol over `Learner.learn`, with checkpoints and resume."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from der_fast.config.rescale import unreached_note
from der_fast.config.schema import Config
from der_fast.config.tree import flatten, to_dict
from der_fast.data.source import ImageSource
from der_fast.errors import OUT, RESUME, CheckpointError, ConfigError, DataError, DivergenceError, Spelling
from der_fast.files import held, remove_leftovers
from der_fast.training.checkpoint import FOLDER, Checkpoints, task_of
from der_fast.training.learner import Learner
from der_fast.training.memory import check_quota, scarcity_note
from der_fast.training.progress import Observer
from der_fast.training.protocol import class_order, split_steps
from der_fast.training.runtime import refuse_several_processes
from der_fast.training.saved import saved_steps
from der_fast.training.sources import counts_by_class
from der_fast.training.store import load_manifest, save_manifest

# Where the images lie. They may be moved: checksums tell whether they are still the same.
PLACE_KEYS = ("data.name", "data.root", "data.test_list")
# These decide where and how a run computes, not what it learns.
FREE_KEYS = (
    *(
        f"runtime.{name}"
        for name in ("device", "backend", "threads", "tune_allocator", "keep_checkpoints", "checkpoint_seconds", "tensorboard")
    ),
    *(*PLACE_KEYS, "data.download", "data.max_gib"),
    # Whether a folder is held in memory or left in its files shows in the images' checksum.
    *(f"data.{name}" for name in ("reader", "workers", "prefetch", "timeout", "cache_gib", "hardware_load", "width_hint", "height_hint")),
)


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
        resume: go on with what is in `out`, from its last checkpoint; where nothing was begun there, begin.
        observer: told about progress.

    Raises:
        ConfigError: one of several processes of torchrun; the protocol does not fit the classes; `out` holds a run
            and `resume` is off, or the other way round.
        CheckpointError: the run in `out` belongs to another configuration or data set, or nothing in it can be read.
        DataError, DivergenceError, StorageError: see `Learner.learn` and `Learner.save`.
    """
    refuse_several_processes()
    watcher = observer or Observer()
    steps = split_steps(class_order(train.class_names, config.protocol), config.protocol.name)
    _check_classes(train, test, steps)
    _check_memory(config, train, [name for names in steps for name in names], watcher)
    learner = Learner(config, observer=watcher)
    if out is None:
        if resume:
            raise ConfigError("there is no folder to resume from; give the run's folder as out")
        with _advising("Start again with the lower value."):
            _learn_steps(learner, steps, train, test, None)
        return learner
    check_out(out, resume=resume)
    with held(out):
        learner = _open(out, {"config": to_dict(config), "train": train.fingerprint(), "test": test.fingerprint()}, learner)
        _check_steps(learner, steps, out)
        with _advising("Start again with another ", OUT, " and the lower value: ", RESUME, " takes no changed configuration."):
            _learn_steps(learner, steps, train, test, out)
        # A process that was killed right after its last step has left some.
        Checkpoints(out, config.runtime.keep_checkpoints).clear()
    return learner


@contextlib.contextmanager
def _advising(*how: str | Spelling) -> Iterator[None]:
    """Say of a diverged step how to go on after it, which depends on who called."""
    try:
        yield
    except DivergenceError as error:
        raise DivergenceError(*error.args, " ", *how) from error


def _learn_steps(learner: Learner, steps: Sequence[tuple[str, ...]], train: ImageSource, test: ImageSource, out: Path | None) -> None:
    """Learn the steps that the learner does not know yet."""
    config, watcher = learner.config, learner.observer
    watcher.run_begins(len(steps), config)
    watcher.message(_how(learner))
    _say_unreached(config, ("first", "later", "classifier") if len(steps) > 1 else ("first",), watcher)
    for number in range(len(learner.results), len(steps)):
        seen = [name for names in steps[: number + 1] for name in names]
        images = train.of_classes(seen if config.method.bound else steps[number])
        if out is None:
            learner.learn(images, test.of_classes(seen), announce=False)
        else:
            _learn_and_save(learner, images, test.of_classes(seen), out, announce=False)


def _say_unreached(config: Config, stages: tuple[str, ...], watcher: Observer) -> None:
    note = unreached_note(config, stages)
    if note is not None:
        watcher.message(note)


def _how(learner: Learner) -> str:
    return f"backend {learner.backend.name} ({learner.backend.reason}), device {learner.device}"


def _learn_and_save(learner: Learner, train: ImageSource, test: ImageSource | None, out: Path, *, announce: bool) -> None:
    """Learn one step, from its last checkpoint if there is one, and save the learner; see `Learner.learn`."""
    free = {key: value for key, value in flatten(to_dict(learner.config)).items() if key not in FREE_KEYS}
    task = task_of({"config": free, "known": learner.class_names, "train": train.fingerprint()})
    checkpoints = Checkpoints(out, learner.config.runtime.keep_checkpoints, task)
    restore = partial(checkpoints.restore, warn=learner.observer.message)
    learner.learn(train, test, announce=announce, begin=restore, save=checkpoints.save)
    learner.save(out)
    checkpoints.clear()


def check_out(out: Path, *, resume: bool) -> None:
    """Refuse to begin a run in a folder that holds one; raises ConfigError."""
    if not resume and _holds_run(out):
        raise ConfigError(f"{out} already holds a run. Continue it with ", RESUME, ", or choose another folder with ", OUT, ".")


def _holds_run(out: Path) -> bool:
    return (out / "config.json").exists() or bool(saved_steps(out))


def _open(out: Path, facts: dict[str, Any], fresh: Learner) -> Learner:
    """Start a new run in `out`, or take up the one that is there.

    Args:
        out: the run's folder, held.
        facts: configuration and checksums of the data, as they are written to config.json.
        fresh: a new learner with that configuration.
    """
    config = fresh.config
    if not _holds_run(out):
        save_manifest(out / "config.json", facts)
        return fresh
    for folder in (out, out / FOLDER, out / "extractors", *out.glob("steps/*")):
        remove_leftovers(folder)
    _check_same(out / "config.json", facts)
    _note_place(out / "config.json", config)
    if not saved_steps(out):
        return fresh
    learner = Learner.load(out, device=config.runtime.device, backend=config.runtime.backend, observer=fresh.observer)
    learner.reconfigure(config)
    _finish_saving(learner, out)
    return learner


def _finish_saving(learner: Learner, run: Path) -> None:
    """Do what a process that was killed while it saved has not done any more: write the metrics, delete old states."""
    if saved_steps(run)[-1] == len(learner.results):
        learner.save(run)
    else:
        # The newest state is damaged. Whoever has a copy may still mend it, so it stays until it is learned anew.
        learner.save_results(run)


def _check_same(path: Path, facts: dict[str, Any]) -> None:
    """Refuse to go on with a run under another configuration or with other data."""
    old = load_manifest(path)
    before, now = flatten(old["config"]), flatten(facts["config"])
    changed = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key) and key not in FREE_KEYS]
    if changed:
        rows = ", ".join(f"{key} was {before.get(key)!r}, now {now.get(key)!r}" for key in changed[:5])
        raise CheckpointError(f"{path.parent} was started with another configuration: {rows}. Use the old values, or another ", OUT, ".")
    for part in ("train", "test"):
        if old[part] != facts[part]:
            raise CheckpointError(
                f"{path.parent} was started with other {part} images: their checksum was {old[part][:12]}…, now {facts[part][:12]}…. "
                "Restore the data set, or start a new run with another ",
                OUT,
                ".",
            )


def _note_place(path: Path, config: Config) -> None:
    """Write down where the images lie now, for the next --resume and for `der-fast eval`."""
    facts = load_manifest(path)
    data, now = facts["config"]["data"], flatten(to_dict(config))
    moved = {key.partition(".")[2]: now[key] for key in PLACE_KEYS}
    if any(data.get(name) != value for name, value in moved.items()):
        data.update(moved)
        save_manifest(path, facts)


def _check_steps(learner: Learner, steps: Sequence[tuple[str, ...]], out: Path) -> None:
    """Refuse to go on with a protocol where the learner was taught something else meanwhile."""
    learned = [result.class_names for result in learner.results]
    for step, (has, wants) in enumerate(zip(learned, steps, strict=False), 1):
        if has != wants:
            raise CheckpointError(
                f"{out} has learned other classes than its protocol's in step {step}: "
                f"{', '.join(has[:5])} instead of {', '.join(wants[:5])}. It can learn more with ",
                Spelling("`der-fast learn`", "learn_run()"),
                ", but not go on with ",
                RESUME,
                "; start a new run with another ",
                OUT,
                ".",
            )


def _check_classes(train: ImageSource, test: ImageSource, steps: Sequence[tuple[str, ...]]) -> None:
    """Refuse a class without images before the steps in front of it are learned."""
    for what, source in (("training", train), ("test", test)):
        counts = counts_by_class(source)
        missing = [name for names in steps for name in names if not counts.get(name)]
        if missing:
            raise DataError(
                f"no {what} images of {len(missing)} class(es), e.g. {missing[0]!r}; add images, or leave the class out "
                "(protocol.class_order names the classes to learn)"
            )


def _check_memory(config: Config, train: ImageSource, names: Sequence[str], watcher: Observer) -> None:
    """Say before anything is trained where the memory cannot work, or not well, once all classes are known."""
    if config.method.bound:
        return
    check_quota(config.memory, len(names))
    counts = counts_by_class(train)
    note = scarcity_note(config, {name: counts[name] for name in names}, len(names))
    if note is not None:
        watcher.message(note)


def learn_more(run: Path, train: ImageSource, test: ImageSource | None, config: Config, *, observer: Observer | None = None) -> Learner:
    """Teach a saved learner the classes of `train` and save it again.

    Until it is saved, the folder holds what it held before. Where the process was killed, the same call goes on from the last
    checkpoint.

    Args:
        run: the learner's folder.
        train: the new classes.
        test: images of any known or new classes, or None.
        config: the configuration of this step; backbone and image size must be those of the run.
        observer: told about progress.

    Raises:
        DataError: a class that is already known, or images of another size.
        ConfigError: one of several processes of torchrun; a key on which what was learned before depends.
        CheckpointError, StorageError: see `Learner.load` and `Learner.save`.
    """
    refuse_several_processes()
    watcher = observer or Observer()
    with held(run):
        learner = Learner.load(run, device=config.runtime.device, backend=config.runtime.backend, observer=watcher)
        _finish_saving(learner, run)
        learner.reconfigure(config)
        watcher.run_begins(1, config)
        watcher.message(_how(learner))
        _say_unreached(config, ("later", "classifier"), watcher)
        with _advising(f"{run} is as it was: learn the classes again, with the lower value."):
            _learn_and_save(learner, train, test, run, announce=True)
    return learner


def old_test_images(config: Config, names: Sequence[str], load: Callable[[Any], tuple[ImageSource, ImageSource]]) -> ImageSource | None:
    """Return the test images of a run's own data set for the given known classes; None where it cannot be read any more."""
    with contextlib.suppress(DataError):
        _, test = load(config.data)
        present = [name for name in names if name in test.class_names]
        return test.of_classes(present) if present else None
    return None
