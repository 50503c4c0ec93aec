"""The cost of another step: images/s and peak memory against the number of steps, for der_fast and for public implementations.

    python -m bench growth --json bench/results/growth.json --rounds 5
    python -m bench growth --json FILE --steps 1,10          # the short run

The variants have the same allocator settings and threads and take turns within each round:
  eager_unpruned  one full network of torch.nn modules per step, looped, contiguous, eager (like the public implementations of DER)
  dense_single    one such network, whatever the number of steps
  ours            infer: der_fast's frozen bank of every step's compact extractor. train: a batch of the representation stage with a
                  dense extractor, soft masks and sparsity loss, before the masks settle, plus the bank of the earlier steps
  ours_settled    train only: the same after the masks have settled, when the compact network is trained
  onnx_unpruned, onnx_ours  infer only, up to ten steps: both as exported .onnx graphs, batch-norm folded, in ONNX Runtime
  onnx_blocks    the same with masks rounded to whole blocks of channels within the same parameters, as `masks.multiple=32` rounds them

Mode schedule, without a picture: a whole step of 170 epochs, of which masks are learned in 17, at t over t = 1, in time per image.
  fresh          every epoch runs the bank of earlier extractors
  views          `later.views` = 16: sixteen epochs compute a view's features first, and every epoch gathers them

A rival's training step is cross-entropy with auxiliary loss and SGD on ready float batches; der_fast's adds augmentation, metering and
the decay of weights that were cut. Masks keep the same share of every channel group, √(1/12), which is about 1/12 of the parameters
per extractor, the paper's density. Rates are medians over rounds. Peak memory is that of a separate process (VmHWM), including PyTorch,
after one batch of inference, or after twelve batches of training, when the heap has stopped growing (three for eager_unpruned, which
would take minutes). A picture and a table are written next to FILE.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from bench.harness.arguments import study_parser
from bench.harness.facts import ROOT
from bench.reports.growth_report import schedule_ratios, summary, write_picture, write_table
from bench.subjects import growth_onnx
from bench.subjects.plain import PlainFeatures
from der_fast.compaction import Arena, pack, plan
from der_fast.compaction.bank import FrozenBank
from der_fast.compaction.bank.extractor import CompactExtractor
from der_fast.compaction.rounding import round_channels
from der_fast.config.resolve import resolve_config
from der_fast.data import MemorySource, transforms_for
from der_fast.model.architecture import build_architecture
from der_fast.model.classifier import new_classifier
from der_fast.model.extractor import Extractor
from der_fast.model.layout import MaskLayout
from der_fast.training.context import Context
from der_fast.training.feed import LoadedFeed
from der_fast.training.methods.der.method import begin_step
from der_fast.training.methods.der.pruning import kept_share
from der_fast.training.methods.der.representation import RepresentationStage
from der_fast.training.model import Model, Network
from der_fast.training.results import versions
from der_fast.training.runtime import apply_runtime

SIZE, CLASSES_PER_STEP, MULTIPLE = 32, 10, 32
ONNX = ("onnx_unpruned", "onnx_ours", "onnx_blocks") if growth_onnx.available() else ()
EPOCHS, MASKED, VIEWS = 170, 17, 16
# What a schedule is made of: an epoch of one batch before and after the masks settle, with and without kept features, and a view.
PARTS = ("masked", "settled", "masked_kept", "settled_kept", "view")
MODES = {
    "train": ("eager_unpruned", "dense_single", "ours", "ours_settled"),
    "infer": ("eager_unpruned", "dense_single", "ours", *ONNX),
    "schedule": PARTS,
}
Run = Callable[[], object]


class GrowthSetup:
    """Everything that the variants are built from; extractors are made once and shared."""

    def __init__(self, args: argparse.Namespace) -> None:
        apply_runtime(resolve_config("digits").runtime)
        torch.set_num_threads(args.threads)
        torch.manual_seed(0)
        self.args = args
        self.architecture = build_architecture(args.backbone)
        self.layout = MaskLayout(self.architecture)
        self.keep = torch.zeros(self.layout.channels, dtype=torch.bool)
        for part in self.layout.by_group(self.keep).values():
            part[torch.randperm(len(part))[: max(1, round(len(part) * math.sqrt(1 / 12)))]] = True
        logits = torch.where(self.keep, 1.0, -1.0) + torch.rand(self.layout.channels)
        self.keeps = {"ours": self.keep, "blocks": round_channels(self.layout, logits, self.keep, MULTIPLE)}
        self.pixels = torch.randint(256, (args.batch, SIZE, SIZE, 3), dtype=torch.uint8)
        self.images = self.pixels.permute(0, 3, 1, 2).float().div(255).sub(0.5).contiguous()
        self._plain: list[PlainFeatures] = []
        self._compact: dict[str, list[CompactExtractor]] = {name: [] for name in self.keeps}
        self._whole: list[Arena] = []

    def plain(self, count: int) -> list[PlainFeatures]:
        """Full networks in evaluation mode, frozen."""
        while len(self._plain) < count:
            self._plain.append(PlainFeatures(self.architecture).eval().requires_grad_(False))
        return self._plain[:count]

    def compact(self, count: int, masks: str = "ours") -> list[CompactExtractor]:
        """Compact extractors, as a step leaves them."""
        there = self._compact[masks]
        while len(there) < count:
            dense = Extractor(self.architecture).initialise(torch.Generator().manual_seed(len(there)))
            there.append(CompactExtractor(pack(dense.eval(), plan(self.layout, self.keeps[masks]))))
        return there[:count]

    def whole(self, count: int) -> list[Arena]:
        """Full networks as in exports: folded, with nothing cut."""
        while len(self._whole) < count:
            self._whole.append(pack(Extractor(self.architecture).initialise(torch.Generator().manual_seed(len(self._whole))).eval()))
        return self._whole[:count]


def infer(setup: GrowthSetup, variant: str, steps: int) -> Run:
    """Return a function that classifies one batch."""
    if variant in ONNX:
        masks = variant.removeprefix("onnx_")
        arenas = setup.whole(steps) if masks == "unpruned" else [member.arena for member in setup.compact(steps, masks)]
        onnx: Run = growth_onnx.onnx_run(arenas, steps * CLASSES_PER_STEP, setup.images, setup.args.threads)
        return onnx
    if variant == "ours":
        bank = FrozenBank(setup.compact(steps))
        head = nn.Linear(bank.features, steps * CLASSES_PER_STEP)
        return torch.no_grad()(lambda: head(bank(setup.images)))
    nets = setup.plain(1 if variant == "dense_single" else steps)
    head = nn.Linear(len(nets) * setup.architecture.width(setup.architecture.features), steps * CLASSES_PER_STEP)
    return torch.no_grad()(lambda: head(torch.cat([net(setup.images) for net in nets], 1)))


def train_plain(setup: GrowthSetup, variant: str, steps: int) -> Run:
    """Return a function that trains one batch like the public implementations."""
    frozen = setup.plain(0 if variant == "dense_single" else steps - 1)
    new = copy.deepcopy(setup.plain(1)[0]).train().requires_grad_(True)
    width = setup.architecture.width(setup.architecture.features)
    head, auxiliary = nn.Linear((len(frozen) + 1) * width, steps * CLASSES_PER_STEP), nn.Linear(width, CLASSES_PER_STEP + 1)
    sgd = torch.optim.SGD([*new.parameters(), *head.parameters(), *auxiliary.parameters()], 0.03, momentum=0.9, weight_decay=5e-4)
    labels = torch.randint(steps * CLASSES_PER_STEP, (len(setup.images),))
    others = labels % (CLASSES_PER_STEP + 1)

    def step() -> None:
        with torch.no_grad():
            old = [net(setup.images) for net in frozen]
        features = new(setup.images)
        loss = F.cross_entropy(head(torch.cat([*old, features], 1)), labels) + F.cross_entropy(auxiliary(features), others)
        sgd.zero_grad()
        loss.backward()
        sgd.step()

    return step


def train_ours(setup: GrowthSetup, variant: str, steps: int) -> RepresentationStage:
    """Return the representation stage; its epoch is one batch."""
    batch = len(setup.pixels)
    keys: dict[str, Any] = {"model.backbone": setup.args.backbone, "masks.enabled": True, "masks.target_params": 1 / 12}
    keys |= {"later.views": int(variant.endswith(("kept", "view")))}
    for part in ("first", "later"):
        keys |= {f"{part}.batch_size": batch, f"{part}.epochs": 10**6, f"{part}.milestones": (), f"{part}.lr": 0.03}
    config = resolve_config("cifar10", "B0-5", preset="cifar10-5x2", changes=keys)
    context = Context(config, torch.device("cpu"), *transforms_for(config.data, (SIZE, SIZE)))
    names = [tuple(str(step * CLASSES_PER_STEP + number) for number in range(CLASSES_PER_STEP)) for step in range(steps)]
    model = Model(Network(setup.architecture, FrozenBank(setup.compact(steps - 1))), class_sets=names[:-1])
    if steps > 1:
        known = (steps - 1) * CLASSES_PER_STEP
        head = new_classifier(model.network.bank.features, known, torch.Generator().manual_seed(0))
        # The newest extractor's dense weights stay until the step is finished.
        dense = Extractor(setup.architecture).initialise(torch.Generator().manual_seed(0)).state_dict()
        model = replace(model, network=replace(model.network, head=head, dense=dense))
    state = begin_step(context, model, CLASSES_PER_STEP)
    labels = torch.randint(steps * CLASSES_PER_STEP, (batch,))
    source = MemorySource(setup.pixels, labels, [name for step in names for name in step])
    known = (steps - 1) * CLASSES_PER_STEP
    settled = "settled" in variant
    if settled:
        state.compact(setup.keep)
        state.epoch = 1
    stage = RepresentationStage(context, state, model.network.bank, source, known, config.later if steps > 1 else config.first)
    stage.settle_at = 0 if settled else 10**6
    return stage


def part_of_schedule(setup: GrowthSetup, part: str, steps: int) -> Run:
    """Return a function that trains one batch of a part of the schedule, or computes a view of it (nothing at t = 1)."""
    stage = train_ours(setup, part, steps)
    if part != "view":
        return stage.epoch
    feed = stage.feed
    assert isinstance(feed, LoadedFeed)
    kept = feed.kept
    return lambda: None if kept is None else kept.compute(kept.keys[0])


def build(setup: GrowthSetup, mode: str, variant: str, steps: int) -> Run:
    """Return the function that one measurement runs: one batch."""
    if mode == "infer":
        return infer(setup, variant, steps)
    if mode == "schedule":
        return part_of_schedule(setup, variant, steps)
    return train_ours(setup, variant, steps).epoch if variant.startswith("ours") else train_plain(setup, variant, steps)


def parameter_shares(args: argparse.Namespace) -> dict[str, float]:
    """Return the share of an extractor's parameters that each kind of masks keeps."""
    setup = GrowthSetup(args)
    return {name: kept_share(setup.layout, keep) for name, keep in setup.keeps.items()}


def cases_of(args: argparse.Namespace) -> list[tuple[int, str, str]]:
    """Return the measurements, as (steps, variant, mode)."""
    every = [(steps, name, mode) for mode in args.modes for name in MODES[mode] for steps in args.steps]
    within = [case for case in every if case[0] <= growth_onnx.MOST_STEPS or case[1] not in ONNX]
    # One dense network is the same whatever the number of steps.
    return [case for case in within if case[1] != "dense_single" or case[0] == args.steps[0]]


def measure(args: argparse.Namespace) -> dict[tuple[int, str, str], list[float]]:
    """Return the seconds of every round by (steps, variant, mode)."""
    setup = GrowthSetup(args)
    cases = {(steps, name, mode): build(setup, mode, name, steps) for steps, name, mode in cases_of(args)}
    seconds: dict[tuple[int, str, str], list[float]] = {case: [] for case in cases}
    for case, run in cases.items():
        # The unpruned networks warm up with their first copy: all copies run the same primitives.
        if case[1] != "eager_unpruned" or case[0] == args.steps[0]:
            run()
    for number in range(1, args.rounds + 1):
        for case, run in cases.items():
            started = time.perf_counter()
            run()
            seconds[case].append(time.perf_counter() - started)
        print(f"round {number} of {args.rounds}", flush=True)
    return seconds


def peak_memory(args: argparse.Namespace, case: tuple[int, str, str]) -> float:
    """Return the peak memory of a fresh process that runs some batches, in MB."""
    steps, variant, mode = case
    own = ["--probe", mode, variant, "--steps", str(steps), "--threads", str(args.threads), "--batch", str(args.batch)]
    done = subprocess.run(
        [sys.executable, "-m", "bench", "growth", *own, "--backbone", args.backbone],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=600,
        cwd=ROOT,
    )
    return float(done.stdout)


def probe(args: argparse.Namespace) -> None:
    """Run some batches and print this process's peak memory in MB."""
    mode, variant = args.probe
    run = build(GrowthSetup(args), mode, variant, args.steps[0])
    batches = 1 if mode == "infer" else 3 if variant == "eager_unpruned" else 12
    for _ in range(batches):
        run()
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    print(int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024)


def merged(
    before: dict[str, Any], modes: list[str], rows: list[dict[str, Any]], ratios: dict[str, float]
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Return rows and ratios, taking those of modes that were not run from an earlier file."""
    words = {"train": "training at", "infer": "inference at", "schedule": "whole step at"}
    old = {name: value for name, value in before["ratios"].items() if not name.startswith(tuple(words[mode] for mode in modes))}
    return [row for row in before["rows"] if row["mode"] not in modes] + rows, {**old, **ratios}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, write the files."""
    parser = study_parser("growth", __doc__)
    parser.add_argument("--backbone", default="resnet18", choices=["resnet18", "resnet20", "resnet32"])
    parser.add_argument("--steps", type=lambda text: sorted({int(part) for part in text.split(",")}), default=[1, 2, 5, 10, 20])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES), help="FILE keeps its rows of the other mode")
    parser.add_argument("--probe", nargs=2, metavar=("MODE", "VARIANT"), help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.probe:
        return probe(args)
    seconds = measure(args)
    rows: list[dict[str, Any]] = []
    for case in list(seconds):
        steps, variant, mode = case
        if mode == "schedule":
            continue
        rate, peak = args.batch / statistics.median(seconds[case]), peak_memory(args, case)
        print(f"{mode:>6} {variant:>15} {steps:3d} steps: {rate:8.1f} images/s, {peak:6.0f} MB", flush=True)
        for count in args.steps if variant == "dense_single" else [steps]:
            seconds[count, variant, mode] = seconds[case]
            rows.append({"steps": count, "variant": variant, "mode": mode, "images_per_s": rate, "peak_mb": peak})
    ratios = summary(seconds, rows) | schedule_ratios(seconds, EPOCHS, MASKED, VIEWS)
    for name, value in ratios.items():
        print(f"{name}: {value:.2f}")
    if args.json:
        facts = {"backbone": args.backbone, "image_size": SIZE, "batch": args.batch, "threads": args.threads, "rounds": args.rounds}
        facts |= {"mask_share_per_group": math.sqrt(1 / 12), "parameter_share": parameter_shares(args), "multiple": MULTIPLE}
        kept: Any = {} if set(args.modes) == set(MODES) else json.loads(args.json.read_text(encoding="utf-8"))
        rows, ratios = merged(kept, args.modes, rows, ratios) if kept else (rows, ratios)
        facts |= {"versions": versions(), "ratios": ratios, "rows": rows}
        args.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        write_table(args.json.with_suffix(".md"), rows, ratios)
        write_picture(args.json.with_suffix(".png"), rows)
