"""CIFAR-10 with all 50,000 images on a GPU: five steps of two classes, ResNet-18, pruned and unpruned, fused against reference.

    python -m bench cifar10-gpu FOLDER --device cuda --epochs 30 --out bench/results/cifar10-gpu.jsonl
    python -m bench cifar10-gpu --table bench/results/cifar10-gpu.jsonl

The recipe is the paper's for CIFAR-100 (170 epochs, × 0.1 at 110 and 130, 10 of warm-up; 30 epochs of the classifier stage), shortened in
proportion to --epochs. Backends draw the same random numbers, so their results differ only through rounding: compare the difference with
the spread over seeds.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.harness.arguments import study_parser
from bench.harness.facts import facts_of
from bench.harness.runner import append
from bench.studies.cifar10 import VARIANTS, run_variant
from der_fast.config.resolve import resolve_config
from der_fast.config.schema import Config
from der_fast.data import load_dataset
from der_fast.kernels.backend import resolve_device

PAPER = {"epochs": 170, "milestones": (110, 130), "warmup": 10, "classifier": 30, "classifier_milestone": 15}


def config_of(data: str, args: argparse.Namespace, backend: str, seed: int, variant: str) -> Config:
    """Return the paper's recipe on CIFAR-10, shortened to `args.epochs`."""

    def scaled(number: int) -> int:
        share: float = args.epochs / PAPER["epochs"]
        return round(number * share)

    keys: dict[str, Any] = {**VARIANTS[variant], "runtime.seed": seed, "runtime.backend": backend, "runtime.device": args.device}
    # The paper's orders are for 100 classes.
    keys["protocol.class_order_seed"] = 1993
    keys |= {"runtime.precision": args.precision, "data.train_per_class": args.per_class, "data.test_per_class": None}
    for stage in ("first", "later"):
        milestones = tuple(dict.fromkeys(max(1, scaled(number)) for number in PAPER["milestones"]))  # type: ignore[attr-defined]
        keys |= {f"{stage}.epochs": args.epochs, f"{stage}.milestones": milestones, f"{stage}.warmup_epochs": scaled(10)}
    classifier = max(1, scaled(30))
    keys |= {"classifier.epochs": classifier, "classifier.milestones": (max(1, classifier // 2),)}
    if args.width:
        keys["model.width"] = args.width
    return resolve_config(data, "B0-5", preset="cifar100", changes=keys)


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run every variant with every backend and seed; append a JSON line for each run."""
    rows = []
    device = resolve_device(args.device)
    for seed in args.seeds:
        for backend in args.backends:
            with tempfile.TemporaryDirectory() as folder:
                for variant in args.variants:
                    rows.append(_one(args, device, backend, seed, variant, Path(folder) / "first"))
                    append(args.out, rows[-1])
                    print(line_of(rows[-1]), flush=True)
    return rows


def _one(args: argparse.Namespace, device: torch.device, backend: str, seed: int, variant: str, first: Path) -> dict[str, Any]:
    config = config_of(args.data, args, backend, seed, variant)
    train, test = load_dataset(config.data)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    metrics = run_variant(config, train, test, first)
    wall = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated(device) / 1e6 if device.type == "cuda" else None
    images = [len(train.of_classes(names)) for names in metrics["steps"]]
    kept = ("top1", "average_top1", "last_top1", "params", "params_unpruned", "kept_share", "seconds", "latency_ms", "backend", "versions")
    row = {"variant": variant, "seed": seed, "asked_backend": backend, "precision": args.precision, "epochs": args.epochs}
    row |= {"wall_seconds": wall, "peak_mb": peak, "facts": facts_of(device, args.commit)}
    # A step's epochs over all of its seconds (including compaction, classifier stage and herding); memory images do not count.
    row["images_per_s"] = [args.epochs * count / seconds for count, seconds in zip(images, metrics["seconds"], strict=True)]
    return row | {key: metrics[key] for key in kept}


def line_of(row: dict[str, Any]) -> str:
    """Return one run as a table row."""
    share = 100 * sum(row["params"]) / sum(row["params_unpruned"])
    memory = "" if row["peak_mb"] is None else f", {row['peak_mb']:.0f} MB"
    return (
        f"| {row['variant']} | {row['asked_backend']} | {row['seed']} | {' '.join(f'{value:.1f}' for value in row['top1'])} | "
        f"{row['average_top1']:.2f} | {share:.1f} % | {' '.join(f'{value:.1f}' for value in row['seconds'])} | "
        f"{max(row['images_per_s']):.0f} images/s{memory} |"
    )


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return all runs as Markdown."""
    head = "| variant | backend | seed | top-1 per step | average | parameters of unpruned | seconds per step | speed, peak memory |"
    return "\n".join([head, "|" + "---|" * 8, *map(line_of, rows)])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, or print the table of earlier measurements."""
    parser = study_parser("cifar10-gpu", __doc__)
    parser.add_argument("data", nargs="?", help="CIFAR-10 as class folders below train/ and test/")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--backends", nargs="+", default=["auto", "reference"], choices=["auto", "fused", "reference"])
    parser.add_argument("--variants", nargs="+", default=["pruned", "unpruned"], choices=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--per-class", type=int, default=5000)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--width", type=int, help="channels of the first stage; default: ResNet-18's 64")
    parser.add_argument("--out", type=Path, default=Path("cifar10-gpu.jsonl"))
    parser.add_argument("--commit", help="name of the commit, for a copy without its repository")
    parser.add_argument("--table", type=Path, help="only print the table of this file")
    args = parser.parse_args(arguments)
    if args.table is None and args.data is None:
        parser.error("pass the folder of CIFAR-10, or --table FILE")
    rows = [json.loads(line) for line in args.table.read_text(encoding="utf-8").splitlines()] if args.table else measure(args)
    print(table(rows))
    return 0
