"""Learns from photos in files and sends signals to all processes of its group, again and again.

`python stopped_photos.py FOLDER READER`; the run lies in FOLDER/run. Prints the batches that were trained until the last signal.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from der_fast.stopping import Stopped, heeding
from der_fast.training import latency
from der_fast.training.progress import Observer

PHOTOS = runpy.run_path(str(Path(__file__).with_name("killed_photos.py")))
# What is sent in which batch: in the middle of epochs of both stages.
SIGNALS = ((signal.SIGTERM, 2), (signal.SIGINT, 7), (signal.SIGINT, 4), (signal.SIGTERM, 7))


class Signalling(Observer):
    """Sends the signal in a batch."""

    def __init__(self, number: int, batch: int, seen: list[Any]) -> None:
        self.number, self.left, self.seen = number, batch, seen

    def batch_ends(self, step: int, stage: str, epoch: int, epochs: int, batch: int, *rest: Any) -> None:
        self.seen.append((step, stage, epoch, batch))
        self.left -= 1
        if self.left == 0:
            # From outside, as a scheduler does it: PyTorch's workers follow their own parent without complaint.
            sender = f"import os; os.killpg({os.getpgid(0)}, {int(self.number)})"
            subprocess.run([sys.executable, "-S", "-c", sender], start_new_session=True, check=True)
            if self.number == signal.SIGTERM:
                # Workers die of it, and the batch is not over before they have.
                for child in multiprocessing.active_children():
                    child.join(30)


def main(folder: Path, reader: str) -> None:
    torch.set_num_threads(1)
    latency.REPEATS = 1
    signal.signal(signal.SIGINT, signal.default_int_handler)
    keys = {**PHOTOS["READERS"][reader], "runtime.checkpoint_seconds": 0}
    if reader == "pillow":
        keys["data.workers"] = 2
    seen: list[Any] = []
    for number, batch in SIGNALS:
        try:
            with heeding(lambda text: None, terminate=True):
                PHOTOS["learn"](folder, "run", keys, Signalling(number, batch, seen), resume=(folder / "run").exists())
        except Stopped as stopped:
            assert stopped.signal == number
        else:
            raise AssertionError(f"nothing stopped it in {seen[-1]}")
    print(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
