"""The engine's overhead over a plain training loop: step 1, side by side in one process.

    python -m bench step-overhead --backbone resnet32 --rounds 5 --json bench/results/step_overhead.json

The variants take turns, each training for one epoch per round:
  plain              torch.nn modules, SGD, a plain loop over ready float batches (no augmentation), contiguous
  plain_channels_last  the same, channels-last
  ours               der_fast's representation stage, unpruned: augmentation, metering and checkpoint state included
  ours_masked        the same with channel masks, sparsity loss and a parameter target

All have the same allocator settings and threads. The results are the median images/s over rounds and the median ratio within a round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness.arguments import study_parser
from bench.subjects.plain import PlainNet
from der_fast.compaction.bank import FrozenBank
from der_fast.config.resolve import resolve_config
from der_fast.data import MemorySource, transforms_for
from der_fast.model.architecture import Architecture, build_architecture
from der_fast.training.context import Context
from der_fast.training.methods.der.method import begin_step
from der_fast.training.methods.der.representation import RepresentationStage
from der_fast.training.model import Model, Network
from der_fast.training.results import versions
from der_fast.training.runtime import apply_runtime

CLASSES = 10


def plain_epoch(net: Architecture, images: Tensor, labels: Tensor, batch: int, channels_last: bool) -> Callable[[], None]:
    """Return a function that trains the plain network for one epoch."""
    model = PlainNet(net, CLASSES)
    if channels_last:
        model, images = model.to(memory_format=torch.channels_last), images.contiguous(memory_format=torch.channels_last)  # type: ignore[call-overload]
    sgd = torch.optim.SGD(model.parameters(), 0.03, momentum=0.9, weight_decay=5e-4)

    def epoch() -> None:
        for rows in torch.randperm(len(images)).split(batch):
            loss = F.cross_entropy(model(images[rows]), labels[rows])
            sgd.zero_grad()
            loss.backward()
            sgd.step()

    return epoch


def our_epoch(net: Architecture, source: MemorySource, args: argparse.Namespace, masked: bool) -> Callable[[], None]:
    """Return a function that trains one more epoch of the representation stage."""
    keys = {
        "model.backbone": args.backbone,
        "masks.enabled": masked,
        "masks.target_params": 0.2,
        "masks.settle": 0.0,
        "first.batch_size": args.batch_size,
        "first.epochs": 10**6,
        "first.milestones": (),
        "first.lr": 0.03,
    }
    config = resolve_config("cifar10", "B0-5", preset="cifar10-5x2", changes=keys)
    train, test = transforms_for(config.data, source.image_size)
    context = Context(config, torch.device("cpu"), train, test)
    stage = RepresentationStage(context, begin_step(context, Model(Network(net)), CLASSES), FrozenBank(), source, 0, config.first)
    return stage.epoch


def measure(args: argparse.Namespace) -> list[dict[str, object]]:
    """Time every variant in turn, round by round."""
    apply_runtime(resolve_config("digits").runtime)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    net = build_architecture(args.backbone)
    labels = torch.randint(CLASSES, (args.images,))
    pixels = torch.randint(256, (args.images, 32, 32, 3), dtype=torch.uint8)
    source = MemorySource(pixels, labels, [str(i) for i in range(CLASSES)])
    floats = pixels.permute(0, 3, 1, 2).float().div(255).sub(0.5).contiguous()
    epochs = {
        "plain": plain_epoch(net, floats, labels, args.batch_size, False),
        "plain_channels_last": plain_epoch(net, floats, labels, args.batch_size, True),
        "ours": our_epoch(net, source, args, False),
        "ours_masked": our_epoch(net, source, args, True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in epochs}
    for number in range(args.rounds + 1):
        for name, epoch in epochs.items():
            started = time.perf_counter()
            epoch()
            if number:
                seconds[name].append(time.perf_counter() - started)
        print(f"round {number} of {args.rounds}", flush=True)
    return [
        {
            "variant": name,
            "images_per_s": args.images / statistics.median(times),
            "time_over_plain": statistics.median(a / b for a, b in zip(times, seconds["plain"], strict=True)),
            "time_over_plain_channels_last": statistics.median(a / b for a, b in zip(times, seconds["plain_channels_last"], strict=True)),
            "time_over_ours": statistics.median(a / b for a, b in zip(times, seconds["ours"], strict=True)),
        }
        for name, times in seconds.items()
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print a table."""
    parser = study_parser("step-overhead", __doc__)
    parser.add_argument("--backbone", default="resnet32", choices=["resnet18", "resnet20", "resnet32"])
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    rows = measure(args)
    for row in rows:
        print(
            f"{row['variant']:>20}: {row['images_per_s']:7.1f} images/s, time × {row['time_over_plain']:.3f} of plain, "
            f"× {row['time_over_plain_channels_last']:.3f} of plain channels-last, × {row['time_over_ours']:.3f} of ours"
        )
    if args.json:
        facts = {"backbone": args.backbone, "threads": args.threads, "batch_size": args.batch_size, "versions": versions(), "rows": rows}
        args.json.write_text(json.dumps(facts, indent=1) + "\n")
