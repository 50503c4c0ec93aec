"""CIFAR-10 in five steps of two classes: pruned, unpruned, without auxiliary loss, without expansion; several seeds.

    python -m bench cifar10 PATH/cifar10 --seeds 1 2 3 --out bench/results/cifar10.jsonl
    python -m bench cifar10 --table bench/results/cifar10.jsonl

The recipe is the preset cifar10-5x2; a single run is `der-fast train PATH/cifar10 --preset cifar10-5x2 --seed 1`. The three unpruned
variants share their first step (nothing is expanded yet and there is no auxiliary loss), so it is learned only once.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.harness.arguments import study_parser
from bench.reports.cpu_table import spread
from der_fast.config.resolve import resolve_config
from der_fast.config.schema import Config
from der_fast.data import ImageSource, load_dataset
from der_fast.training.learner import Learner
from der_fast.training.progress import Observer
from der_fast.training.protocol import class_order, split_steps

VARIANTS: dict[str, dict[str, Any]] = {
    "pruned": {},
    "unpruned": {"masks.enabled": False},
    "without auxiliary loss": {"masks.enabled": False, "method.aux_weight": 0.0},
    "without expansion": {"method.name": "replay"},
}


class Lines(Observer):
    """Prints a line per step."""

    def step_ends(self, summary: dict[str, Any]) -> None:
        print(
            f"   step {summary['step']}: {summary['top1']:.2f} %, kept {summary['kept_share']:.3f}, {summary['seconds']:.0f} s", flush=True
        )


def run_variant(config: Config, train: ImageSource, test: ImageSource, first: Path) -> dict[str, Any]:
    """Run one variant; the unpruned first step is read from, or written to, `first`."""
    steps = split_steps(class_order(train.class_names, config.protocol), config.protocol.name)
    learner = Learner(config, observer=Lines())
    shares = not config.masks.enabled
    if shares and (first / "metrics.json").exists():
        learner = Learner.load(first, observer=Lines())
        learner.config = config
    for number in range(len(learner.results), len(steps)):
        seen = [name for names in steps[: number + 1] for name in names]
        learner.learn(train.of_classes(steps[number]), test.of_classes(seen))
        if shares and number == 0:
            learner.save(first)
    return learner.metrics()


def measure(args: argparse.Namespace) -> None:
    """Run every variant with every seed and append a JSON line for each run."""
    base = resolve_config(args.data, None, preset="cifar10-5x2")
    train, test = load_dataset(base.data)
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            for name in args.variants:
                keys = {**VARIANTS[name], "runtime.seed": seed, "runtime.threads": args.threads, "runtime.precision": args.precision}
                config = resolve_config(changes=keys, base=base)
                print(f"{name}, seed {seed}", flush=True)
                started = time.perf_counter()
                metrics = run_variant(config, train, test, Path(folder) / "first")
                row = {"variant": name, "seed": seed, "wall_seconds": time.perf_counter() - started, "precision": args.precision}
                counts = ("params", "params_unpruned", "params_added", "average_params", "final_params")
                scores = ("top1", "average_top1", "last_top1", "bwt", "class_set_top1", "latency_ms", "seconds", "versions")
                row.update({key: metrics[key] for key in (*scores, *counts)})
                print(f"-> {name}: average {row['average_top1']:.2f} %, last {row['last_top1']:.2f} %", flush=True)
                args.out.parent.mkdir(parents=True, exist_ok=True)
                with args.out.open("a") as handle:
                    handle.write(json.dumps(row) + "\n")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return mean ± standard deviation over seeds as a Markdown table."""
    lines = ["| variant | average top-1 | last top-1 | BWT | parameters, average of unpruned | seeds |", "|---|---|---|---|---|---|"]
    for name in VARIANTS:
        chosen = [row for row in rows if row["variant"] == name]
        if not chosen:
            continue
        share = [100 * statistics.mean(row["params"]) / statistics.mean(_expanded(row)) for row in chosen]
        cells = [spread([row[key] for row in chosen]) for key in ("average_top1", "last_top1", "bwt")]
        lines.append(f"| {name} | {' | '.join(cells)} | {statistics.mean(share):.1f} % | {len(chosen)} |")
    return "\n".join(lines)


def _expanded(row: dict[str, Any]) -> list[float]:
    """Return the parameters of the unpruned network with one extractor per step, also for the variant that has only one."""
    unpruned: list[float] = row["params_unpruned"]
    return [(i + 1) * unpruned[0] for i in range(len(unpruned))] if row["variant"] == "without expansion" else unpruned


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, or print the table of earlier measurements."""
    parser = study_parser("cifar10", __doc__)
    parser.add_argument("data", nargs="?", help="the folder of CIFAR-10's class folders, with train/ and test/")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--out", type=Path, default=Path("cifar10.jsonl"))
    parser.add_argument("--table", type=Path, help="only print the table of this file")
    args = parser.parse_args(arguments)
    if args.table is None:
        if args.data is None:
            parser.error("pass the folder of CIFAR-10, or --table FILE")
        measure(args)
    rows = [json.loads(line) for line in (args.table or args.out).read_text().splitlines()]
    print(table(rows))
