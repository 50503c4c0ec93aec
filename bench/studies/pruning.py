"""How accurate pruned networks are: learned masks against unpruned networks and one-shot rivals, on CIFAR-100.

    python -m bench pruning FOLDER --out bench/results/pruning.jsonl --seeds 1 2 3
    python -m bench pruning --table bench/results/pruning.jsonl --plot docs/pictures/pruning.svg

FOLDER is what `data.root` takes: it holds the official archive or strips. Networks learn ten classes of the paper's order per step: one
step alone, or three. A row is a run; rows are appended as they finish, and those that the file has are not repeated. The study may be
started several times over the same file (or with --processes): each process takes rows that no other has begun.

Variants: `unpruned`; `default` (the configuration's own); `default_before` (what it was when this study was written); the rivals `random`,
`magnitude`, `bn_scale`, `saliency`, ranked once where the default's masks settle (bench/subjects/rankings.py); and `paper`, whose λ_s is
found by trials of the first step with the first seed and used for all seeds and steps (their rows have `trial`, and see no test image). An
experiment is a variant with further keys: `--variants default --set masks.settle=0.5 --name "settle 0.5"`. A row's `changes` are all keys
that differ from `default_before`'s.

`held_top1` is measured on the last --held training images of each class, which are not trained on: for choices. `test_top1` is measured on
the test images once, after the last step. Final results train on all images with --held 0.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from bench.harness.arguments import study_parser
from bench.harness.claims import Claims
from bench.harness.facts import commit
from bench.reports.pruning import Row, identity, plot, rows_in, table
from bench.subjects.rankings import HELD_OPEN, RANKINGS, method_name
from der_fast.config.resolve import PAPER, resolve_config
from der_fast.config.schema import Config
from der_fast.config.tree import flatten, replace_keys, to_dict
from der_fast.data import ImageSource, load_dataset
from der_fast.training.learner import Learner
from der_fast.training.protocol import class_order
from der_fast.training.results import StepResult

EPOCHS, MILESTONES, CLASSIFIER_EPOCHS = 60, (35, 50), 30
BUDGETS = ("0.24", "0.12", "1/12")
# Channels of the first stage, where they are not the backbone's own.
WIDTHS = {"resnet18": 16}
# The masks' keys when the study was written. A key that is added later gets here the value that changes nothing.
BEFORE: dict[str, Any] = {
    "masks.s_max": 100.0,
    "masks.lr": 1.0,
    "masks.init_low": 0.0,
    "masks.init_high": 2.0,
    "masks.clamp": 6.0,
    "masks.sparsity": 1.0,
    "masks.price_power": 1.5,
    "masks.settle": 0.9,
    "masks.floor": 0.0,
    "masks.multiple": 1,
    "masks.bn_images": 512,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "unpruned": {"masks.enabled": False},
    **{name: {**BEFORE, **HELD_OPEN} for name in RANKINGS},
    "paper": {**BEFORE, **PAPER},
    "default_before": BEFORE,
    "default": {},
}
# λ_s of the first trial; a trial is near enough if its share is within a quarter of the budget; most trials for one budget; a
# share that counts for no channel at all.
FIRST_SPARSITY, NEAR, TRIALS, LEAST = 3.0, 0.25, 6, 1e-3


@dataclass(frozen=True)
class Job:
    """A row to measure; the fields are those of the row that identify it, in its order."""

    data: str
    backbone: str
    width: int | None
    steps: int
    variant: str
    budget: float | None
    seed: int
    epochs: int
    held: int
    per_class: int | None
    precision: str
    changes: dict[str, Any]


@dataclass(frozen=True)
class Images:
    """What is trained on, held out, and tested; `order` has the classes in the order of their arrival."""

    train: ImageSource
    held: ImageSource | None
    test: ImageSource
    order: tuple[str, ...]


def load(config: Config, held: int, per_class: int | None) -> Images:
    """Return CIFAR-100 with the last `held` training images of every class apart; of the others at most the first `per_class` are used."""
    source, test = load_dataset(config.data)
    rank, count = torch.zeros(len(source), dtype=torch.int64), torch.bincount(source.labels)
    for label in range(len(source.class_names)):
        rows = (source.labels == label).nonzero().squeeze(1)
        rank[rows] = torch.arange(len(rows))
    last = count[source.labels] - held
    used = rank < (last if per_class is None else last.clamp(max=per_class))
    apart = source.subset((rank >= last).nonzero().squeeze(1)) if held else None
    # The paper's order is one of 100 classes.
    protocol = config.protocol if len(source.class_names) == 100 else replace(config.protocol, class_order=None)
    return Images(source.subset(used.nonzero().squeeze(1)), apart, test, class_order(source.class_names, protocol))


class Study:
    """Measures rows and appends them to a file.

    Args:
        args: of the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        keys: dict[str, Any] = {"data.root": args.data and str(args.data), "runtime.threads": args.threads, "runtime.device": args.device}
        keys |= {
            "runtime.precision": args.precision,
            "first.epochs": EPOCHS,
            "later.epochs": EPOCHS,
            "classifier.epochs": CLASSIFIER_EPOCHS,
        }
        keys |= {f"{stage}.milestones": MILESTONES for stage in ("first", "later")}
        keys |= {f"{stage}.warmup_epochs": 0 for stage in ("first", "later")}
        self.base = resolve_config("cifar100", "B0-10", preset="cifar100-b0-10", changes=keys)
        self.images = load(self.base, args.held, args.per_class)
        self.claims = Claims(args.out)

    def setup(self, backbone: str, epochs: int, seed: int) -> Config:
        """Return the configuration that all variants of a row's setup share; milestones and the classifier's epochs go with the epochs."""
        keys = {"model.backbone": backbone, "model.width": WIDTHS.get(backbone), "runtime.seed": seed}
        keys |= {"first.epochs": epochs, "later.epochs": epochs, "classifier.epochs": max(1, round(CLASSIFIER_EPOCHS * epochs / EPOCHS))}
        return resolve_config(changes=keys, base=self.base)

    def config(self, job: Job) -> Config:
        """Return a job's configuration; the ranking is in the method's name."""
        setup = replace_keys(self.setup(job.backbone, job.epochs, job.seed), BEFORE)
        return resolve_config(changes=job.changes, base=setup)

    def job(self, backbone: str, steps: int, variant: str, budget: float | None, seed: int) -> Job:
        """Return the job of a variant, with the keys that it changes."""
        args = self.args
        setup = self.setup(backbone, args.epochs, seed)
        target = {} if budget is None or variant == "paper" else {"masks.target_params": budget}
        wanted = resolve_config(changes={**VARIANTS[variant], **target, **args.set}, base=setup)
        before, now = (flatten(to_dict(config)) for config in (replace_keys(setup, BEFORE), wanted))
        changes = {key: value for key, value in now.items() if value != before[key]}
        label = args.name or variant
        return Job(
            "cifar100", backbone, WIDTHS.get(backbone), steps, label, budget, seed, args.epochs, args.held, args.per_class, args.precision,
            changes,
        )  # fmt: skip

    def jobs(self) -> Iterator[tuple[str, Job]]:
        """Yield every row that is asked for, with the variant that it is or is made from."""
        args = self.args
        for backbone in args.backbones:
            for steps in args.steps:
                for seed in args.seeds:
                    for budget in args.budgets:
                        for variant in args.variants:
                            if variant != "unpruned" or budget == args.budgets[0]:
                                yield variant, self.job(backbone, steps, variant, None if variant == "unpruned" else budget, seed)

    def run(self) -> None:
        """Measure what no other process measures and the file does not have."""
        there = [self.measured(variant, self.with_sparsity(job) if self.is_tuned(variant) else job) for variant, job in self.jobs()]
        if all(there):
            self.claims.clear()

    def is_tuned(self, variant: str) -> bool:
        """Whether λ_s is found by trials."""
        return variant == "paper" and "masks.sparsity" not in self.args.set

    def measured(self, variant: str, job: Job, *, trial: bool = False, wait: bool = False) -> bool:
        """Measure a row, unless the file has it; False if another process is at it. With `wait`, until that one has finished."""
        what = {**asdict(job), "trial": trial}
        with self.claims.claim(identity(what), wait=wait) as mine:
            if not mine:
                return False
            rows = rows_in(self.args.out)
            if not any(identity(row) == identity(what) for row in rows):
                # As long as the default has not changed, it is the same run.
                before = identity({**what, "variant": "default_before"}) if variant == "default" else None
                same = [row for row in rows if identity(row) == before]
                row = {**same[-1], **what} if same else self.result(variant, job, trial)
                self.claims.append(row)
                print(describe(row), flush=True)
            return True

    def result(self, variant: str, job: Job, trial: bool) -> Row:
        """Run a job."""
        started = time.perf_counter()
        config = replace_keys(self.config(job), {"method.name": method_name(variant if variant in RANKINGS else None)})
        if variant in RANKINGS and config.masks.settle == 0:
            raise SystemExit(f"{variant} ranks channels where masks settle, so masks.settle must be above 0")
        images, each = self.images, self.args.classes_per_step
        learner = Learner(config)
        for step in range(job.steps):
            seen = images.order[: each * (step + 1)]
            held = None if images.held is None else images.held.of_classes(seen)
            learner.learn(images.train.of_classes(seen[each * step :]), held, progress=False)
        last, full = learner.results[-1], learner.model.network.architecture.parameters()
        kept = sum(result.params_added for result in learner.results) / (job.steps * full)
        test = None if trial else learner.evaluate(images.test.of_classes(images.order[: each * job.steps])).top1
        row: Row = {**asdict(job), "trial": trial, "kept": kept, "test_top1": test, "held_top1": last.top1}
        row |= {"sparsity": config.masks.sparsity if variant == "paper" else None, "per_step": list(map(step_row, learner.results))}
        return {**row, "seconds": time.perf_counter() - started, "commit": commit()}

    def with_sparsity(self, job: Job) -> Job:
        """Return the paper's job with the λ_s whose trial, one of the first step, came nearest to the budget."""
        assert job.budget is not None
        trial = replace(job, steps=1, seed=self.args.seeds[0], budget=None)
        for _ in range(self.args.trials):
            found = self.trials(trial)
            if any(abs(kept / job.budget - 1) <= NEAR for kept in found.values()):
                break
            changes = {**trial.changes, "masks.sparsity": next_sparsity(found, job.budget)}
            self.measured("paper", replace(trial, changes=changes), trial=True, wait=True)
        found = self.trials(trial)
        nearest = min(found, key=lambda value: abs(math.log(max(found[value], LEAST) / (job.budget or 1))))
        return replace(job, changes={**job.changes, "masks.sparsity": nearest})

    def trials(self, trial: Job) -> dict[float, float]:
        """Return λ_s and the kept share of every trial of a job, whatever its seed."""

        def like(row: Row) -> str:
            return identity({**row, "trial": True, "seed": None, "changes": {**row["changes"], "masks.sparsity": None}})

        rows = [row for row in rows_in(self.args.out) if row["trial"]]
        return {row["sparsity"]: row["kept"] for row in rows if like(row) == like(asdict(trial))}


def next_sparsity(found: dict[float, float], budget: float) -> float:
    """Return the λ_s to try next: interpolated on logarithms between the nearest trials on either side of the budget, or beyond all."""
    over, under = [value for value, kept in found.items() if kept > budget], [value for value, kept in found.items() if kept <= budget]
    if not found:
        return FIRST_SPARSITY
    if not over or not under:
        return 2 * max(over) if over else min(under) / 2
    low, high = max(over), min(under)
    # Near 0 the share falls off a cliff, and a straight line says nothing: the middle then.
    shares = [math.log(max(found[value], budget / 4)) for value in (low, high)]
    part = (shares[0] - math.log(budget)) / (shares[0] - shares[1]) if shares[0] > shares[1] else 0.5
    return round(low * math.pow(high / low, min(max(part, 0.2), 0.8)), 4)


def step_row(result: StepResult) -> dict[str, Any]:
    """Return what a row says of a step."""
    names = ("step", "top1", "class_set_top1", "params_added", "kept_share", "kept", "seconds")
    found = {name: getattr(result, name) for name in names}
    return {**found, "rank_correlation": result.facts["rank_correlation"]}


def describe(row: Row) -> str:
    """Return a finished row as a line."""
    scores = ", ".join(f"{name} {row[key]:.2f} %" for name, key in (("held", "held_top1"), ("test", "test_top1")) if row[key] is not None)
    budget = "" if row["budget"] is None else f" at {row['budget']:.3f}"
    setup = f"{row['backbone']}, {row['steps']} step(s), seed {row['seed']}, {row['epochs']} epochs"
    weight = "" if row["sparsity"] is None else f" (λ_s {row['sparsity']:g}{', a trial' if row['trial'] else ''})"
    return f"{setup}: {row['variant']}{budget}{weight}: {scores}, kept {row['kept']:.3f}, {row['seconds']:.0f} s"


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options; exits with a message where they contradict each other."""
    parser = study_parser("pruning", __doc__)
    parser.add_argument("data", nargs="?", type=Path, help="folder that holds CIFAR-100's official archive or strips; default: the cache")
    parser.add_argument("--backbones", nargs="+", default=["resnet20", "resnet18"], choices=["resnet18", "resnet20", "resnet32"])
    parser.add_argument("--steps", nargs="+", type=int, default=[1, 3])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument(
        "--budgets", nargs="+", type=lambda text: float(Fraction(text)), default=[float(Fraction(text)) for text in BUDGETS]
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument(
        "--epochs", type=int, default=EPOCHS, help="of the representation stage; milestones and the classifier's go with it"
    )
    parser.add_argument("--held", type=int, default=50, help="training images of each class held out; 0: train on all")
    parser.add_argument("--per-class", type=int, help="train on at most this many images of each class")
    parser.add_argument("--classes-per-step", type=int, default=10)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="configuration keys on top of the variant's")
    parser.add_argument("--name", help="what the rows' variant is called, where --set is given")
    parser.add_argument("--trials", type=int, default=TRIALS, help="most trials of λ_s for a budget of `paper`")
    parser.add_argument("--processes", type=int, default=1, help="processes that share the rows")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("pruning.jsonl"))
    parser.add_argument("--table", type=Path, help="print the table of this file and do nothing else")
    parser.add_argument("--plot", type=Path, help="write the picture of the table's file here (.svg or .png)")
    args = parser.parse_args(arguments)
    args.set = dict(pair.split("=", 1) for pair in args.set)
    if bool(args.set) != bool(args.name) or (args.name and (len(args.variants) != 1 or args.name in VARIANTS)):
        parser.error("--set KEY=VALUE, --name LABEL (a new one) and a single one of --variants belong together")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, then print the table; or print the table of earlier measurements."""
    given = list(arguments or [])
    args = parsed(given)
    if args.table is None and args.processes > 1:
        command = [sys.executable, "-m", "bench", "pruning", *given, "--processes", "1"]
        workers = [subprocess.Popen(command) for _ in range(args.processes)]
        ended = max(worker.wait() for worker in workers)
        Claims(args.out).clear()
        return ended
    if args.table is None:
        Study(args).run()
    rows = rows_in(args.table or args.out)
    print(table(rows))
    if args.plot is not None:
        plot(rows, args.plot)
    return 0
