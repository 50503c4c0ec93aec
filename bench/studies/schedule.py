"""The whole CIFAR-100 B0-10 schedule: ten steps of ten classes, 170 epochs each, 30 epochs of the classifier stage.

    python -m bench schedule --device cuda --json bench/results/gpu.jsonl             # few epochs per stage, then extrapolated
    python -m bench schedule --device cuda --full --json bench/results/gpu.jsonl      # every epoch
    python -m bench schedule --project bench/results/gpu.jsonl                        # from measured epochs (group 'epoch') alone

The data have CIFAR-100's shape (50,000 + 10,000 images, 32 × 32, 100 classes) and are patterns with noise: times are those of CIFAR-100,
accuracies are not. A whole run is timed, including compaction, classifier stage, herding and evaluation. Skipped epochs are extrapolated
from those that ran, separately before and after the masks settle, and the record says so.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.harness.arguments import study_parser
from bench.harness.ceilings import Ceilings
from bench.harness.facts import facts_of
from bench.harness.records import Record, read, select
from bench.harness.runner import append, line_of
from der_fast.config.resolve import resolve_config
from der_fast.config.schema import Config
from der_fast.data import MemorySource
from der_fast.kernels.backend import resolve_device
from der_fast.training.learner import Learner
from der_fast.training.progress import EpochRecord, Observer
from der_fast.training.protocol import class_order, split_steps
from der_fast.training.schedule import settled_from

STEPS, EPOCHS, CLASSIFIER_EPOCHS, SETTLE = 10, 170, 30, 0.9
FEW, FEW_CLASSIFIER = 6, 3


class Clock(Observer):
    """Records every epoch and its seconds."""

    def __init__(self) -> None:
        self.epochs: list[tuple[EpochRecord, float]] = []
        self._images = 0

    def batch_ends(self, step: int, stage: str, epoch: int, epochs: int, batch: int, batches: int, images: int) -> None:
        self._images += images

    def epoch_ends(self, record: EpochRecord) -> None:
        self.epochs.append((record, self._images / record.images_per_s))
        self._images = 0


def data(size: int, per_class: int, classes: int, seed: int) -> MemorySource:
    """Return images in which every class has its own pattern under noise."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randint(256, (classes, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(classes).repeat_interleave(per_class)
    noise = torch.randint(256, (len(labels), size, size, 3), dtype=torch.uint8, generator=generator)
    # Three parts noise: a class is learned within an epoch or two, and its masks move as on real images.
    pixels = (patterns[labels].to(torch.int16) + 3 * noise.to(torch.int16)).div(4, rounding_mode="floor").to(torch.uint8)
    return MemorySource(pixels, labels, [f"class{number:03d}" for number in range(classes)])


def config_of(epochs: int, classifier_epochs: int, device: torch.device, backend: str, changes: Mapping[str, Any]) -> Config:
    """Return the paper's configuration with these numbers of epochs; milestones move in proportion."""
    keys: dict[str, Any] = {"runtime.device": str(device), "runtime.backend": backend, "runtime.precision": "bf16"}
    # Patterns have no published order, and a small run has fewer classes.
    keys["protocol.class_order_seed"] = 1993
    for stage in ("first", "later"):
        milestones = tuple(max(1, round(epochs * milestone / EPOCHS)) for milestone in (110, 130))
        keys |= {f"{stage}.epochs": epochs, f"{stage}.milestones": tuple(dict.fromkeys(milestones))}
        keys |= {f"{stage}.warmup_epochs": round(epochs * 10 / EPOCHS)}
    keys |= {"classifier.epochs": classifier_epochs, "classifier.milestones": (max(1, classifier_epochs // 2),)}
    # With few epochs, as many before settling as after, so that both are measured.
    keys |= {"masks.settle": SETTLE if epochs == EPOCHS else 0.5}
    return resolve_config("cifar100", f"B0-{STEPS}", preset="cifar100-b0-10", changes={**keys, **changes})


def measure(config: Config, train: MemorySource, test: MemorySource, clock: Clock) -> list[float]:
    """Run every step; return the seconds of each."""
    steps = split_steps(class_order(train.class_names, config.protocol), config.protocol.name)
    learner = Learner(config, observer=clock)
    seconds = []
    for number, names in enumerate(steps):
        started = time.perf_counter()
        learner.learn(train.of_classes(names), test.of_classes([name for part in steps[: number + 1] for name in part]))
        seconds.append(time.perf_counter() - started)
    return seconds


def extrapolated(seconds: Sequence[float], epochs: Sequence[tuple[EpochRecord, float]]) -> float:
    """Return the seconds of the whole schedule: everything else once, plus the paper's number of epochs.

    Every epoch of a kind (before settling, after settling, of the classifier) counts with the median. The first one's extra time
    (compiling, measuring, capturing) counts once.
    """
    total = 0.0
    before = settled_from(EPOCHS, SETTLE)
    wanted = {("representation", False): before, ("representation", True): EPOCHS - before, ("classifier", False): CLASSIFIER_EPOCHS}
    for step, whole in enumerate(seconds, 1):
        own: dict[tuple[str, bool], list[float]] = {}
        for record, time_of in epochs:
            if record.step == step:
                own.setdefault((record.stage, record.settled), []).append(time_of)
        rest = whole - sum(sum(times) for times in own.values())
        total += rest + sum(sum(times) - len(times) * statistics.median(times) for times in own.values())
        total += sum(wanted[kind] * statistics.median(times) for kind, times in own.items())
    return total


def projected(records: Sequence[Record], variant: str) -> float | None:
    """Return the seconds of all representation stages, interpolated linearly from epochs measured at several t; None without any.

    Compaction, the classifier stage, herding and evaluation are not included, and no epoch counts as settled.
    """
    found = {
        int(record["params"]["t"]): record["ms"] * _batches(int(record["params"]["t"])) / 1e3
        for record in select(records, "epoch.train", variant)
    }
    if len(found) < 2:
        return None
    return sum(EPOCHS * _between(found, t) for t in range(1, STEPS + 1))


def _batches(t: int) -> int:
    return (5000 + (2000 if t > 1 else 0)) // 128


def _between(found: Mapping[int, float], t: int) -> float:
    known = sorted(found)
    low = max((step for step in known if step <= t), default=known[0])
    high = min((step for step in known if step >= t), default=known[-1])
    share = (t - low) / (high - low) if high > low else 0.0
    return found[low] + share * (found[high] - found[low])


def record_of(facts: Mapping[str, Any], backend: str, seconds: float, full: bool, details: Mapping[str, Any]) -> Record:
    """Return the schedule as one measurement."""
    how = "every epoch" if full else f"{details['epochs']} and {details['classifier_epochs']} epochs per stage, extrapolated"
    return {
        "kind": "result",
        "run": f"{facts['time']}-{facts['commit']}",
        "case": "schedule.b0-10",
        "params": {"epochs": "all" if full else "extrapolated"},
        "variant": "ours",
        "dtype": "bf16",
        "backend": backend,
        "note": f"{how}; data of CIFAR-100's shape",
        "status": "ok",
        "scale": "full",
        "device": facts["device"],
        "commit": facts["commit"],
        "ms": 1e3 * seconds,
        "ms_p20": 1e3 * seconds,
        "ms_p80": 1e3 * seconds,
        "samples": 1,
        "timing": "once",
        "cold": False,
        "errors": {},
        **details,
    }


def run(args: argparse.Namespace) -> Record:
    """Measure the schedule and return its record."""
    device = resolve_device(args.device)
    epochs, classifier = (EPOCHS, CLASSIFIER_EPOCHS) if args.full else (args.epochs, args.classifier_epochs)
    changes: dict[str, Any] = {"model.width": args.width} if args.width else {}
    clock, facts = Clock(), facts_of(device, args.commit)
    train, test = (data(args.size, count, 10 * STEPS, seed) for count, seed in ((args.per_class, 1), (max(args.per_class // 5, 1), 2)))
    seconds = measure(config_of(epochs, classifier, device, args.backend, changes), train, test, clock)
    whole = sum(seconds) if args.full else extrapolated(seconds, clock.epochs)
    details = {"epochs": epochs, "classifier_epochs": classifier, "wall_seconds": sum(seconds), "step_seconds": seconds}
    details |= {"epoch_seconds": [[record.step, record.stage, record.settled, time_of] for record, time_of in clock.epochs]}
    record = record_of(facts, args.backend, whole, args.full, details)
    if args.json:
        header = {"kind": "run", "run": record["run"], "scale": "full", "backend": args.backend, "interpreted": False, "facts": facts}
        append(args.json, {**header, "ceilings": Ceilings(0.0, {}).as_dict()})
        append(args.json, record)
    return record


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, or project from measured epochs."""
    parser = study_parser("schedule", __doc__)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--backend", default="auto", choices=["auto", "fused", "reference"])
    parser.add_argument("--full", action="store_true", help="all 170 and 30 epochs")
    parser.add_argument("--epochs", type=int, default=FEW)
    parser.add_argument("--classifier-epochs", type=int, default=FEW_CLASSIFIER)
    parser.add_argument("--size", type=int, default=32, help="side of the images; with another side it is not CIFAR-100")
    parser.add_argument("--per-class", type=int, default=500, help="training images per class; with another number it is not CIFAR-100")
    parser.add_argument("--width", type=int, help="channels of the first stage; default: ResNet-18's 64")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--commit", help="name of the commit, for a copy without its repository")
    parser.add_argument("--project", type=Path, nargs="+", metavar="FILE", help="project from these results instead of measuring")
    args = parser.parse_args(arguments)
    if args.project:
        records = [record for path in args.project for record in read(path)]
        for variant in ("eager_bf16", "eager_ready", "ours"):
            seconds = projected(records, variant)
            said = "needs measured epochs at two or more steps" if seconds is None else f"{seconds / 60:.1f} min of training, projected"
            print(f"{variant}: {said}")
        return 0
    record = run(args)
    print(line_of(record))
    print(f"{record['ms'] / 6e4:.1f} min for the schedule ({record['note']}); it ran for {record['wall_seconds']:.0f} s")
    return 0
