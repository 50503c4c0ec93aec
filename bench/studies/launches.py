"""The GPU launches of one batch of every stage, and their time in a simple model; needs no GPU and measures nothing.

    python -m bench launches --json bench/results/launches.jsonl

ResNet-18, 32 × 32 pixels, batch 128, bf16, backend 'fused', frozen bank grouped: step 1 and step 10 while masks are learned and once they
have settled (also with kept features), the classifier stage, and the choice of λ_s between batches, each with and without a parameter
target. Listed is the function that a CUDA graph captures: from the positions of resident uint8 images to updated weights. Not included, per
batch, are the copy of the positions into the graph's tensor and the mask scale; per epoch, the copy of its order to the device.

The model takes, for every launch, the longest of its bytes at 3.35 TB/s, its FLOP at the peak of its dtype, and 1.5 µs, one after another.
bench/harness/launches.py and bench/harness/aten.py describe how launches are counted and what is assumed about PyTorch's operations.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.harness.arguments import study_parser
from bench.harness.launches import Launch, launches_of, no_kernels
from bench.subjects.bodies import MOMENTS, Bodies, Moment

DEAREST = 10


def listed(bodies: Bodies, moment: Moment) -> list[Launch]:
    """Return the launches of a batch, in order."""
    with no_kernels():
        body = bodies.at(moment)
        # The first batch makes choices and moves tables to the device.
        body()
    return launches_of(body)


def row(moment: Moment, launches: Sequence[Launch]) -> dict[str, Any]:
    """Return the line for the results file: counts and modelled milliseconds, in total, by kind and by launching function."""
    return {
        "stage": moment.stage,
        "steps": moment.steps,
        "target": moment.target,
        "launches": len(launches),
        "modelled_ms": _milliseconds(launches),
        "kinds": grouped(launches, lambda launch: launch.kind),
        "origins": grouped(launches, lambda launch: launch.where),
    }


def grouped(launches: Sequence[Launch], key: Callable[[Launch], str]) -> dict[str, list[float]]:
    """Return count and modelled milliseconds of every group, the longest first."""
    groups: dict[str, list[Launch]] = {}
    for launch in launches:
        groups.setdefault(key(launch), []).append(launch)
    found = {name: [len(group), _milliseconds(group)] for name, group in sorted(groups.items())}
    return dict(sorted(found.items(), key=lambda entry: -entry[1][1]))


def _milliseconds(launches: Sequence[Launch]) -> float:
    return round(1e3 * sum(launch.seconds for launch in launches), 4)


def _each(launches: Sequence[Launch]) -> list[dict[str, Any]]:
    """Every launch, for comparison with a profiler's list."""
    return [
        {
            "name": launch.name,
            "where": launch.where,
            "shape": launch.shape,
            "bytes": round(launch.bytes),
            "flops": round(launch.flops),
            "modelled_us": round(1e6 * launch.seconds, 2),
        }
        for launch in launches
    ]


def _print_details(moment: Moment, launches: Sequence[Launch]) -> None:
    at = f"{moment.stage}, t = {moment.steps}, {'with' if moment.target else 'without'} a parameter target"
    parts: tuple[tuple[str, Callable[[Launch], str]], ...] = (
        ("by kind", lambda launch: launch.kind),
        ("by the function that launches", lambda launch: launch.where),
    )
    for what, key in parts:
        print(f"\n{at}, {what}")
        for name, (count, milliseconds) in grouped(launches, key).items():
            print(f"{name:48} {count:4.0f} {milliseconds:8.3f} ms")
    print(f"\n{at}, the {DEAREST} that take longest")
    for launch in sorted(launches, key=lambda launch: -launch.seconds)[:DEAREST]:
        shape = " × ".join(map(str, launch.shape))
        work = f"{launch.bytes / 1e6:7.1f} MB {launch.flops / 1e9:7.2f} GFLOP"
        print(f"{launch.name:24} {launch.where:32} {shape:22} {work} {1e6 * launch.seconds:6.1f} µs")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = study_parser("launches", __doc__)
    parser.add_argument("--json", type=Path, help="write a line per stage to this file")
    parser.add_argument("--each", action="store_true", help="with --json: also every launch, in order")
    parser.add_argument("--batch", type=int, default=128, help="images per batch")
    parser.add_argument("--smoke", action="store_true", help="a narrow network and small images")
    options = parser.parse_args(arguments)
    bodies, rows = Bodies(options.batch, smoke=options.smoke), []
    print(f"modelled, not measured; PyTorch {torch.__version__}\n{'stage':16} {'t':>3} {'target':>7} {'launches':>9} {'modelled':>11}")
    for moment in MOMENTS:
        launches = listed(bodies, moment)
        found = row(moment, launches)
        rows.append({**found, "each": _each(launches)} if options.each else found)
        target = "yes" if moment.target else "no"
        print(f"{moment.stage:16} {moment.steps:3} {target:>7} {len(launches):9} {found['modelled_ms']:8.3f} ms", flush=True)
        if (moment.stage, moment.steps, moment.target) == ("representation", 10, True):
            dearest = moment, launches
    _print_details(*dearest)
    if options.json:
        options.json.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in rows), encoding="utf-8")
