"""What a user calls: train, learn, evaluate, report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from der_fast.config.datasets import absolute
from der_fast.config.rescale import stretched
from der_fast.config.resolve import resolve_config
from der_fast.config.schema import Config
from der_fast.config.tree import from_dict, replace_keys
from der_fast.data import MemorySource, load_dataset
from der_fast.data.source import ImageSource
from der_fast.errors import CheckpointError, ConfigError, DataError, Spelling
from der_fast.report import write_report
from der_fast.training.evaluation import Evaluation
from der_fast.training.learner import Learner
from der_fast.training.progress import Observer, Observers
from der_fast.training.run import check_out, learn_more, old_test_images, run_protocol
from der_fast.training.sources import as_source
from der_fast.training.store import load_manifest

# The data set's name in the configuration of a run that was given image sources or data sets.
GIVEN = "given as datasets"


@dataclass(frozen=True)
class RunResult:
    """A finished run: what ``metrics.json`` holds, the learner, and the run's folder (None where nothing was written)."""

    metrics: dict[str, Any]
    learner: Learner
    out: Path | None


def train(
    data: Any,
    protocol: str | None = None,
    *,
    out: str | Path | None = None,
    config: Config | None = None,
    preset: str | Path | None = None,
    paper: bool = False,
    resume: bool = False,
    observer: Observer | None = None,
    settings: Mapping[str, Any] | None = None,
) -> RunResult:
    """Learn a data set's classes step by step, with pruning, and write run folder and report.

    Args:
        data: 'digits', 'cifar10', 'cifar100', a folder of class folders, or a pair (train, test) of image sources or map-style
            datasets of (image, label).
        protocol: 'B0-n' or 'B<base>-<n>'; default: the preset's.
        out: the run's folder; None keeps everything in memory.
        config: a complete configuration to start from instead of a preset.
        preset: name of a preset, or the path of a recipe of your own, ``"recipe.toml"`` (`der-fast train --print-config` writes one);
            default: the one made for `data` and `protocol`, if there is one.
        paper: the paper's own schedule: no settling, no parameter target, no floor, no whole blocks.
        resume: go on with the run in `out`; what neither `config`, `preset` nor `settings` name is as it was begun.
        observer: told about progress.
        settings: single keys over all of that, e.g. ``{"later.epochs": 20}``, with which milestones and warm-up move in proportion.

    Returns:
        The metrics (percent, parameter counts, milliseconds, seconds), the learner and the folder.

    Raises:
        UserError: anything that the caller can mend; the message says what, where and how.
    """
    begun = _begun(Path(out)) if resume and out is not None else None
    named: dict[str, Any] = {"preset": None if preset is None else str(preset), "paper": paper, "changes": settings, "begun": begun}
    if isinstance(data, (str, Path)):
        resolved = resolve_config(str(data), protocol, base=config or begun, **named)
        return train_run(resolved, None if out is None else Path(out), resume=resume, observer=observer)
    if not (isinstance(data, tuple) and len(data) == 2):
        raise ConfigError(f"data must be a name, a folder, or a pair (train, test), not {type(data).__name__}")
    resolved = resolve_config(None, protocol, base=config or begun or Config(), **named)
    resolved = replace_keys(resolved, {"data.name": GIVEN})
    train_source = as_source(data[0], resolved.data)
    test_source = as_source(data[1], resolved.data, train_source.image_size)
    return _train(resolved, train_source, test_source, None if out is None else Path(out), resume, observer)


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


def learn_run(
    run: str | Path,
    folder: str | Path,
    *,
    data: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    observer: Observer | None = None,
) -> RunResult:
    """Teach a saved run the classes of a folder, save it, and write its report anew.

    Args:
        run: the run's folder.
        folder: class folders, with or without a train/test split; every class must be new.
        data: where the images of the run's own data set lie now, if they were moved.
        overrides: dotted keys over the run's configuration, e.g. ``{"later.epochs": 20}``, with which milestones and warm-up move.
        observer: told about progress.

    Accuracy is measured on the new classes' test images and, where the run's own data set can still be read, on the old ones'.
    A process that is killed leaves the run as it was; the same call then goes on from the last checkpoint.

    Raises:
        UserError: anything that the caller can mend: a class that is already known, a folder that cannot be used, a damaged run.
    """
    run, watcher = Path(run), observer or Observer()
    saved, overrides = Learner.load(run), dict(overrides or {})
    if data is not None:
        overrides["data.name"] = absolute(str(data))
    config = replace_keys(saved.config, stretched(saved.config, overrides))
    if isinstance(saved.model.memory, MemorySource):
        # New images are put together with the memory, so they are held as it is.
        config = replace_keys(config, {"data.reader": "memory"})
    limits = {key: None for key in ("data.train_per_class", "data.test_per_class") if key not in overrides}
    everything = {**limits, "data.classes": None, "data.test_list": None, "data.image_size": _input_side(saved)}
    new_data = replace_keys(config, {**everything, "data.name": str(folder)}).data
    train_source, test_source = load_dataset(new_data, say=watcher.message)
    own = {"data.name": config.data.name, "data.reader": config.data.reader, "data.image_size": _input_side(saved)}
    old = old_test_images(replace_keys(saved.config, own), saved.class_names, partial(load_dataset, cache=run))
    if old is None:
        name = saved.config.data.name
        watcher.message(f"the run's own data set ({name}) cannot be read here: accuracy is measured on the new classes only")
        test: ImageSource = test_source
    else:
        names = (*old.class_names, *(name for name in test_source.class_names if name not in old.class_names))
        test = old.relabelled(names).concatenated(test_source.relabelled(names))
    # How much of the new folder is read says nothing about the data set that the run was trained on.
    of_run = {
        f"data.{key}": getattr(saved.config.data, key) for key in ("name", "train_per_class", "test_per_class", "test_share", "reader")
    }
    if data is not None:
        del of_run["data.name"]
    learner = learn_more(run, train_source, test, replace_keys(config, of_run), observer=watcher)
    write_report(run)
    return RunResult(learner.metrics(), learner, run)


def evaluate_run(
    run: str | Path, data: str | Path | None = None, *, device: str | None = None, observer: Observer | None = None
) -> Evaluation:
    """Measure a saved run's accuracy.

    Args:
        run: the run's folder.
        data: a data set name or a folder of known classes: its test images, or all where a folder has no train/test split.
            Default: the run's own test images.
        device: where it runs.
        observer: told about a damaged state that had to be passed over.

    Raises:
        UserError: a run or data set that cannot be read, or without any known class.
    """
    learner = Learner.load(run, device=device, observer=observer)
    wanted = learner.config.data
    if data is not None:
        side = _input_side(learner)
        whole = replace(wanted, name=str(data), image_size=side, train_per_class=None, test_per_class=None, classes=None, test_list=None)
        train, test = load_dataset(whole)
        return learner.evaluate(train.concatenated(test) if _has_no_split(train) else test)
    if wanted.name == GIVEN:
        raise DataError(f"the run in {run} was trained on data sets that no name stands for; give a folder of test images")
    if Path(wanted.name).is_absolute() and not Path(wanted.name).exists():
        raise DataError(
            f"the images of the run in {run} are not in {wanted.name} any more; give a folder of test images, or tell the run where they "
            "are now: ",
            Spelling(f"der-fast train NEW_PLACE --out {run} --resume", f"train(NEW_PLACE, out={str(run)!r}, resume=True)"),
        )
    _, test = load_dataset(wanted, cache=Path(run))
    known = [name for name in learner.class_names if name in test.class_names]
    if not known:
        raise DataError(f"data set {wanted.name!r} has none of the classes that the run in {run} knows; give a folder of test images")
    return learner.evaluate(test.of_classes(known))


def _has_no_split(train: ImageSource) -> bool:
    """Whether images come from a folder without train/ and test/: their names are then <class>/<file>."""
    files = getattr(train, "files", None)
    return files is not None and all(name.count("/") == 1 for name in files)


def _input_side(learner: Learner) -> int:
    """The side of the network's input in pixels, to which other images have to be brought."""
    assert learner.image_size is not None
    side, data = learner.image_size[0], learner.config.data
    return data.image_size or (round(side * 224 / 256) if data.random_resized_crop else side)
