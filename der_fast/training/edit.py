"""Renaming and forgetting classes of a saved run: if interrupted, the folder holds the run either before or after the change."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from der_fast.config.tree import from_dict
from der_fast.data.catalogue.index import FILE as INDEX
from der_fast.data.source import ImageSource
from der_fast.errors import CheckpointError, DataError
from der_fast.files import held, remove_leftovers
from der_fast.training.events import FORGOTTEN
from der_fast.training.learner import Learner
from der_fast.training.progress import Observer
from der_fast.training.provenance import FOLDER as LEARNED
from der_fast.training.rename import check_known
from der_fast.training.run import finish_saving
from der_fast.training.storage import saved
from der_fast.training.storage.checkpoint import FOLDER, Checkpoints
from der_fast.training.storage.named_files import load_manifest


def rename_in_run(run: Path, old: str, new: str, *, observer: Observer | None = None) -> Learner:
    """Rename a class of a saved run, in its last two states, memory and metrics.

    If the process is killed, the run has the old name or the new one; calling it again finishes the rest.

    Raises:
        DataError: there is no class `old`, or the new name is empty or taken.
        CheckpointError, StorageError: the run cannot be read or written.
    """
    with _whole(run, observer) as learner:
        learner.rename(old, new)
        # The older state first: if its names differ from the newest one's, it would be deleted as another learner's.
        saved.rename_before(run, len(learner.results), {old: new})
        learner.save(run)
    return learner


def forget_in_run(
    run: Path,
    class_names: Sequence[str],
    *,
    test_images: Callable[[Learner], ImageSource | None] = lambda learner: None,
    observer: Observer | None = None,
) -> Learner:
    """Remove classes from a saved run; afterwards no file of the run holds an exemplar of them.

    Earlier states that know the classes are deleted, and so are checkpoints of a step in progress and the stored index of the data set.
    If the process is killed, the run still has the classes or no longer has them; calling it again finishes the rest.

    Args:
        run: the run's folder.
        class_names: known classes, not all of them.
        test_images: called with the unchanged learner; returns images of known classes to measure accuracy on, or None.
        observer: notified of a damaged state.

    Raises:
        DataError: no name, an unknown one, or all known classes.
        CheckpointError, StorageError: the run cannot be read or written.
    """
    with _whole(run, observer) as learner:
        _refuse_forgotten(learner, run, class_names)
        check_known(class_names, learner.class_names)
        test = test_images(learner)
        left = [] if test is None else [name for name in test.class_names if name not in class_names]
        if not left:
            learner.observer.message("no test images of the remaining classes can be read here, so accuracy is not measured again")
        learner.forget(*class_names, test=test.of_classes(left) if test is not None and left else None)
        learner.save(run)
        _sweep(run)
    return learner


def _refuse_forgotten(learner: Learner, run: Path, class_names: Sequence[str]) -> None:
    """If a killed process had already forgotten these classes, finish its clean-up and raise that they are gone."""
    before = {name for event in learner.events if event.kind == FORGOTTEN for name in event.class_names}
    gone = [name for name in class_names if name not in learner.class_names]
    if gone and before.issuperset(gone):
        _sweep(run)
        raise DataError(f"class {', '.join(map(repr, gone))} has already been forgotten; {run} no longer holds any of its data")


@contextmanager
def _whole(run: Path, observer: Observer | None) -> Iterator[Learner]:
    """Hold a run's folder and yield its learner, whose newest state must be readable: a change rewrites everything the folder keeps."""
    if not saved.saved_steps(run):
        # Nothing may be created in a folder that is not a run.
        Learner.load(run)
    with held(run):
        learner = Learner.load(run, observer=observer)
        newest = saved.saved_steps(run)[-1]
        if newest != len(learner.results):
            raise CheckpointError(
                f"the newest state in {run} (steps/{newest:02d}) is damaged, and would be lost; restore it from a copy, or delete "
                f"the folder {run / 'steps' / f'{newest:02d}'} to go back to the state before it"
            )
        # The machine that edits a run need not be the one that trains it.
        learner.config = from_dict(load_manifest(saved.step_folder(run, newest) / saved.MANIFEST)["config"])
        _remove_leftovers(run)
        finish_saving(learner, run)
        yield learner


def _remove_leftovers(run: Path) -> None:
    for folder in (run, run / FOLDER, run / "extractors", run / LEARNED, *run.glob("steps/*")):
        remove_leftovers(folder)


def _sweep(run: Path) -> None:
    """Delete everything that may still hold data of a class that the saved state no longer knows."""
    Checkpoints(run, 1).clear()
    (run / INDEX).unlink(missing_ok=True)
