"""Fifty steps' lists read in one process; prints resident memory (KiB) and threads after every step. Run by test_leak.py.

python stepping.py FOLDER READER
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import sys
import threading
from pathlib import Path

import torch

from der_fast.config.schema import DataConfig, RuntimeConfig
from der_fast.data import load_dataset, transforms_for
from der_fast.seeds import generator
from der_fast.training.runtime import apply_runtime

STEPS = 50


def resident() -> int:
    """Return this process's resident memory in KiB, after what is free was given back to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0])


def main(folder: Path, reader: str) -> None:
    """Read a new list in every step: some classes in training, all in a test, one pass that is left in its middle."""
    apply_runtime(RuntimeConfig(threads=1))
    config = DataConfig(name=str(folder), random_resized_crop=True, image_size=64, reader=reader, workers=1)
    train, test = load_dataset(config)
    transform, test_transform = transforms_for(config, train.image_size)
    memory = None
    # What the imports made is not looked through again every time.
    gc.freeze()
    for step, names in zip(range(STEPS), itertools.cycle([("ape",), ("bee", "cow"), ("cow",)]), strict=False):
        source = train.of_classes(names).relabelled(train.class_names)
        whole = source if memory is None else source.concatenated(memory)
        chance = generator(step)
        assert sum(len(batch.indices) for batch in whole.batches(None, 4, transform=transform, generator=chance, shuffle=True)) > 3
        if step % 5 == 0:
            next(iter(whole.batches(None, 4, transform=transform, generator=generator(step), shuffle=True)))
            assert sum(len(batch.indices) for batch in test.batches(None, 4, transform=test_transform)) == len(test)
        memory = source.subset(torch.arange(2))
        for thread in threading.enumerate():
            # Queues to worker processes that have ended wind up on their own time; one that does not is counted below.
            if thread.name.startswith("QueueFeederThread"):
                thread.join(10)
        print(resident(), threading.active_count(), len(list(Path("/proc/self/task").iterdir())), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
