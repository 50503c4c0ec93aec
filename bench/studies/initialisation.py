"""How convolutions should start: variance 1 / (3 · fan-in), as PyTorch's default, or 2 / fan-out, as He et al. (2015).

    python -m bench initialisation --cifar100 FOLDER --json bench/results/initialisation.jsonl
    python -m bench initialisation --table bench/results/initialisation.jsonl

Two tasks, unpruned and pruned. `cifar100`: ten classes of CIFAR-100 (the first of the order numpy-1993) with 100 training images each, one
step, ResNet-32, 30 epochs at a learning rate of 0.1; FOLDER is what `data.root` takes. `digits`: the demo, five steps. A third start also
sets γ = 0 where a residual branch ends, as the DER authors' ResNet-18 does. With the same seed, all starts see the same batches, and
weights that differ in scale only. A row is a run; runs that the file holds already are not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from bench.harness.arguments import study_parser
from bench.harness.runner import append
from der_fast.config.resolve import resolve_config
from der_fast.config.schema import Config
from der_fast.data import load_dataset
from der_fast.model import extractor
from der_fast.model.extractor import Initialisation
from der_fast.training.protocol import class_order
from der_fast.training.run import run_protocol

STARTS = {
    "1 / (3 · fan-in)": Initialisation("in", 1 / 3),
    "2 / fan-out": Initialisation("out", 2),
    "2 / fan-out, γ = 0": Initialisation("out", 2, branches=0),
}
VARIANTS: dict[str, dict[str, Any]] = {"unpruned": {"masks.enabled": False}, "pruned": {}}
TASKS = ("cifar100", "digits")
CLASSES = 10
CIFAR100 = {
    "data.train_per_class": 100,
    "data.brightness": 0.0,
    "protocol.class_order": "numpy-1993",
    "model.backbone": "resnet32",
    "first.epochs": 30,
    "first.milestones": [15, 23],
    "first.warmup_epochs": 0,
}


def task_of(name: str, root: str | None) -> tuple[Config, Any, Any]:
    """Return configuration, training images and test images of a task."""
    if name == "digits":
        config = resolve_config("digits")
        return config, *load_dataset(config.data)
    config = resolve_config("cifar100", "B0-10", changes={**CIFAR100, "data.root": root})
    train, test = load_dataset(config.data)
    names = class_order(train.class_names, config.protocol)[:CLASSES]
    only = {"protocol.name": "B0-1", "protocol.class_order": list(names)}
    return resolve_config(changes=only, base=config), train.of_classes(names), test.of_classes(names)


def run(config: Config, train: Any, test: Any, start: str) -> dict[str, Any]:
    """Learn the task from a start; return its accuracy in percent."""
    began = time.perf_counter()
    with patch.object(extractor, "INITIALISATION", STARTS[start]):
        metrics = run_protocol(config, train, test, None).metrics()
    found = {key: metrics[key] for key in ("top1", "average_top1", "last_top1", "params_added", "versions")}
    return {**found, "seconds": time.perf_counter() - began}


def measure(args: argparse.Namespace) -> None:
    """Run what the file does not hold yet, seed by seed."""
    done = {identity(row) for row in rows_of(args.json)}
    tasks = {name: task_of(name, args.cifar100) for name in args.tasks}
    for seed in args.seeds:
        for task, variant, start in ((task, variant, start) for task in args.tasks for variant in VARIANTS for start in args.starts):
            row = {"data": task, "variant": variant, "start": start, "seed": seed}
            if identity(row) in done:
                continue
            config, train, test = tasks[task]
            keys = {**VARIANTS[variant], "runtime.seed": seed, "runtime.threads": args.threads, "runtime.precision": "fp32"}
            row.update(run(resolve_config(changes=keys, base=config), train, test, start))
            append(args.json, row)
            print(f"{task}, {variant}, {start}, seed {seed}: {row['average_top1']:.2f} %, {row['seconds']:.0f} s", flush=True)


def identity(row: dict[str, Any]) -> tuple[Any, ...]:
    """Return what distinguishes a run."""
    return tuple(row[key] for key in ("data", "variant", "start", "seed"))


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Return the runs that a file holds; none where there is no file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return mean, worst and standard deviation over seeds of average and last top-1, as Markdown."""
    head = "average top-1: mean | worst | standard deviation | last top-1: mean | worst | standard deviation"
    lines = [f"| data | variant | start | {head} | seeds |", "|---" * 10 + "|"]
    for data, variant in ((data, variant) for data in TASKS for variant in VARIANTS):
        for start in STARTS:
            chosen = [row for row in rows if identity(row)[:3] == (data, variant, start)]
            if chosen:
                cells = [cell for key in ("average_top1", "last_top1") for cell in summary([row[key] for row in chosen])]
                lines.append(f"| {' | '.join([data, variant, start, *cells])} | {len(chosen)} |")
    return "\n".join(lines)


def summary(values: Sequence[float]) -> tuple[str, str, str]:
    """Return mean, worst and standard deviation as text; no deviation of a single value."""
    deviation = f"{statistics.stdev(values):.1f}" if len(values) > 1 else "–"
    return f"{statistics.mean(values):.1f}", f"{min(values):.1f}", deviation


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, or print the table of earlier measurements."""
    parser = study_parser("initialisation", __doc__)
    parser.add_argument("--cifar100", metavar="FOLDER", help="the folder that holds CIFAR-100; default: the user's cache folder")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--starts", nargs="+", choices=list(STARTS), default=list(STARTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=Path("initialisation.jsonl"), help="file to append rows to")
    parser.add_argument("--table", type=Path, help="only print the table of this file")
    args = parser.parse_args(arguments)
    if args.table is None:
        measure(args)
    print(table(rows_of(args.table or args.json)))
