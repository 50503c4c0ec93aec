"""What fixed views cost in accuracy and save in time: `classifier.views` and `later.views` against fresh crops in every epoch.

    python -m bench views FOLDER --preset cifar10-5x2 --seeds 1 2 3 --json bench/results/views.jsonl
    python -m bench views --table bench/results/views.jsonl

For every seed and every V of `--later`, one run learns all steps. After each step its classifier is retrained once for every V of
`--classifier` and every one of `--heads` further seeds, on the same frozen extractors, images and balanced subset: these differ in
nothing but views and draws, so they can be compared in pairs. A row is a run; runs that the file holds already are not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.harness.arguments import study_parser
from bench.harness.runner import append
from bench.reports.cpu_table import spread
from der_fast.config.resolve import resolve_config
from der_fast.config.schema import Config
from der_fast.data import ImageSource, load_dataset, transforms_for
from der_fast.model.readout import linear_readout
from der_fast.training.classifier_stage import train_classifier
from der_fast.training.context import Context
from der_fast.training.evaluation import logits_of
from der_fast.training.learner import Learner
from der_fast.training.model import Model
from der_fast.training.protocol import steps_of
from der_fast.training.refresh import begin_refresh
from der_fast.training.rehearsal import rehearsal


def run(config: Config, train: ImageSource, test: ImageSource, classifier: Sequence[int], heads: int) -> dict[str, Any]:
    """Learn all steps; return their accuracy, and that of every retrained classifier with the seconds of its stage."""
    learner = Learner(replace(config, classifier=replace(config.classifier, views=0)))
    stages: list[dict[str, Any]] = []
    for number, names in enumerate(steps_of(train.class_names, config.protocol)):
        before = learner.model if number else None
        images = train.of_classes(names)
        seen = [name for step in steps_of(train.class_names, config.protocol)[: number + 1] for name in step]
        learner.learn(images, test.of_classes(seen))
        print(f"   step {number + 1}: {learner.results[-1].top1:.2f} %", flush=True)
        if before is not None:
            stages += [
                {"step": number + 1, **row}
                for row in retrained(learner, rehearsal(before, images), test.of_classes(seen), classifier, heads)
            ]
    metrics = learner.metrics()
    kept = ("top1", "average_top1", "last_top1", "params_added", "seconds", "versions")
    return {key: metrics[key] for key in kept} | {"classifiers": stages}


def retrained(learner: Learner, source: ImageSource, test: ImageSource, views: Sequence[int], heads: int) -> Iterator[dict[str, Any]]:
    """Yield the accuracy of the classifier, retrained with every number of views and several seeds, and its stage's seconds."""
    model = learner.model
    for head in range(heads):
        for count in views:
            config = replace(
                learner.config,
                classifier=replace(learner.config.classifier, views=count),
                runtime=replace(learner.config.runtime, seed=1000 * learner.config.runtime.seed + head),
            )
            context = Context(config, learner.device, *transforms_for(config.data, source.image_size), backend=learner.backend)
            state = begin_refresh(context, model)
            started = time.perf_counter()
            train_classifier(context, state, model.network.bank, source)
            seconds = time.perf_counter() - started
            readout = linear_readout(state.head, config.classifier.temperature)
            yield {"views": count, "head": head, "top1": accuracy(context, model, readout, test), "seconds": seconds}


def accuracy(context: Context, model: Model, readout: Any, test: ImageSource) -> float:
    """Return top-1 accuracy in percent."""
    logits, positions = logits_of(context, model.network.bank, readout, test)
    labels: Tensor = test.labels[positions]
    return 100 * float((logits.argmax(1) == labels).double().mean())


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return Markdown tables: runs by `later.views`, and retrained classifiers by `classifier.views` against 0 on the same extractors."""
    lines = ["| data | `later.views` of epochs | average top-1 | last top-1 | runs |", "|---|---|---|---|---|"]
    kinds = dict.fromkeys((row["data"], row["epochs"], row["later"]) for row in rows)
    for data, epochs, later in kinds:
        chosen = [row for row in rows if (row["data"], row["epochs"], row["later"]) == (data, epochs, later)]
        cells = [spread([row[key] for row in chosen]) for key in ("average_top1", "last_top1")]
        lines.append(f"| {data} | {later or 'fresh'} of {epochs} | {' | '.join(cells)} | {len(chosen)} |")
    lines += [
        "",
        "| data | `classifier.views` | top-1 against fresh crops, points | time against fresh crops | pairs |",
        "|---|---|---|---|---|",
    ]
    for data in dict.fromkeys(row["data"] for row in rows):
        pairs: dict[int, list[tuple[float, float]]] = {}
        for row in rows:
            if row["data"] == data:
                fresh = {(stage["step"], stage["head"]): stage for stage in row["classifiers"] if stage["views"] == 0}
                for stage in row["classifiers"]:
                    if stage["views"]:
                        other = fresh[stage["step"], stage["head"]]
                        pair = (stage["top1"] - other["top1"], stage["seconds"] / other["seconds"])
                        pairs.setdefault(stage["views"], []).append(pair)
        for views, found in sorted(pairs.items()):
            change = [points for points, _ in found]
            error = statistics.stdev(change) / len(change) ** 0.5 if len(change) > 1 else 0.0
            ratio = statistics.median(seconds for _, seconds in found)
            lines.append(f"| {data} | {views} | {statistics.mean(change):+.2f} ± {error:.2f} | {ratio:.2f}× | {len(found)} |")
    return "\n".join(lines)


def measure(args: argparse.Namespace) -> None:
    """Run what the file does not hold yet."""
    changes = dict(pair.split("=", 1) for pair in args.set)
    base = resolve_config(args.data, preset=args.preset, changes=changes)
    train, test = load_dataset(base.data)
    done = _rows(args.json)
    for seed in args.seeds:
        for later in args.later:
            name = {"data": args.name or args.preset, "later": later, "epochs": base.later.epochs, "seed": seed}
            if any(all(row[key] == value for key, value in name.items()) for row in done):
                continue
            print(f"{name}", flush=True)
            keys = {"later.views": later, "runtime.seed": seed, "runtime.threads": args.threads}
            found = run(resolve_config(changes=keys, base=base), train, test, args.classifier, args.heads)
            append(args.json, {**name, "settings": changes, "threads": args.threads, **found})


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, or print the table of earlier measurements."""
    parser = study_parser("views", __doc__)
    parser.add_argument("data", nargs="?", help="a data set: a name or a folder")
    parser.add_argument("--preset", default="cifar10-5x2")
    parser.add_argument("--name", help="what the rows call the data; default: the preset")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a configuration key")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--later", type=int, nargs="+", default=[0], help="values of later.views")
    parser.add_argument("--classifier", type=int, nargs="+", default=[0, 2, 4, 8], help="values of classifier.views; 0 must be among them")
    parser.add_argument("--heads", type=int, default=3, help="classifiers per step and number of views")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, default=Path("views.jsonl"))
    parser.add_argument("--table", type=Path, help="only print the table of this file")
    args = parser.parse_args(arguments)
    if args.table is None:
        measure(args)
    print(table(_rows(args.table or args.json)))
