"""The calls for users: train, learn more, evaluate, rename and forget. `runs.py` implements them."""

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
    """Learn a data set's classes step by step, with pruning, and write a run folder and a report.

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
        resume: continue the run in `out`, or start it if there is none; what neither `config`, `preset` nor `settings` gives stays as it
            was at the start. On the CPU the result equals an uninterrupted run's, bit for bit on the same kind of processor.
        observer: receives progress.
        backend, device, precision: the keys `runtime.backend`, `runtime.device` and `runtime.precision`.
        settings: single keys that override all of that, e.g. ``{"later.epochs": 20}``; milestones and warm-up move too.
        progress: whether to show progress. None: only if no observer is given and somebody is watching (a bar if standard error is a
            terminal, a line of text in a notebook). True: also elsewhere (a line a minute on standard error), and in addition to an
            observer. False: never.

    Returns:
        The metrics (percent, parameter counts, milliseconds, seconds), the learner and the folder.

    Raises:
        UserError: anything that the caller can fix; the message says what, where and how.
        KeyboardInterrupt: Ctrl-C, after the current batch was finished and, if there is a folder, saved; a second one does not wait.
            Only in the main thread, and only if Python's own handler is installed.
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

    Images of classes that the run knows join its rehearsal memory. A folder of only such images refreshes memory and classifier without
    a new extractor.

    Args:
        run: the run's folder.
        folder: class folders, with or without a train/test split, of new classes, known ones, or both.
        data: where the images of the run's own data set are now, if they were moved.
        overrides: dotted keys that override the run's configuration, e.g. ``{"later.epochs": 20}``; milestones and warm-up move too.
        observer: receives progress.
        progress: whether to show progress; see `train`.

    Accuracy is measured on the test images of the new classes and on those that the run held out from every data set it learned before.
    Images that can no longer be read are reported, also in the run's report.
    A killed process leaves the run as it was; the same call then continues from the last checkpoint.

    Raises:
        UserError: anything that the caller can fix: nothing new to learn, a folder that cannot be used, a damaged run.
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
        data: a data set name or a folder of known classes: its test images, or all if it has no train/test split, except those that the
            run was trained on. Default: the images that the run held out from every data set that it learned.
        device: where to compute.
        observer: receives messages about what is missing or left out, and about a damaged state that had to be skipped.

    Raises:
        UserError: a run or data set that cannot be read, has a class that was never learned, or no image that can be measured.
    """
    return runs.measure(expand(run), data, device, observer)


def rename_class(run: str | Path, old: str, new: str, *, observer: Observer | None = None) -> RunResult:
    """Rename a class of a saved run wherever the run names it, and write its report again; no weight changes.

    Images of the run's own data set are still found under the old name. What was exported before keeps it.

    Raises:
        UserError: no class `old`, a new name that is empty or taken, a damaged run.
    """
    return runs.rename(expand(run), old, new, observer)


def forget_class(run: str | Path, *class_names: str, observer: Observer | None = None) -> RunResult:
    """Remove classes from a saved run, with their exemplars in every file that it keeps, and write its report again.

    The other classes' weights and logits do not change. What extractors learned from the images of the removed classes stays in them.
    Accuracy is measured on the other classes' test images, if the run's own data set can still be read.

    Args:
        run: the run's folder.
        class_names: known classes, not all of them.
        observer: receives progress.

    Raises:
        UserError: no name, an unknown name, all known classes, a damaged run.
    """
    return runs.forget(expand(run), class_names, observer)
