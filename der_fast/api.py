"""What a user calls: train, learn more, evaluate, rename and forget. What they do is in `runs.py`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from der_fast import runs
from der_fast.config.protocols import Protocol
from der_fast.config.resolve import resolve_config
from der_fast.config.schema import Config
from der_fast.home import expand
from der_fast.kernels.forked import fit_to_compute
from der_fast.runs import RunResult
from der_fast.training.evaluation import Evaluation
from der_fast.training.progress import Observer
from der_fast.training.runtime import refuse_rerun
from der_fast.training.watching import watched

__all__ = ["RunResult", "evaluate_run", "forget_class", "learn_run", "rename_class", "train"]


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
    backend: str | None = None,
    device: str | None = None,
    precision: str | None = None,
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
        backend, device, precision: the keys `runtime.backend`, `runtime.device` and `runtime.precision`.
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
    folder = None if out is None else expand(out)
    begun = runs.begun_with(folder) if resume and folder is not None else None
    settings = runs.with_runtime(settings, backend=backend, device=device, precision=precision)
    named: dict[str, Any] = {"preset": None if preset is None else str(preset), "paper": paper, "changes": settings, "begun": begun}
    if isinstance(data, (str, Path)):
        resolved = resolve_config(str(data), protocol, base=config or begun, **named)
        with watched(observer, progress) as watcher:
            return runs.train_run(resolved, folder, resume=resume, observer=watcher)
    with watched(observer, progress) as watcher:
        return runs.train_given(data, protocol, folder, config or begun or Config(), named, resume, watcher)


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
        return runs.teach(expand(run), folder, data, overrides, watcher)


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
    return runs.measure(expand(run), data, device, observer)


def rename_class(run: str | Path, old: str, new: str, *, observer: Observer | None = None) -> RunResult:
    """Call a class of a saved run by another name, wherever the run names it, and write its report again; no weight changes.

    Images of the run's own data set are still found under the old name. What was exported before keeps it.

    Raises:
        UserError: no class `old`, a name that is empty or that a class has already, a damaged run.
    """
    return runs.rename(expand(run), old, new, observer)


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
    return runs.forget(expand(run), class_names, observer)
