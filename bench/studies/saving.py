"""What saving costs a run of short epochs: seconds that training spends on checkpoints and history, beside those of its epochs.

    python -m bench saving --epochs 60 --images 70 --json bench/results/saving.json

Two steps of digits on one thread, written to a temporary folder. Counted is what training waits for, not what the writing thread does.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import der_fast
from bench.harness.arguments import study_parser
from der_fast.machine import processor_name
from der_fast.training.storage.checkpoint import Checkpoints
from der_fast.training.storage.history import HistoryFile


def timed(spent: list[float], function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that adds its seconds to `spent`."""

    def run(*arguments: Any, **rest: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*arguments, **rest)
        finally:
            spent.append(time.perf_counter() - started)

    return run


def measure(epochs: int, images: int) -> dict[str, Any]:
    """Train, and return how long epochs and saving took."""
    spent: list[float] = []
    for owner, name in ((Checkpoints, "save"), (Checkpoints, "clear"), (HistoryFile, "epoch_ends"), (HistoryFile, "flush")):
        setattr(owner, name, timed(spent, getattr(owner, name)))
    settings = {"runtime.threads": 1, "model.width": 8, "data.train_per_class": images}
    settings |= {
        f"{stage}.{key}": value for stage in ("first", "later", "classifier") for key, value in (("epochs", epochs), ("batch_size", 50))
    }
    with tempfile.TemporaryDirectory() as folder:
        result = der_fast.train("digits", "B0-2", out=Path(folder) / "run", device="cpu", progress=False, settings=settings)
    seconds = [record.seconds for record in result.learner.records if record.seconds is not None]
    share = sum(spent) / (sum(seconds) + sum(spent))
    facts = {"processor": processor_name(), "torch": torch.__version__}
    return {"epochs": len(seconds), "epoch_seconds": statistics.median(seconds), "saving_seconds": sum(spent), "share": share, **facts}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one line, and write it to the file."""
    parser = study_parser("saving", __doc__)
    parser.add_argument("--epochs", type=int, default=60, help="of every stage")
    parser.add_argument("--images", type=int, default=70, help="per class")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    row = measure(args.epochs, args.images)
    print(f"{row['epochs']} epochs of {row['epoch_seconds']:.3f} s: saving takes {100 * row['share']:.2f} % of the time")
    if args.json:
        args.json.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
