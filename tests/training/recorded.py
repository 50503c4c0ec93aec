"""Five small runs and what they leave, as checksums: `python recorded.py FOLDER` prints them as JSON, with --write into recorded.json.

The recorder holds a change of structure to its word: weights, memory and metrics stay bit for bit what they were. The environment
asks PyTorch's libraries for their plainest instructions, so that the bits depend as little as possible on the processor.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RECORD = Path(__file__).with_name("recorded.json")
PLAINEST = {
    "ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE", "OMP_NUM_THREADS": "1",
}  # fmt: skip
SMALL = (
    "--set",
    "data.train_per_class=12",
    "--set",
    "data.test_per_class=6",
    "--width",
    "4",
    "--epochs",
    "2",
    "--set",
    "classifier.epochs=2",
    # When this was recorded, milestones did not move with epochs that a key sets.
    "--set",
    "classifier.milestones=5",
)
DIGITS = ("digits", "--memory", "40", *SMALL)
RUNS = {
    "digits": DIGITS,
    "digits, no pruning": (*DIGITS, "--no-prune"),
    "digits, no expansion": (*DIGITS, "--no-expand"),
    "digits, upper bound": (*DIGITS, "--bound"),
}
PHOTOS = "photos from files, resumed in the middle of an epoch"
METRICS = (
    "average_top1", "average_top5", "bwt", "bytes", "class_names", "class_set_top1", "confusion", "final_params", "kept", "kept_share",
    "last_top1", "memory_per_class", "params", "params_added", "steps", "top1", "top5",
)  # fmt: skip


def kind() -> str:
    """What the bits may depend on besides the code."""
    import torch

    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    vendor = next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), platform.machine())
    return f"{vendor}, {platform.system()}, torch {torch.__version__.partition('+')[0]}"


def digest(*parts: bytes) -> str:
    whole = hashlib.sha256()
    for part in parts:
        whole.update(len(part).to_bytes(8, "little") + part)
    return whole.hexdigest()[:16]


def tensor_bytes(tensors: dict[str, Any]) -> Iterator[bytes]:
    for name, value in sorted(tensors.items()):
        yield name.encode()
        yield value.detach().cpu().contiguous().numpy().tobytes()


def facts_of(run: Path) -> dict[str, Any]:
    """Return the checksums of a finished run."""
    from der_fast.training.learner import Learner

    model = Learner.load(run, device="cpu").model
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    memory = b"" if model.memory is None else model.memory.labels.numpy().tobytes()
    # The very files, where a memory of paths is.
    exemplars = b"" if model.memory is None else model.memory.fingerprint().encode()
    return {
        "extractors": [digest(*tensor_bytes(extractor.arena.tensors())) for extractor in model.network.bank.extractors],
        "classifier": digest(*tensor_bytes(model.network.head.state_dict())),
        "dense": digest(*tensor_bytes(model.network.dense)),
        "memory": digest(memory, exemplars),
        "metrics": digest(json.dumps([metrics[name] for name in METRICS]).encode()),
    }


def train(*arguments: str) -> None:
    from der_fast.cli.main import main

    sys.argv = ["der-fast", "train", *arguments, "--set", "runtime.threads=1", "--device", "cpu"]
    try:
        main()
    except SystemExit as ended:
        if ended.code:
            raise


def photos(folder: Path) -> dict[str, Any]:
    """Stop a run over image files in the middle of an epoch of its second step, and go on with it."""
    import numpy as np
    from PIL import Image

    import der_fast
    from der_fast.training.progress import Observer

    class Stop(Observer):
        def batch_ends(self, step: int, stage: str, epoch: int, epochs: int, batch: int, *rest: Any) -> None:
            if (step, stage, epoch, batch) == (2, "representation", 2, 2):
                raise KeyboardInterrupt

    for part, count in (("train", 6), ("val", 3)):
        for number, name in enumerate("abcd"):
            (folder / "images" / part / name).mkdir(parents=True)
            for index in range(count):
                pixels = np.random.default_rng([number, index, part == "val"]).integers(0, 255, (4, 5, 3), dtype=np.uint8)
                # PNG: no decoder of JPEGs decides about a bit.
                Image.fromarray(pixels).resize((60, 50), Image.Resampling.NEAREST).save(folder / "images" / part / name / f"{index}.png")
    keys = {
        "data.reader": "pillow", "data.workers": 0, "data.image_size": 40, "data.random_resized_crop": True, "model.backbone": "resnet20",
        "model.width": 2, "model.stem": "small", "masks.floor": 0.5, "memory.total": 6, "runtime.device": "cpu", "runtime.threads": 1,
        "runtime.checkpoint_seconds": 1e-9,
        **{f"{stage}.{name}": value for stage in ("first", "later", "classifier")
           for name, value in {"epochs": 2, "milestones": (), "warmup_epochs": 0, "batch_size": 4}.items()},
    }  # fmt: skip
    given = {"data": folder / "images", "protocol": "B0-2", "out": folder / "run", "settings": keys}
    try:
        der_fast.train(**given, observer=Stop())
    except KeyboardInterrupt:
        der_fast.train(**given, resume=True)
    else:
        raise AssertionError("the run was never interrupted")
    return facts_of(folder / "run")


def all_facts(folder: Path) -> dict[str, Any]:
    """Run everything below FOLDER in this process."""
    from der_fast.compaction.bank import strategies
    from der_fast.training import latency

    latency.REPEATS = 1
    # Which executor runs frozen extractors is measured elsewhere; here it must not matter.
    strategies.Runnable.strategies = lambda self: (strategies.PLAIN,)  # type: ignore[method-assign]
    facts: dict[str, Any] = {}
    for name, arguments in RUNS.items():
        out = folder / name.replace(", ", "-").replace(" ", "-")
        train(*arguments, "--out", str(out))
        facts[name] = facts_of(out)
    return {**facts, PHOTOS: photos(folder)}


def record(folder: Path) -> dict[str, Any]:
    """Return kind and facts, from a process with the plainest instructions."""
    done = subprocess.run(
        [sys.executable, __file__, str(folder)], capture_output=True, text=True, timeout=280, env={**os.environ, **PLAINEST}, check=False
    )
    if done.returncode:
        raise AssertionError(f"ended with {done.returncode}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    if sys.argv[1:2] == ["--write"]:
        fresh = record(Path(sys.argv[2]))
        known = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
        RECORD.write_text(json.dumps({**known, fresh["kind"]: fresh["facts"]}, indent=1) + "\n", encoding="utf-8")
    else:
        print("\n" + json.dumps({"kind": kind(), "facts": all_facts(Path(sys.argv[1]))}))
