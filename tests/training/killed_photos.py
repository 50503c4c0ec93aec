"""Begins runs over photos in processes of their own and kills them with SIGKILL in given batches: `python killed_photos.py FOLDER READER`.

FOLDER/images holds the images; every run is left in FOLDER/<its place, as in PLACES>. Prints one JSON table: place → the signal.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from der_fast.config.schema import Config
from der_fast.config.tree import replace_keys
from der_fast.data import load_dataset
from der_fast.training import latency
from der_fast.training.progress import Observer
from der_fast.training.run import run_protocol
from der_fast.training.storage import checkpoint

# Three batches an epoch in step 1, four in step 2, in which one file is broken; its masks are binary from epoch 2 on.
KEYS: dict[str, Any] = {
    "protocol.name": "B0-2", "data.workers": 0, "data.image_size": 40, "data.random_resized_crop": True, "data.brightness": 0.1,
    "protocol.class_order_seed": None, "model.backbone": "resnet20", "model.width": 2, "model.stem": "small",
    "masks.floor": 0.5, "masks.settle": 0.5, "masks.bn_images": 8, "memory.total": 6,
    "runtime.device": "cpu", "runtime.threads": 1, "runtime.eval_batch_size": 4, "runtime.checkpoint_seconds": 1e-9,
    **{f"{stage}.{name}": value for stage in ("first", "later", "classifier")
       for name, value in {"epochs": 2, "milestones": (), "warmup_epochs": 0, "batch_size": 4}.items()},
}  # fmt: skip
READERS = {
    "dali": {"data.reader": "dali", "data.workers": 2},
    "pillow": {"data.reader": "pillow"},
    "resident cache": {"data.reader": "pillow", "data.cache_gib": 0.5, "data.workers": 2},
}
PLACES = {
    "first epoch": (1, "representation", 1, 3),
    "binary masks": (2, "representation", 2, 3),
    "classifier": (2, "classifier", 2, 2),
}


SAVE = checkpoint.Checkpoints.save


def save_and_wait(checkpoints: checkpoint.Checkpoints, state: Any) -> None:
    """So that it is certain what is written when the process dies."""
    SAVE(checkpoints, state)
    checkpoints.flush()


class Die(Observer):
    """Kills the process after a batch was trained and before it is written down."""

    def __init__(self, *place: Any) -> None:
        self.place = place

    def batch_ends(self, step: int, stage: str, epoch: int, epochs: int, batch: int, *rest: Any) -> None:
        if (step, stage, epoch, batch) == self.place:
            os.kill(os.getpid(), signal.SIGKILL)


def learn(folder: Path, name: str, keys: dict[str, Any], observer: Observer | None = None, *, resume: bool = False) -> None:
    """Learn the classes of FOLDER/images with changed keys; the run lies in FOLDER/<name>."""
    config = replace_keys(Config(), {**KEYS, **keys, "data.name": str(folder / "images")})
    run_protocol(config, *load_dataset(config.data), folder / name, resume=resume, observer=observer)


def main(folder: Path, reader: str) -> None:
    torch.set_num_threads(1)
    latency.REPEATS = 1
    # It is imported once by every process that trains, and takes seconds.
    torch.optim.SGD([torch.zeros(1)], lr=1.0)
    checkpoint.Checkpoints.save = save_and_wait  # type: ignore[method-assign]
    signals = {}
    for name, place in PLACES.items():
        child = os.fork()
        if child == 0:
            # A process that does not come to its place shows where it stands instead.
            faulthandler.dump_traceback_later(120, exit=True)
            learn(folder, name, READERS[reader], Die(*place))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        signals[name] = os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status)
    print(json.dumps(signals))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
