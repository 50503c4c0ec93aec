"""What a user calls: train, learn, evaluate, report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from der_fast.config.resolve import resolve_config
from der_fast.config.schema import Config
from der_fast.config.tree import replace_keys
from der_fast.data import load_dataset
from der_fast.data.source import ImageSource
from der_fast.errors import ConfigError
from der_fast.report import write_report
from der_fast.training.evaluation import Evaluation
from der_fast.training.learner import Learner
from der_fast.training.progress import Observer, Observers
from der_fast.training.run import learn_more, old_test_images, run_protocol


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
    preset: str | None = None,
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
        preset: name of a preset; default: the one made for `data` and `protocol`, if there is one.
        paper: the paper's own schedule: no settling, no parameter target, no floor.
        resume: go on with the run in `out`.
        observer: told about progress.
        settings: single keys over all of that, e.g. ``{"later.epochs": 20}``.

    Returns:
        The metrics (percent, parameter counts, milliseconds, seconds), the learner and the folder.

    Raises:
        UserError: anything that the caller can mend; the message says what, where and how.
    """
    if isinstance(data, (str, Path)):
        resolved = resolve_config(str(data), protocol, preset=preset, paper=paper, changes=settings, base=config)
        return train_run(resolved, None if out is None else Path(out), resume=resume, observer=observer)
    if not (isinstance(data, tuple) and len(data) == 2):
        raise ConfigError(f"data must be a name, a folder, or a pair (train, test), not {type(data).__name__}")
    resolved = resolve_config(None, protocol, preset=preset, paper=paper, changes=settings, base=config or Config())
    resolved = replace_keys(resolved, {"data.name": "given as datasets"})
    sources = [_source(part, resolved) for part in data]
    return _train(resolved, sources[0], sources[1], None if out is None else Path(out), resume, observer)


def train_run(config: Config, out: Path | None, *, resume: bool = False, observer: Observer | None = None) -> RunResult:
    """Run a resolved configuration; see `train`."""
    train_source, test_source = load_dataset(config.data)
    return _train(config, train_source, test_source, out, resume, observer)


def _train(
    config: Config, train_source: ImageSource, test_source: ImageSource, out: Path | None, resume: bool, observer: Observer | None
) -> RunResult:
    watcher = observer or Observer()
    if config.runtime.tensorboard and out is not None:
        from der_fast.report.tensorboard import TensorBoardObserver

        watcher = Observers([watcher, TensorBoardObserver(out / "tensorboard")])
    learner = run_protocol(config, train_source, test_source, out, resume=resume, observer=watcher)
    if out is not None:
        write_report(out)
    return RunResult(learner.metrics(), learner, out)


def learn_run(
    run: str | Path, folder: str | Path, *, overrides: Mapping[str, Any] | None = None, observer: Observer | None = None
) -> RunResult:
    """Teach a saved run the classes of a folder, save it, and write its report anew.

    Args:
        run: the run's folder.
        folder: class folders, with or without a train/test split; every class must be new.
        overrides: dotted keys over the run's configuration, e.g. ``{"later.epochs": 20}``.
        observer: told about progress.

    Accuracy is measured on the new classes' test images and, where the run's own data set can still be read, on the old ones'.
    """
    run, watcher = Path(run), observer or Observer()
    saved = Learner.load(run)
    config = replace_keys(saved.config, overrides or {})
    assert saved.image_size is not None
    side = saved.config.data.image_size or _input_side(saved)
    new_data = replace(config.data, name=str(folder), image_size=side, train_per_class=None, test_per_class=None)
    if overrides:
        new_data = replace_keys(replace(config, data=new_data), {k: v for k, v in overrides.items() if k.startswith("data.")}).data
    train_source, test_source = load_dataset(new_data)
    old = old_test_images(saved.config, saved.class_names, load_dataset)
    if old is None:
        watcher.message(f"the run's own data set ({saved.config.data.name}) cannot be read here: accuracy is measured on the new classes only")
        test: ImageSource = test_source
    else:
        names = (*old.class_names, *(name for name in test_source.class_names if name not in old.class_names))
        test = old.relabelled(names).concatenated(test_source.relabelled(names))
    learner = learn_more(run, train_source, test, config, observer=watcher)
    write_report(run)
    return RunResult(learner.metrics(), learner, run)


def evaluate_run(run: str | Path, data: str | Path | None = None, *, device: str | None = None) -> Evaluation:
    """Measure a saved run's accuracy.

    Args:
        run: the run's folder.
        data: a data set name or a folder of known classes; default: the run's own test images.
        device: where it runs.
    """
    learner = Learner.load(run, device=device)
    wanted = learner.config.data
    if data is not None:
        wanted = replace(wanted, name=str(data), image_size=wanted.image_size or _input_side(learner))
    _, test = load_dataset(wanted)
    if data is None:
        test = test.of_classes([name for name in learner.class_names if name in test.class_names])
    return learner.evaluate(test)


def _input_side(learner: Learner) -> int:
    assert learner.image_size is not None
    side = learner.image_size[0]
    return round(side * 224 / 256) if learner.config.data.random_resized_crop else side


def _source(data: Any, config: Config) -> ImageSource:
    if hasattr(data, "batches") and hasattr(data, "class_names"):
        source: ImageSource = data
        return source
    from der_fast.data import from_dataset

    return from_dataset(data, image_size=config.data.image_size)
