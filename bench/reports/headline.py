"""The README's five rows: each result, and how it was obtained."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.reports.cpu_table import spread

HEAD = "| what | result | how it was obtained |\n|---|---|---|"
_CIFAR10 = "CIFAR-10 in 5 steps, 1000 images per class, 200 exemplars, ResNet-32"
_VARIANTS = {
    "pruned": f"{_CIFAR10}, **pruned**",
    "unpruned": "the same, unpruned",
    "without expansion": "the same, one network with the same memory",
}


def table(results: Path) -> str:
    """Return the table, from the files that exist."""
    rows: list[str] = []
    demo, cifar10, growth = (results / name for name in ("demo.json", "cifar10.jsonl", "growth.json"))
    if demo.exists():
        rows.append(_demo(json.loads(demo.read_text(encoding="utf-8"))))
    if cifar10.exists():
        rows += _cifar10([json.loads(line) for line in cifar10.read_text(encoding="utf-8").splitlines()])
    if growth.exists():
        rows.append(_growth(json.loads(growth.read_text(encoding="utf-8"))))
    return "\n".join([HEAD, *rows])


def _demo(rows: Sequence[Mapping[str, Any]]) -> str:
    average, last = (spread([row[key] for row in rows]) for key in ("average_top1", "last_top1"))
    share = f"{statistics.mean(100 * row['final_params'] / row['final_params_unpruned'] for row in rows):.1f}"
    seeds, threads = list(dict.fromkeys(row["seed"] for row in rows)), sorted({row["threads"] for row in rows})
    seconds = statistics.median(row["seconds"] for row in rows if row["threads"] == threads[0])
    command = f"python -m bench demo --seeds {' '.join(map(str, seeds))} --thread-counts {' '.join(map(str, threads))}"
    result = f"{average} % on average over the steps, {last} % after the last; {share} % of the unpruned parameters; {seconds:.0f} s"
    runs = f"{len(seeds)} seeds × {len(threads)} thread counts" if len(rows) > 1 else "one run"
    return f"| demo: handwritten digits in 5 steps, pruned | {result} | `{command}`: {runs} |"


def _cifar10(found: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = []
    for variant, what in _VARIANTS.items():
        chosen = [entry for entry in found if entry["variant"] == variant]
        if not chosen:
            continue
        average, last = (spread([entry[key] for entry in chosen]) for key in ("average_top1", "last_top1"))
        million = f"{statistics.mean(entry['final_params'] for entry in chosen) / 1e6:.2f}"
        how = (
            f"`python -m bench cifar10 FOLDER --threads 1 --precision bf16`: {len(chosen)} seeds"
            if variant == "pruned"
            else "the same command"
        )
        rows.append(f"| {what} | {average} % on average, {last} % after the last; {million} M parameters | {how} |")
    return rows


def _growth(found: Mapping[str, Any]) -> str:
    ratios, infer = found["ratios"], "inference at t = 10: "
    result = (
        f"{ratios[infer + 'ours over eager unpruned, images/s']:.0f} × the images/s of ten full networks; "
        f"training step 10 takes {ratios['training at t = 10 over t = 1: ours, time']:.2f} × the time of step 1 "
        f"(eager, unpruned: {ratios['training at t = 10 over t = 1: eager_unpruned, time']:.1f} ×)"
    )
    whole = ratios.get("whole step at t = 10 over t = 1: views, time")
    if whole is not None:
        fresh = ratios["whole step at t = 10 over t = 1: fresh, time"]
        result += f"; all 170 epochs of it {whole:.2f} × with kept features of earlier extractors, {fresh:.2f} × with fresh crops"
    how = f"`python -m bench growth`: CPU, medians of {found['rounds']} rounds, [table](bench/results/growth.md)"
    return f"| ten steps of ResNet-18 on a CPU, 1/12 of the parameters each | {result} | {how} |"
