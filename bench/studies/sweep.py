"""Choose, by measurement, the mask settings that the paper does not publish.

    python -m bench sweep digits --out bench/results/sweep_digits.jsonl
    python -m bench sweep PATH/cifar10 --steps 3 --out bench/results/sweep_cifar10.jsonl

Accuracy is measured on held-out *training* images: on CIFAR-10 the first 1000 images of a class are for training and the next 2000 for
testing; the test folder is not read. Every variant is a set of configuration keys on top of the data set's preset.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.harness.arguments import study_parser
from bench.reports.cpu_table import spread
from der_fast.config.resolve import resolve_config
from der_fast.config.schema import Config
from der_fast.data import ImageSource, load_dataset
from der_fast.training.progress import EpochRecord, Observer
from der_fast.training.protocol import class_order
from der_fast.training.run import run_protocol

PAPER = {"masks.settle": 0.0, "masks.floor": 0.0, "masks.target_params": None}
VARIANTS: dict[str, dict[str, Any]] = {
    "unpruned": {"masks.enabled": False},
    "default": {},
    "paper, λ 1": PAPER,
    "paper, λ 3": {**PAPER, "masks.sparsity": 3.0},
    "paper, λ 10": {**PAPER, "masks.sparsity": 10.0},
    "narrow start": {**PAPER, "masks.sparsity": 10.0, "masks.init_low": 0.09, "masks.init_high": 0.11},
    "settle 0.5, λ 10": {**PAPER, "masks.sparsity": 10.0, "masks.settle": 0.5},
    "target, settle 0": {"masks.settle": 0.0},
    "target, settle 0.5": {"masks.settle": 0.5},
    "target, λ up to 30": {"masks.sparsity": 30.0},
    "target, λ 0": {"masks.sparsity": 0.0},
    "target, mask lr 10": {"masks.lr": 10.0},
    "target, one price": {"masks.price_power": 0.0},
    "target, price squared": {"masks.price_power": 2.0},
    "target, floor 0.4": {"masks.floor": 0.4},
    "target 0.1": {"masks.target_params": 0.1},
    "target, blocks of 8": {"masks.multiple": 8},
    "target, the draw decides": {"masks.lr": 0.0},
}


class Quiet(Observer):
    """Prints a line per step, and every epoch with --verbose."""

    def __init__(self, verbose: bool) -> None:
        self.verbose = verbose

    def epoch_ends(self, record: EpochRecord) -> None:
        if self.verbose:
            print(f"   {record}", flush=True)

    def step_ends(self, summary: dict[str, Any]) -> None:
        print(
            f"   step {summary['step']}: {summary['top1']:.2f} %, kept {summary['kept_share']:.3f}, {summary['seconds']:.0f} s", flush=True
        )


def held_out(source: ImageSource, first: int) -> tuple[ImageSource, ImageSource]:
    """Split training images: the first `first` of every class by name, and the rest."""
    rank = torch.zeros(len(source), dtype=torch.int64)
    for label in range(len(source.class_names)):
        rows = (source.labels == label).nonzero().squeeze(1)
        rank[rows] = torch.arange(len(rows))
    return source.subset((rank < first).nonzero().squeeze(1)), source.subset((rank >= first).nonzero().squeeze(1))


def load(data: str) -> tuple[Config, ImageSource, ImageSource]:
    """Return the preset's configuration and its training images, split in two."""
    if data == "digits":
        config = resolve_config("digits", "B0-5")
        source, _ = load_dataset(config.data)
        return config, *held_out(source, 110)
    config = resolve_config(data, None, preset="cifar10-5x2")
    source, _ = load_dataset(replace(config.data, train_per_class=3000, test_per_class=1))
    return config, *held_out(source, 1000)


def run(config: Config, train: ImageSource, test: ImageSource, steps: int, verbose: bool) -> dict[str, Any]:
    """Run the first `steps` steps and return the results to compare."""
    order = class_order(train.class_names, config.protocol)[: 2 * steps]
    config = replace(config, protocol=replace(config.protocol, name=f"B0-{steps}", class_order=order))
    started = time.perf_counter()
    learner = run_protocol(config, train.of_classes(order), test.of_classes(order), None, observer=Quiet(verbose))
    metrics = learner.metrics()
    return {
        "average_top1": metrics["average_top1"],
        "last_top1": metrics["last_top1"],
        "top1": metrics["top1"],
        "kept": sum(metrics["params_added"]) / (len(metrics["params"]) * learner.model.network.architecture.parameters()),
        "kept_groups": metrics["kept"][-1],
        "seconds": time.perf_counter() - started,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the mean (and spread, if there are several seeds) per variant as a Markdown table."""
    lines = ["| data | steps | variant | average top-1 | last top-1 | parameters kept | seeds |", "|---|---|---|---|---|---|---|"]
    for data, steps, name in dict.fromkeys((row["data"], row["steps"], row["variant"]) for row in rows):
        chosen = [row for row in rows if (row["data"], row["steps"], row["variant"]) == (data, steps, name)]
        cells = [spread([row[key] for row in chosen]) for key in ("average_top1", "last_top1")]
        kept = 100 * statistics.mean(row["kept"] for row in chosen)
        lines.append(f"| {data} | {steps} | {name} | {' | '.join(cells)} | {kept:.1f} % | {len(chosen)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the requested variants, one JSON line each."""
    parser = study_parser("sweep", __doc__)
    parser.add_argument("data", nargs="?", default="digits", help="'digits', or the folder of CIFAR-10's class folders")
    parser.add_argument("--table", type=Path, help="only print the table of this file")
    parser.add_argument("--steps", type=int, default=5, help="how many steps of two classes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), help="names from VARIANTS, or key=value,key=value")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--verbose", action="store_true")
    args = parser.parse_args(arguments)
    if args.table is not None:
        print(table([json.loads(line) for line in args.table.read_text().splitlines()]))
        return
    base, train, test = load(args.data)
    for name in args.variants:
        changes = VARIANTS[name] if name in VARIANTS else dict(pair.split("=", 1) for pair in name.split(","))
        for seed in args.seeds:
            print(f"{name}, seed {seed}", flush=True)
            keys = {**changes, "runtime.seed": seed, "runtime.threads": args.threads, "runtime.precision": args.precision}
            row = {"data": Path(args.data).name, "variant": name, "seed": seed, "steps": args.steps, "settings": changes}
            row.update(run(resolve_config(changes=keys, base=base), train, test, args.steps, args.verbose))
            print(f"-> {name}: average {row['average_top1']:.2f} %, kept {row['kept']:.3f}, {row['seconds']:.0f} s", flush=True)
            if args.out:
                with args.out.open("a") as handle:
                    handle.write(json.dumps(row) + "\n")
