"""The paper's benchmark within a given time: CIFAR-100 B0-10, ResNet-18, pruned to the paper's size, beside the paper's curve.

    python -m bench paper FOLDER --device cuda --seconds 300 --json bench/results/paper.jsonl
    python -m bench paper --table bench/results/paper.jsonl

FOLDER is what `data.root` takes: it holds the official archive or strips (docs/data.md). Two steps of a few epochs are run first, for their
times. All steps then have the paper's 170 epochs if these fit, else as many as do, milestones, warm-up and classifier stage in proportion.
Where later steps take longer than foreseen, theirs are fewer: the table has the number of every step. A step is written as it ends.

Where FOLDER holds a part of the classes only, they are learned in five steps, and nothing of the paper stands beside them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.harness.arguments import study_parser
from bench.harness.facts import facts_of
from bench.harness.records import read, select
from bench.harness.runner import append
from bench.reports.paper_table import curve_of, line_of, table
from der_fast.config.resolve import resolve_config
from der_fast.config.schema import Config
from der_fast.data import ImageSource, load_dataset
from der_fast.data.sets import strips
from der_fast.kernels.backend import resolve_device
from der_fast.training.learner import Learner
from der_fast.training.progress import Observer
from der_fast.training.protocol import steps_of
from der_fast.training.results import StepResult

EPOCHS, CLASSIFIER_EPOCHS = 170, 30
# Of an extractor's parameters: 4.96 M of 61.6 M on average over the steps.
PAPER_SHARE = 0.08
# Epochs of a step of the trial; with settling at 90 %, masks settle before the last.
TRIAL_EPOCHS = 4
# The classifier stage's time as a share of the representation stage's, where both are shortened alike.
CLASSIFIER_SHARE = 0.1


@dataclass
class Plan:
    """How many epochs the steps can have.

    Args:
        images: training images of every step, exemplars included.
        growth: seconds per image at step t over those at step 1.
        most: never more epochs than these.
        per_image: seconds per image and epoch at step 1.
        fixed: seconds of a step that do not depend on its epochs.
    """

    images: Sequence[int]
    growth: Callable[[int], float]
    most: int
    per_image: float = 0.0
    fixed: float = 0.0

    def epochs(self, step: int, seconds: float) -> int:
        """Return the epochs of every step from `step` (1-based) on, if they are to take `seconds` together; 0 where not even one fits."""
        left = range(step, len(self.images) + 1)
        epoch = sum(self.images[t - 1] * self.per_image * self.growth(t) for t in left) * (1 + CLASSIFIER_SHARE)
        found = (seconds - self.fixed * len(left)) / epoch
        return min(self.most, max(0, int(found)))

    def learned(self, step: int, epochs: int, epoch_seconds: float, seconds: float) -> None:
        """Take over what a step showed."""
        self.per_image = epoch_seconds / self.images[step - 1] / self.growth(step)
        self.fixed = max(0.0, seconds - epochs * epoch_seconds * (1 + CLASSIFIER_SHARE))


@dataclass
class Messages(Observer):
    """Prints what the package says."""

    said: list[str] = field(default_factory=list)

    def message(self, text: str) -> None:
        self.said.append(text)
        print(f"note: {text}", flush=True)


def config_of(args: argparse.Namespace, epochs: int, classes: Sequence[str] | None) -> Config:
    """Return the paper's recipe with this many epochs; five steps in the field's order where only some classes are there."""
    keys: dict[str, Any] = {"data.root": str(args.data), "masks.target_params": args.target_params}
    keys |= {"runtime.device": args.device, "runtime.backend": args.backend, "runtime.precision": args.precision}
    keys |= {"runtime.seed": args.seed, "model.width": args.width}
    keys |= {"data.train_per_class": args.per_class, "data.test_per_class": args.per_class and max(1, args.per_class // 5)}
    keys |= {"first.epochs": epochs, "later.epochs": epochs, "classifier.epochs": max(1, round(CLASSIFIER_EPOCHS * epochs / EPOCHS))}
    if classes is not None:
        # The paper's orders are of 100 classes.
        keys |= {"data.classes": tuple(classes), "protocol.class_order": None, "protocol.class_order_seed": 1993}
    return resolve_config("cifar100", "B0-10" if classes is None else "B0-5", preset="cifar100-b0-10", changes=keys)


def growth_of(path: Path | None, trial: float) -> Callable[[int], float]:
    """Return what an image costs at step t over step 1, on a straight line.

    Args:
        path: results whose group 'epoch' has t = 1 and another t; None, or without these: the trial's.
        trial: what it costs at step 2.
    """
    slope = max(0.0, trial - 1)
    records = select(read(path), "epoch.train", "ours") if path is not None and path.is_file() else []
    found = {int(record["params"]["t"]): float(record["ms"]) for record in records}
    if 1 in found and len(found) > 1:
        last = max(found)
        slope = max(0.0, found[last] / found[1] - 1) / (last - 1)
    return lambda t: 1 + slope * (t - 1)


class Benchmark:
    """One run of it.

    Args:
        args: of the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.ends = args, time.perf_counter() + args.seconds
        there = strips.classes_in(args.data) if strips.places_of(args.data) else None
        self.classes = None if there is None or len(there) == strips.WHOLE.classes else there
        config = config_of(args, TRIAL_EPOCHS, self.classes)
        self.train, self.test = load_dataset(config.data)
        self.steps = steps_of(self.train.class_names, config.protocol)
        new = [len(self.train.of_classes(names)) for names in self.steps]
        self.images = [count + min(config.memory.total, sum(new[:number])) for number, count in enumerate(new)]
        self.facts = facts_of(resolve_device(args.device), args.commit)

    def sources(self, number: int) -> tuple[ImageSource, ImageSource]:
        """Return what step `number` (from 0) learns and is measured on."""
        seen = [name for names in self.steps[: number + 1] for name in names]
        return self.train.of_classes(self.steps[number]), self.test.of_classes(seen)

    def planned(self) -> Plan:
        """Learn two steps for their times, and return the plan."""
        learner = Learner(config_of(self.args, TRIAL_EPOCHS, self.classes), observer=Messages())
        per_image: list[float] = []
        plan = Plan(self.images, lambda t: 1.0, self.args.epochs)
        for number in range(2):
            epoch, seconds = self._learned(learner, number)
            per_image.append(epoch / self.images[number])
            plan.learned(number + 1, TRIAL_EPOCHS, epoch, seconds)
        plan.growth = growth_of(self.args.measured, per_image[1] / per_image[0])
        plan.per_image = per_image[0]
        return plan

    def run(self) -> None:
        """Learn every step; each is written as it ends."""
        plan = self.planned()
        learner = Learner(config_of(self.args, TRIAL_EPOCHS, self.classes), observer=Messages())
        epochs = plan.most
        for number in range(len(self.steps)):
            left = self.ends - time.perf_counter()
            if left <= 0:
                print(f"no time is left for step {number + 1}")
                return
            # One is better than none, where less than one fits: whoever gave the time stops what takes longer.
            epochs = max(1, min(epochs, plan.epochs(number + 1, left)))
            print(f"step {number + 1}: {epochs} epochs, {left:.0f} s are left", flush=True)
            learner.reconfigure(config_of(self.args, epochs, self.classes))
            epoch, seconds = self._learned(learner, number)
            plan.learned(number + 1, epochs, epoch, seconds)
            self._write(learner, epochs, epoch)

    def _learned(self, learner: Learner, number: int) -> tuple[float, float]:
        """Learn a step; return the seconds of one of its epochs before the masks settle, and of all of it."""
        started, before = time.perf_counter(), len(learner.records)
        learner.learn(*self.sources(number), progress=False)
        own = [record for record in learner.records[before:] if record.stage == "representation" and record.seconds is not None]
        # Kernels are compiled, measured and captured in the first.
        unsettled = [float(record.seconds or 0) for record in own if not record.settled]
        return statistics.median(unsettled[1:] or unsettled), time.perf_counter() - started

    def _write(self, learner: Learner, epochs: int, epoch: float) -> None:
        result: StepResult = learner.results[-1]
        row: dict[str, Any] = {"step": result.step, "steps": len(self.steps), "classes": sum(map(len, self.steps[: result.step]))}
        row |= {"whole": self.classes is None, "epochs": epochs, "epoch_seconds": epoch, "seconds": result.seconds}
        row |= {"top1": result.top1, "params": result.params, "params_unpruned": result.params_unpruned}
        row |= {"width": self.args.width, "per_class": self.args.per_class, "target_params": self.args.target_params}
        row |= {"precision": self.args.precision, "seed": self.args.seed, "backend": learner.backend.name, "facts": self.facts}
        append(self.args.json, row)
        print(line_of(row, curve_of([row])), flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, or print the table of what was measured."""
    parser = study_parser("paper", __doc__)
    parser.add_argument("data", nargs="?", type=Path, help="folder that holds CIFAR-100's official archive or strips")
    parser.add_argument("--seconds", type=float, default=300.0, help="for everything")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="never more than these")
    parser.add_argument("--target-params", type=float, default=PAPER_SHARE, help="share of an extractor's parameters; default: the paper's")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--backend", default="auto", choices=["auto", "fused", "reference"])
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--seed", type=int, default=1993)
    parser.add_argument("--width", type=int, help="channels of the first stage; default: ResNet-18's 64")
    parser.add_argument("--per-class", type=int, help="at most this many training images per class, and a fifth for testing; default: all")
    parser.add_argument("--measured", type=Path, help="results whose group 'epoch' tells how an epoch's time grows with the steps")
    parser.add_argument("--json", type=Path, default=Path("paper.jsonl"))
    parser.add_argument("--commit", help="name of the commit, where this is a copy without its repository")
    parser.add_argument("--table", type=Path, help="print the table of this file and do nothing else")
    args = parser.parse_args(arguments)
    if args.table is None:
        if args.data is None:
            parser.error("give the folder of CIFAR-100, or --table FILE")
        Benchmark(args).run()
    path = args.table or args.json
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    print(table([json.loads(line) for line in lines]))
    return 0
