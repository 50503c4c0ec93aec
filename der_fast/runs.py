"""Runs in folders: trained, taught more, measured or edited; each call writes the report again."""

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
from der_fast.report import write_report
from der_fast.training.edit import forget_in_run, rename_in_run
from der_fast.training.evaluation import Evaluation
from der_fast.training.learner import Learner
from der_fast.training.measured import held_out_images, images_of, without_limits
from der_fast.training.progress import Observer, Observers
from der_fast.training.provenance import GIVEN, moved, origin_of
from der_fast.training.run import check_out, learn_more, run_protocol
from der_fast.training.sources import without_empty_classes
from der_fast.training.storage.named_files import load_manifest

_LIMITS = ("train_per_class", "test_per_class", "test_share")


@dataclass(frozen=True)
class RunResult:
    """A finished run: the content of ``metrics.json``, the learner, and the run's folder (None if nothing was written)."""

    metrics: dict[str, Any]
    learner: Learner
    out: Path | None


def with_runtime(settings: Mapping[str, Any] | None, **given: str | None) -> dict[str, Any]:
    """Return the settings with the keys of `runtime` that were given as arguments; raises ConfigError where both say something else."""
    found = dict(settings or {})
    for name, value in given.items():
        if value is not None and found.setdefault(f"runtime.{name}", value) != value:
            raise ConfigError(f"{name}={value!r}, but settings have runtime.{name}={found[f'runtime.{name}']!r}; give one of them")
    return found


def begun_with(out: Path) -> Config | None:
    """Return the configuration that the run in `out` was started with; None if there is none that can be read."""
    with suppress(CheckpointError):
        return from_dict(load_manifest(out / "config.json")["config"])
    return None


def train_run(config: Config, out: Path | None, *, resume: bool = False, observer: Observer | None = None) -> RunResult:
    """Run a resolved configuration; see `der_fast.train`."""
    if out is not None:
        check_out(out, resume=resume)
    # The index of a folder of photos is kept in the run's folder, so that the next start need not list a million files.
    train_source, test_source = load_dataset(config.data, cache=out, say=observer.message if observer else None)
    return _run(config, train_source, test_source, out, resume, observer)


def train_given(
    data: Any, protocol: Protocol | None, out: Path | None, config: Config, named: Mapping[str, Any], resume: bool, watcher: Observer
) -> RunResult:
    """Run the protocol over a pair (train, test) of sources or data sets; see `der_fast.train`."""
    if not (isinstance(data, tuple) and len(data) == 2):
        raise ConfigError(f"data must be a name, a folder, or a pair (train, test), not {type(data).__name__}")
    resolved = replace_keys(resolve_config(None, protocol, base=config, **named), {"data.name": GIVEN})
    train_source = as_source(data[0], resolved.data)
    test_source = as_source(data[1], resolved.data, train_source.image_size)
    return _run(resolved, train_source, test_source, out, resume, watcher)


def _run(
    config: Config, train_source: ImageSource, test_source: ImageSource, out: Path | None, resume: bool, observer: Observer | None
) -> RunResult:
    if out is not None:
        check_out(out, resume=resume)
    with _with_tensorboard(config, out, observer) as watcher:
        learner = run_protocol(config, train_source, test_source, out, resume=resume, observer=watcher)
    if out is not None:
        write_report(out)
    return RunResult(learner.metrics(), learner, out)


@contextmanager
def _with_tensorboard(config: Config, out: Path | None, observer: Observer | None) -> Iterator[Observer]:
    """Yield the observer, joined by TensorBoard's if that is switched on."""
    if out is None or not config.runtime.tensorboard:
        yield observer or Observer()
        return
    from der_fast.report.tensorboard import TensorBoardObserver

    events = TensorBoardObserver(out / "tensorboard")
    try:
        yield Observers([observer or Observer(), events])
    finally:
        events.close()


def teach(run: Path, folder: str | Path, data: str | Path | None, overrides: Mapping[str, Any] | None, watcher: Observer) -> RunResult:
    """Teach a saved run the classes of a folder; see `der_fast.learn_run`."""
    saved, overrides = Learner.load(run), dict(overrides or {})
    if data is not None:
        overrides["data.name"] = absolute(str(data))
    config = replace_keys(saved.config, stretched(saved.config, overrides))
    refuse_others(config, overrides)
    if saved.model.memory is not None and not saved.model.memory.in_files:
        # New images are joined with the memory, so they are held in the same way.
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
        watcher.message(f"the run's own data set ({name}) cannot be read here: accuracy is measured only on the new classes")
        test: ImageSource = test_source
    else:
        known = without_empty_classes(old.source)
        names = (*known.class_names, *(name for name in test_source.class_names if name not in known.class_names))
        test = joined([known, test_source], names)
    # How much of the new folder is used says nothing about the data set that the run was trained on.
    of_run = {f"data.{key}": getattr(saved.config.data, key) for key in ("name", *_LIMITS, "reader")}
    if data is not None:
        del of_run["data.name"]
    origin = origin_of(new_data, test_source, old.notes)
    learner = learn_more(run, train_source, test, replace_keys(config, of_run), origin=origin, observer=watcher)
    write_report(run)
    return RunResult(learner.metrics(), learner, run)


def measure(run: Path, data: str | Path | None, device: str | None, observer: Observer | None) -> Evaluation:
    """Measure a saved run's accuracy; see `der_fast.evaluate_run`."""
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


def rename(run: Path, old: str, new: str, observer: Observer | None) -> RunResult:
    """Call a class of a saved run by another name; see `der_fast.rename_class`."""
    learner = rename_in_run(run, old, new, observer=observer)
    write_report(run)
    return RunResult(learner.metrics(), learner, run)


def forget(run: Path, class_names: tuple[str, ...], observer: Observer | None) -> RunResult:
    """Take classes out of a saved run; see `der_fast.forget_class`."""

    def test_images(learner: Learner) -> ImageSource | None:
        own = replace(learner.config.data, image_size=_input_side(learner))
        return held_out_images(learner, own, run).source

    learner = forget_in_run(run, class_names, test_images=test_images, observer=observer)
    write_report(run)
    return RunResult(learner.metrics(), learner, run)


def _input_side(learner: Learner) -> int:
    """The side of the network's input in pixels, to which other images must be resized."""
    assert learner.image_size is not None
    side, data = learner.image_size[0], learner.config.data
    return data.image_size or (round(side * 224 / 256) if data.random_resized_crop else side)
