"""Begins runs in processes of their own and kills them with SIGKILL at given points: `python killed.py FOLDER`.

Every scenario runs in a fork of this process, in FOLDER/<scenario>, so that PyTorch is imported only once. For learning more, the
folder must hold a saved learner already. Prints one JSON table: scenario → the signal that ended it, 0 where none did.
"""

from __future__ import annotations

import faulthandler
import json
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from der_fast import files
from der_fast.config.schema import Config
from der_fast.training import latency, learner, trained
from der_fast.training.progress import Observer
from der_fast.training.run import learn_more, run_protocol
from der_fast.training.storage import checkpoint, saved
from der_fast.training.storage import named_files as store

TINY = runpy.run_path(str(Path(__file__).with_name("conftest.py")))


CONFIG = TINY["tiny_config"]({"protocol.name": "B0-2"})
# A checkpoint after every batch.
OFTEN = TINY["tiny_config"]({"protocol.name": "B0-2", "runtime.checkpoint_seconds": 1e-9})
# Frozen extractors' features are kept for one view, and computed again where a run goes on.
KEPT_VIEWS = {"later.views": 1, "classifier.views": 1, "masks.settle": 0.0}
VIEWS = TINY["tiny_config"]({"protocol.name": "B0-2", "runtime.checkpoint_seconds": 1e-9, **KEPT_VIEWS})


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


SAVE = checkpoint.Checkpoints.save


def save_and_wait(checkpoints: checkpoint.Checkpoints, state: Any) -> None:
    """So that it is certain what is written when the process dies."""
    SAVE(checkpoints, state)
    checkpoints.flush()


def thread_is_late() -> Observer:
    """Kill the process while the thread has not begun to write the checkpoint after the classifier's first epoch."""
    checkpoint.Checkpoints.save = SAVE  # type: ignore[method-assign]
    original = checkpoint.save_record

    def late(stem: Path, *rest: Any) -> None:
        if stem.name == "002-2-classifier-0001":
            time.sleep(600)
        original(stem, *rest)

    checkpoint.save_record = late
    return DieInBatch(2, "classifier", 2)


class DieInBatch(Observer):
    """Kills the process after one batch of an epoch."""

    def __init__(self, *point: Any, batch: int = 1) -> None:
        self.point = (*point, batch)

    def batch_ends(self, step: int, stage: str, epoch: int, epochs: int, batch: int, *rest: Any) -> None:
        if (step, stage, epoch, batch) == self.point:
            die()


def before(owner: Any, name: str, wanted: Callable[..., bool], count: int = 1) -> None:
    """Kill the process instead of the `count`-th call of `owner.name` for which `wanted` holds."""
    original, calls = getattr(owner, name), []

    def replaced(*arguments: Any, **rest: Any) -> Any:
        if wanted(*arguments):
            calls.append(1)
            if len(calls) == count:
                die()
        return original(*arguments, **rest)

    setattr(owner, name, replaced)


def half_a_file(path: Path, data: bytes) -> None:
    """Write as a process does that is killed meanwhile."""
    if "model-" in path.name and "01" in path.parts:
        path.write_bytes(data[: len(data) // 2])
        die()
    path.write_bytes(data)


def ends_with(text: str) -> Callable[..., bool]:
    return lambda path, *rest: str(path).endswith(text)


def always(*arguments: Any) -> bool:
    return True


def of_step(step: int) -> Callable[..., bool]:
    return lambda own, *rest: len(own.results) == step


SCENARIOS: dict[str, Callable[[], Observer | None]] = {
    "before the first checkpoint": lambda: DieInBatch(1, "representation", 1),
    "after the first checkpoint": lambda: DieInBatch(1, "representation", 2),
    "in a settled epoch of a later step": lambda: DieInBatch(2, "representation", 2),
    "between the two files of a checkpoint": lambda: before(store, "save_manifest", ends_with("002-1-representation-0002.json")),
    "before the classifier stage": lambda: before(checkpoint, "save_record", ends_with("002-2-classifier-0000")),
    "within the classifier stage": lambda: DieInBatch(2, "classifier", 2),
    "before the thread has written anything": thread_is_late,
    "while a step is measured": lambda: before(trained, "score", always, 2),
    "in the middle of a file": lambda: setattr(files, "_store", half_a_file),
    "before a step's manifest": lambda: before(saved, "save_manifest", ends_with("02/learner.json")),
    "before old states are deleted": lambda: before(saved, "_forget_others", always, 2),
    "between a step and its metrics": lambda: before(learner.Learner, "save_results", of_step(2)),
    "before the last checkpoints are deleted": lambda: before(checkpoint.Checkpoints, "clear", always, 2),
}

WITHIN: dict[str, Callable[[], Observer | None]] = {
    "after a checkpoint within an epoch": lambda: DieInBatch(2, "representation", 2, batch=2),
    "between the two files of a checkpoint within an epoch": lambda: before(
        store, "save_manifest", ends_with("002-1-representation-0001-00000001.json")
    ),
    "before the checkpoints within an epoch are deleted": lambda: before(checkpoint, "remove_record", ends_with("-0001-00000001")),
}

WITH_VIEWS: dict[str, Callable[[], Observer | None]] = {
    "with kept features, in an epoch that only gathers them": lambda: DieInBatch(2, "representation", 2, batch=2),
    "with kept features, in the classifier stage": lambda: DieInBatch(2, "classifier", 2),
}

LEARNING: dict[str, Callable[[], Observer | None]] = {
    "learning more, in the representation stage": lambda: DieInBatch(3, "representation", 2),
    "learning more, in the classifier stage": lambda: DieInBatch(3, "classifier", 2),
    "learning more, before the manifest": lambda: before(saved, "save_manifest", ends_with("03/learner.json")),
    "learning more, in the middle of a file": lambda: before(files, "_store", lambda path, *rest: ".03-" in path.name),
    "learning more, before the metrics": lambda: before(learner.Learner, "save_results", of_step(3)),
    "learning more, not killed": lambda: None,
}


def begin(out: Path, observer: Observer | None, more: bool, config: Config) -> None:
    images = TINY["synthetic_images"]
    if more:
        learn_more(out, images("ef"), images("abcdef", 2, seed=1), config, observer=observer)
    else:
        run_protocol(config, images("abcd"), images("abcd", 2, seed=1), out, observer=observer)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    latency.REPEATS = 1
    # Convolutions are compiled when they are first met; the forks find them ready.
    run_protocol(CONFIG, TINY["synthetic_images"]("abcd"), TINY["synthetic_images"]("abcd", 2), None)
    checkpoint.Checkpoints.save = save_and_wait  # type: ignore[method-assign]
    signals = {}
    for name, arm in {**SCENARIOS, **WITHIN, **WITH_VIEWS, **LEARNING}.items():
        child = os.fork()
        if child == 0:
            # A process that does not come to its point shows where it stands instead.
            faulthandler.dump_traceback_later(60, exit=True)
            config = VIEWS if name in WITH_VIEWS else OFTEN if name in WITHIN else CONFIG
            begin(folder / name, arm(), name in LEARNING, config)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        signals[name] = os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status)
    print(json.dumps(signals))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
