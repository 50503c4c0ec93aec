"""A whole run: the loop of a protocol over `Learner.learn`, with checkpoints and resume."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from der_fast.config.former import present_keys
from der_fast.config.key import Change
from der_fast.config.rescale import unreached_note
from der_fast.config.schema import Config
from der_fast.config.tree import flatten, keys_with, replace_keys, to_dict
from der_fast.data.source import ImageSource, renamed
from der_fast.errors import OUT, RESUME, CheckpointError, ConfigError, DataError, DivergenceError, Spelling
from der_fast.files import held, remove_leftovers
from der_fast.stopping import deferred, heeding
from der_fast.training.events import names_now, names_then, present
from der_fast.training.hooks import Hooks
from der_fast.training.learner import Learner
from der_fast.training.memory import check_quota, scarcity_note
from der_fast.training.methods import method_of
from der_fast.training.progress import Observer, Observers
from der_fast.training.protocol import steps_of
from der_fast.training.provenance import FOLDER as LEARNED
from der_fast.training.provenance import Origin, origin_of
from der_fast.training.runtime import refuse_several_processes
from der_fast.training.sources import counts_by_class
from der_fast.training.state import StepState
from der_fast.training.storage.checkpoint import FOLDER, Checkpoints, task_of
from der_fast.training.storage.history import HistoryFile
from der_fast.training.storage.named_files import load_manifest, save_manifest
from der_fast.training.storage.saved import saved_steps

_FREE = keys_with(Change.RESUME, Change.PLACE)


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
        resume: continue the run in `out` from its last checkpoint; if there is none, start one.
        observer: receives progress.

    Raises:
        ConfigError: one of several processes of torchrun; the protocol does not fit the classes; `out` holds a run
            and `resume` is off, or `resume` is on without `out`.
        CheckpointError: the run in `out` belongs to another configuration or data set, or nothing in it can be read.
        DataError, DivergenceError, StorageError: see `Learner.learn` and `Learner.save`.
        Stopped: a KeyboardInterrupt; what was learned before it is saved in `out`.
    """
    refuse_several_processes()
    watcher = observer or Observer()
    steps = steps_of(train.class_names, config.protocol)
    _check_classes(train, test, steps)
    _say_left_out(train, steps, watcher)
    _check_memory(config, train, [name for names in steps for name in names], watcher)
    learner = Learner(_as_begun(config, out) if resume and out is not None else config, observer=watcher)
    if out is None:
        if resume:
            raise ConfigError("there is no folder to resume from; give the run's folder as out")
        with heeding(watcher.message), _advising("Start again with the lower value."):
            _learn_steps(learner, steps, train, test, None)
        return learner
    check_out(out, resume=resume)
    with heeding(watcher.message), held(out):
        if resume and not _holds_run(out):
            watcher.message(f"there is no run in {out} yet: starting one")
        learner = _open(out, {"config": to_dict(learner.config), "train": train.fingerprint(), "test": test.fingerprint()}, learner)
        steps, train, test = _under_present_names(learner, steps, train, test, out)
        _check_steps(learner, steps, out)
        with _advising("Start again with another ", OUT, " and the lower value: ", RESUME, " cannot change the configuration."):
            _learn_steps(learner, steps, train, test, out)
        # A process killed right after its last step leaves some.
        Checkpoints(out, config.runtime.keep_checkpoints).clear()
    return learner


def _as_begun(config: Config, out: Path) -> Config:
    """Return the configuration with the precision that the run in `out` was begun with, where 'auto' leaves it open."""
    if config.runtime.precision != "auto" or not (out / "config.json").exists():
        return config
    return replace_keys(config, {"runtime.precision": load_manifest(out / "config.json")["config"]["runtime"]["precision"]})


@contextlib.contextmanager
def _advising(*how: str | Spelling) -> Iterator[None]:
    """Add to the error of a diverged step how to continue, which depends on the caller."""
    try:
        yield
    except DivergenceError as error:
        raise DivergenceError(*error.args, " ", *how) from error


def _learn_steps(learner: Learner, steps: Sequence[tuple[str, ...]], train: ImageSource, test: ImageSource, out: Path | None) -> None:
    """Learn the remaining steps."""
    config, watcher = learner.config, learner.observer
    watcher.run_begins(len(steps), config)
    watcher.message(_how(learner))
    _say_unreached(config, ("first", "later", "classifier") if len(steps) > 1 else ("first",), watcher)
    for number in range(len(learner.results), len(steps)):
        seen = [name for names in steps[: number + 1] for name in names]
        images = train.of_classes(seen if learner.method.joint else steps[number])
        origin = origin_of(config.data, test.of_classes(steps[number]))
        if out is None:
            learner._learn(images, test.of_classes(seen), Hooks(origin, announce=False))
        else:
            _learn_and_save(learner, images, test.of_classes(seen), out, Hooks(origin, announce=False))


def _say_unreached(config: Config, stages: tuple[str, ...], watcher: Observer) -> None:
    note = unreached_note(config, stages)
    if note is not None:
        watcher.message(note)


def _how(learner: Learner) -> str:
    return f"backend {learner.backend.name} ({learner.backend.reason}), device {learner.device}"


def _learn_and_save(learner: Learner, train: ImageSource, test: ImageSource | None, out: Path, hooks: Hooks) -> None:
    """Learn one step, from its last checkpoint if there is one, and save the learner."""
    # The classes of other steps do not matter to this one; its own are in the images' checksum.
    free = {key: value for key, value in flatten(to_dict(learner.config)).items() if key not in (*_FREE, "protocol.steps")}
    task = task_of({"config": free, "known": names_then(learner.class_names, learner.events), "train": train.fingerprint()})
    checkpoints = Checkpoints(out, learner.config.runtime.keep_checkpoints, task)
    watcher = learner.observer
    history = HistoryFile(out, learner.records, watcher.message)

    def restore(state: StepState) -> bool:
        restored = checkpoints.restore(state, warn=watcher.message)
        history.go_on_from(state.records if restored else [])
        return restored

    learner.observer = Observers([watcher, history])
    try:
        learner._learn(train, test, replace(hooks, restore=restore, save=checkpoints.save))
    finally:
        learner.observer = watcher
        # Whoever is told that the run stopped can count on its last checkpoint.
        checkpoints.flush()
        history.flush()
    with deferred():
        learner.save(out)
        checkpoints.clear()


def check_out(out: Path, *, resume: bool) -> None:
    """Refuse to start a run in a folder that holds one; raises ConfigError."""
    if not resume and _holds_run(out):
        raise ConfigError(f"{out} already holds a run. Continue it with ", RESUME, ", or choose another folder with ", OUT, ".")


def _holds_run(out: Path) -> bool:
    return (out / "config.json").exists() or bool(saved_steps(out))


def _open(out: Path, facts: dict[str, Any], fresh: Learner) -> Learner:
    """Start a new run in `out`, or open the one there.

    Args:
        out: the run's folder, held.
        facts: configuration and checksums of the data, as written to config.json.
        fresh: a new learner with that configuration.
    """
    config = fresh.config
    if not _holds_run(out):
        save_manifest(out / "config.json", facts)
        return fresh
    for folder in (out, out / FOLDER, out / "extractors", out / LEARNED, *out.glob("steps/*")):
        remove_leftovers(folder)
    _check_same(out / "config.json", facts)
    _note_place(out / "config.json", config)
    if not saved_steps(out):
        return fresh
    learner = Learner.load(out, device=config.runtime.device, backend=config.runtime.backend, observer=fresh.observer)
    learner.reconfigure(config)
    finish_saving(learner, out)
    return learner


def finish_saving(learner: Learner, run: Path) -> None:
    """Finish what a process killed while saving left undone: write the metrics, delete old states."""
    if saved_steps(run)[-1] == len(learner.results):
        learner.save(run)
    else:
        # The newest state is damaged. It may still be fixed from a copy, so it stays until it is learned again.
        learner.save_results(run)


def _check_same(path: Path, facts: dict[str, Any]) -> None:
    """Refuse to continue a run with another configuration or other data."""
    old = load_manifest(path)
    before, now = flatten(present_keys(old["config"])), flatten(facts["config"])
    changed = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key) and key not in _FREE]
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
    """Record where the images are now, for the next --resume and for `der-fast eval`."""
    facts = load_manifest(path)
    data, now = facts["config"]["data"], flatten(to_dict(config))
    moved = {key.partition(".")[2]: now[key] for key in keys_with(Change.PLACE)}
    if any(data.get(name) != value for name, value in moved.items()):
        data.update(moved)
        save_manifest(path, facts)


def _under_present_names(
    learner: Learner, steps: Sequence[tuple[str, ...]], train: ImageSource, test: ImageSource, out: Path
) -> tuple[list[tuple[str, ...]], ImageSource, ImageSource]:
    """Return protocol and images with the run's current class names; forgotten classes leave their steps."""
    names = names_now(learner.events)
    called = {old: new for old, new in names.items() if new is not None}
    try:
        return [present(step, names) for step in steps], renamed(train, called), renamed(test, called)
    except DataError as error:
        rows = ", ".join(f"{old!r} is {new!r} now" for old, new in called.items())
        raise CheckpointError(
            f"the run in {out} cannot continue: {error} ({rows}, and the data set has a class of that name); rename it again with ",
            Spelling("`der-fast rename`", "der_fast.rename_class"),
        ) from error


def _check_steps(learner: Learner, steps: Sequence[tuple[str, ...]], out: Path) -> None:
    """Refuse to continue a protocol if the learner has learned something else since."""
    learned = [result.class_names for result in learner.results]
    for step, (has, wants) in enumerate(zip(learned, steps, strict=False), 1):
        if has != wants:
            raise CheckpointError(
                f"the run in {out} did not learn its protocol's classes in step {step}: "
                f"{', '.join(has[:5])} instead of {', '.join(wants[:5])}. It can learn more with ",
                Spelling("`der-fast learn`", "learn_run()"),
                ", but not continue with ",
                RESUME,
                "; start a new run with another ",
                OUT,
                ".",
            )


def _check_classes(train: ImageSource, test: ImageSource, steps: Sequence[tuple[str, ...]]) -> None:
    """Refuse a class without images before any earlier step is learned."""
    for what, source in (("training", train), ("test", test)):
        counts = counts_by_class(source)
        missing = [name for names in steps for name in names if not counts.get(name)]
        if missing:
            raise DataError(
                f"no {what} images of {len(missing)} class(es), e.g. {missing[0]!r}; add images, or leave the class out "
                "(protocol.class_order names the classes to learn)"
            )


def _say_left_out(train: ImageSource, steps: Sequence[tuple[str, ...]], watcher: Observer) -> None:
    """Name the data set's classes that are missing from a protocol of given names."""
    wanted = {name for names in steps for name in names}
    missing = [name for name in train.class_names if name not in wanted]
    if missing:
        named = ", ".join(map(repr, missing[:5])) + (", …" if len(missing) > 5 else "")
        watcher.message(f"{len(missing)} class(es) of the data set are in no step and are not learned: {named}")


def _check_memory(config: Config, train: ImageSource, names: Sequence[str], watcher: Observer) -> None:
    """Before training, point out where the memory will not work, or not well, once all classes are known."""
    if method_of(config).joint:
        return
    check_quota(config.memory, len(names))
    counts = counts_by_class(train)
    note = scarcity_note(config, {name: counts[name] for name in names}, len(names))
    if note is not None:
        watcher.message(note)


def learn_more(
    run: Path,
    train: ImageSource,
    test: ImageSource | None,
    config: Config,
    *,
    origin: Origin | None = None,
    observer: Observer | None = None,
) -> Learner:
    """Teach a saved learner the classes of `train`, or refresh known ones with more images, and save it again; see `Learner.learn`.

    Until then the folder does not change. If the process is killed, the same call continues from the last checkpoint.

    Args:
        run: the learner's folder.
        train: images of new classes, of known ones, or of both.
        test: images of any known or new classes, or None.
        origin: where the images come from; see `Hooks`.
        config: the configuration of this step; backbone and image size must be those of the run.
        observer: receives progress.

    Raises:
        DataError: nothing new, or images of another size.
        ConfigError: one of several processes of torchrun; a key that the learned model depends on.
        CheckpointError, StorageError: see `Learner.load` and `Learner.save`.
    """
    refuse_several_processes()
    watcher = observer or Observer()
    with heeding(watcher.message), held(run):
        learner = Learner.load(run, device=config.runtime.device, backend=config.runtime.backend, observer=watcher)
        finish_saving(learner, run)
        learner.reconfigure(config)
        watcher.run_begins(1, config)
        watcher.message(_how(learner))
        _say_unreached(config, ("later", "classifier"), watcher)
        with _advising(f"{run} did not change: learn the classes again, with the lower value."):
            _learn_and_save(learner, train, test, run, Hooks(origin))
    return learner
