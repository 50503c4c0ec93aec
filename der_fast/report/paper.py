"""The paper's published accuracies, for runs with the paper's protocol and data set."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from der_fast.config.datasets import paper_name
from der_fast.config.protocols import even_form
from der_fast.config.rules import CIFAR_ORDERS, IMAGENET_ORDER
from der_fast.report.record import RunRecord


@dataclass(frozen=True)
class PaperCurve:
    """Accuracy after every step, in percent, with and without pruning.

    Attributes:
        metric: "top1" or "top5", whichever the authors published for this protocol.
        class_counts: number of classes seen after every step.
        average_params_pruned, average_params_unpruned: parameters used at inference, averaged over steps; None = not printed.
        source: where the accuracies come from.
        orders: the class orders that they are averaged over, as `protocol.class_order` names them.
    """

    metric: str
    class_counts: tuple[int, ...]
    pruned: tuple[float, ...]
    unpruned: tuple[float, ...]
    average_params_pruned: int | None
    average_params_unpruned: int | None
    source: str
    orders: tuple[str, ...]


def paper_curve(dataset: str, protocol: str, class_counts: Sequence[int]) -> PaperCurve | None:
    """Return the paper's curve, or None if the paper does not have this run.

    Args:
        dataset: the data set's name, or the folder it came from (the folder's own name counts, e.g. ``/data/imagenet100``).
        protocol: e.g. ``"B0-10"``.
        class_counts: number of classes seen after every finished step; must be the paper's for the finished steps.
    """
    name = paper_name(dataset)
    for entry in _published()["curves"]:
        if entry["dataset"] == name and entry["protocol"] == protocol:
            counts = _class_counts(protocol, entry["classes"], len(entry["pruned"]))
            return _curve(entry, counts) if tuple(class_counts) == counts[: len(class_counts)] else None
    return None


def curve_beside(run: RunRecord) -> PaperCurve | None:
    """Return the paper's curve for this run; None if protocol or data differ from the paper's, or only part of the data was used."""
    data = run.config.get("data")
    if isinstance(data, Mapping) and any(data.get(key) is not None for key in ("train_per_class", "test_per_class")):
        return None
    return paper_curve(run.dataset, even_form(run.protocol), run.class_counts)


def _curve(entry: dict[str, Any], counts: tuple[int, ...]) -> PaperCurve:
    return PaperCurve(
        metric=entry["metric"],
        class_counts=counts,
        pruned=tuple(entry["pruned"]),
        unpruned=tuple(entry["unpruned"]),
        average_params_pruned=entry["average_params_pruned"],
        average_params_unpruned=entry["average_params_unpruned"],
        source=_published()["source"]["curves"],
        orders=CIFAR_ORDERS if entry["dataset"] == "cifar100" else (IMAGENET_ORDER,),
    )


def _class_counts(protocol: str, classes: int, steps: int) -> tuple[int, ...]:
    base = int(protocol[1:].partition("-")[0])
    later = steps - 1 if base else steps
    per_step = (classes - base) // later
    counts = [base + per_step * step for step in range(0 if base else 1, later + 1)]
    return tuple(counts)


@cache
def _published() -> dict[str, Any]:
    published: dict[str, Any] = json.loads(files("der_fast.report").joinpath("paper_curves.json").read_text(encoding="utf-8"))
    return published
