"""What a user calls: train, learn, evaluate, report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from der_fast.config.check import refuse_others
from der_fast.config.datasets import absolute
from der_fast.config.protocols import Protocol
from der_fast.config.rescale import stretched
from der_fast.config.resolve import resolve_config
from der_fast.config.schema import Config
from der_fast.config.tree import from_dict, replace_keys
from der_fast.data import load_dataset
from der_fast.data.joined import joined
from der_fast.data.sets.dataset import as_source
from der_fast.data.source import ImageSource
from der_fast.errors import CheckpointError, ConfigError, DataError, Spelling
from der_fast.home import expand
from der_fast.kernels.forked import fit_to_compute
from der_fast.report import write_report
from der_fast.training.edit import forget_in_run, rename_in_run
from der_fast.training.evaluation import Evaluation
from der_fast.training.learner import Learner
from der_fast.training.measured import held_out_images, images_of, without_limits
from der_fast.training.progress import Observer, Observers
from der_fast.training.provenance import GIVEN, moved, origin_of
from der_fast.training.run import check_out, learn_more, run_protocol
from der_fast.training.runtime import refuse_rerun
from der_fast.training.sources import without_empty_classes
from der_fast.training.storage.named_files import load_manifest
from der_fast.training.watching import watched

_LIMITS = ("train_per_class", "test_per_class", "test_share")


@dataclass(frozen=True)
class RunResult:
    """A finished run: what ``metrics.json`` holds, the learner, and the run's folder (None where nothing was written)."""

    metrics: dict[str, Any]
    learner: Learner
    out: Path | None


def train(
    data: Any,
    protocol: Protocol | None = None,
    *,
    out: str | Path | None = None,
    config: Config | None = None,
    preset: str | Path | None = None,
    paper: bool = False,
    resume: bool = False,
    observer: Observer | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: bool | None = None,
) -> RunResult:
    """Learn a data set's classes step by step, with pruning, and write run folder and report.

    Args:
        data: 'digits', 'cifar10', 'cifar100', a folder of class folders, or a pair (train, test) of image sources or map-style
            datasets of (image, label).
        protocol: 'B0-n', 'B<base>-<n>', the sizes of all steps ('10,10,5' or [10, 10, 5]), the class names of every step
            ([["cat", "dog"], ["car"]]), or a text file with one step per line; default: the preset's.
        out: the run's folder; None keeps everything in memory.
        config: a complete configuration to start from instead of a preset.
        preset: name of a preset, or the path of a recipe of your own, ``"recipe.toml"`` (`der-fast train --print-config` writes one);
            default: the one made for `data` and `protocol`, if there is one.
        paper: the paper's own schedule: no settling, no parameter target, no floor, no whole blocks.
        resume: go on with the run in `out`, or begin it where nothing was begun; what neither `config`, `preset` nor `settings` name is
            as it was begun. On the CPU it comes to what it would have come to, bit for bit on the same kind of processor.
        observer: told about progress.
        settings: single keys over all of that, e.g. ``{"later.epochs": 20}``, with which milestones and warm-up move in proportion.
        progress: show how training goes: None, where somebody looks on (standard error is a terminal: a bar; a notebook: a line of text)
            and no observer is given; True, also elsewhere (a line a minute on standard error) and beside an observer; False, never.

    Returns:
        The metrics (percent, parameter counts, milliseconds, seconds), the learner and the folder.

    Raises:
        UserError: anything that the caller can fix; the message says what, where and how.
        KeyboardInterrupt: Ctrl-C, after the running batch was finished and, where there is a folder, saved; a second one does not wait.
            Only in the main thread, and only where Python's own handler is in force.
    """
    refuse_rerun()
    fit_to_compute()
    begun = _begun(expand(out)) if resume and out is not None else None
    named: dict[str, Any] = {"preset": None if preset is None else str(preset), "paper": paper, "changes": settings, "begun": begun}
    if isinstance(data, (str, Path)):
        resolved = resolve_config(str(data), protocol, base=config or begun, **named)
        with watched(observer, progress) as watcher:
            return train_run(resolved, None if out is None else expand(out), resume=resume, observer=watcher)
    if not (isinstance(data, tuple) and len(data) == 2):
        raise ConfigError(f"data must be a name, a folder, or a pair (train, test), not {type(data).__name__}")
    resolved = resolve_config(None, protocol, base=config or begun or Config(), **named)
    resolved = replace_keys(resolved, {"data.name": GIVEN})
    train_source = as_source(data[0], resolved.data)
    test_source = as_source(data[1], resolved.data, train_source.image_size)
    with watched(observer, progress) as watcher:
        return _train(resolved, train_source, test_source, None if out is None else expand(out), resume, watcher)


def _begun(out: Path) -> Config | None:
    """Return the configuration that the run in `out` was begun with; None where there is none that can be read."""
    with suppress(CheckpointError):
        return from_dict(load_manifest(out / "config.json")["config"])
    return None


def train_run(config: Config, out: Path | None, *, resume: bool = False, observer: Observer | None = None) -> RunResult:
    """Run a resolved configuration; see `train`."""
    if out is not None:
        check_out(out, resume=resume)
    # The index of a folder of photos is kept beside the run: the next start need not list a million files.
    train_source, test_source = load_dataset(config.data, cache=out, say=observer.message if observer else None)
    return _train(config, train_source, test_source, out, resume, observer)


def _train(
    config: Config, train_source: ImageSource, test_source: ImageSource, out: Path | None, resume: bool, observer: Observer | None
) -> RunResult:
    if out is not None:
        check_out(out, resume=resume)
    with _watched(config, out, observer) as watcher:
        learner = run_protocol(config, train_source, test_source, out, resume=resume, observer=watcher)
    if out is not None:
        write_report(out)
    return RunResult(learner.metrics(), learner, out)


@contextmanager
def _watched(config: Config, out: Path | None, observer: Observer | None) -> Iterator[Observer]:
    """Yield the observer, joined by TensorBoard's where that is switched on."""
    if out is None or not config.runtime.tensorboard:
        yield observer or Observer()
        return
    from der_fast.report.tensorboard import TensorBoardObserver

    events = TensorBoardObserver(out / "tensorboard")
    try:
        yield Observers([observer or Observer(), events])
    finally:
        events.close()


def rename_class(run: str | Path, old: str, new: str, *, observer: Observer | None = None) -> RunResult:
    """Call a class of a saved run by another name, wherever the run names it, and write its report again; no weight changes.

    Images of the run's own data set are still found under the old name. What was exported before keeps it.

    Raises:
        UserError: no class `old`, a name that is empty or that a class has already, a damaged run.
    """
    run = expand(run)
    learner = rename_in_run(run, old, new, observer=observer)
    write_report(run)
    return RunResult(learner.metrics(), learner, run)


def forget_class(run: str | Path, *class_names: str, observer: Observer | None = None) -> RunResult:
    """Take classes out of a saved run, with their exemplars in every file that it keeps, and write its report again.

    No weight of the other classes changes, nor do their logits. What extractors learned from the images of these classes stays in them.
    Accuracy is measured on the other classes' test images, where the run's own data set can still be read.

    Args:
        run: the run's folder.
        class_names: known classes, not all of them.
        observer: told about progress.

    Raises:
        UserError: no name, one that is not known, all known classes, a damaged run.
    """
    folder = expand(run)

    def test_images(learner: Learner) -> ImageSource | None:
        own = replace(learner.config.data, image_size=_input_side(learner))
        return held_out_images(learner, own, folder).source

    learner = forget_in_run(folder, class_names, test_images=test_images, observer=observer)
    write_report(folder)
    return RunResult(learner.metrics(), learner, folder)


def learn_run(
    run: str | Path,
    folder: str | Path,
    *,
    data: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    observer: Observer | None = None,
    progress: bool | None = None,
) -> RunResult:
    """Teach a saved run the classes of a folder, save it, and write its report again.

    Images of classes that the run knows join its rehearsal memory. A folder of such images only refreshes memory and classifier, without
    a new extractor.

    Args:
        run: the run's folder.
        folder: class folders, with or without a train/test split, of new classes, known ones, or both.
        data: where the images of the run's own data set lie now, if they were moved.
        overrides: dotted keys over the run's configuration, e.g. ``{"later.epochs": 20}``, with which milestones and warm-up move.
        observer: told about progress.
        progress: shown where somebody looks on; see `train`.

    Accuracy is measured on the test images of the new classes and on those that the run held out of every data set it learned before.
    What of these cannot be read any more is said and stands in the report.
    A process that is killed leaves the run as it was; the same call then goes on from the last checkpoint.

    Raises:
        UserError: anything that the caller can fix: nothing that is new, a folder that cannot be used, a damaged run.
    """
    refuse_rerun()
    with watched(observer, progress) as watcher:
        return _learn_run(expand(run), folder, data, overrides, watcher)


def _learn_run(run: Path, folder: str | Path, data: str | Path | None, overrides: Mapping[str, Any] | None, watcher: Observer) -> RunResult:
    saved, overrides = Learner.load(run), dict(overrides or {})
    if data is not None:
        overrides["data.name"] = absolute(str(data))
    config = replace_keys(saved.config, stretched(saved.config, overrides))
    refuse_others(config, overrides)
    if saved.model.memory is not None and not saved.model.memory.in_files:
        # New images are put together with the memory, so they are held as it is.
        config = replace_keys(config, {"data.reader": "memory"})
    limits = {key: None for key in ("data.train_per_class", "data.test_per_class") if key not in overrides}
    everything = {**limits, "data.classes": None, "data.test_list": None, "data.image_size": _input_side(saved)}
    new_data = replace_keys(config, {**everything, "data.name": str(folder)}).data
    train_source, test_source = load_dataset(new_data, say=watcher.message)
    own = replace(saved.config.data, name=config.data.name, reader=config.data.reader, image_size=_input_side(saved))
    saved.learned = moved(saved.learned, saved.config.data, own)
    old = held_out_images(saved, own, run)
    for note in old.notes:
        watcher.message(note)
    if old.source is None:
        name = saved.config.data.name
        watcher.message(f"the run's own data set ({name}) cannot be read here: accuracy is measured on the new classes only")
        test: ImageSource = test_source
    else:
        known = without_empty_classes(old.source)
        names = (*known.class_names, *(name for name in test_source.class_names if name not in known.class_names))
        test = joined([known, test_source], names)
    # How much of the new folder is read says nothing about the data set that the run was trained on.
    of_run = {f"data.{key}": getattr(saved.config.data, key) for key in ("name", *_LIMITS, "reader")}
    if data is not None:
        del of_run["data.name"]
    origin = origin_of(new_data, test_source, old.notes)
    learner = learn_more(run, train_source, test, replace_keys(config, of_run), origin=origin, observer=watcher)
    write_report(run)
    return RunResult(learner.metrics(), learner, run)


def evaluate_run(
    run: str | Path, data: str | Path | None = None, *, device: str | None = None, observer: Observer | None = None
) -> Evaluation:
    """Measure a saved run's accuracy.

    Args:
        run: the run's folder.
        data: a data set name or a folder of known classes: its test images, or all where it has no train/test split, but none that the
            run was trained on. Default: the images that the run held out, of every data set that it learned.
        device: where it runs.
        observer: told about what is missing or left out, and about a damaged state that had to be passed over.

    Raises:
        UserError: a run or data set that cannot be read, has a class that was never learned, or no image that can be measured.
    """
    run = expand(run)
    learner, watcher = Learner.load(run, device=device, observer=observer), observer or Observer()
    wanted, side = learner.config.data, _input_side(learner)
    if data is not None:
        found = images_of(learner, without_limits(wanted, str(data), side))
    else:
        found = held_out_images(learner, replace(wanted, image_size=side), run)
    if found.source is None:
        raise DataError(
            f"none of the images that the run in {run} held out can be read: {'; '.join(found.notes)}. Give a folder of test images",
            *(
                ()
                if all(entry.data is None for entry in learner.learned)
                else (
                    ", or tell the run where its own are now: ",
                    Spelling(f"der-fast train NEW_PLACE --out {run} --resume", f"train(NEW_PLACE, out={str(run)!r}, resume=True)"),
                )
            ),
        )
    for note in found.notes:
        watcher.message(note)
    return replace(learner.evaluate(found.source), left_out=found.left_out, notes=found.notes)


def _input_side(learner: Learner) -> int:
    """The side of the network's input in pixels, to which other images have to be brought."""
    assert learner.image_size is not None
    side, data = learner.image_size[0], learner.config.data
    return data.image_size or (round(side * 224 / 256) if data.random_resized_crop else side)
