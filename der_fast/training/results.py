"""What is known about a run after each step, and the metrics computed from it (docs/method.md: metrics)."""

from __future__ import annotations

import platform
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch

from der_fast.training.progress import EpochRecord

_MOST_NAMED = 10


@dataclass(frozen=True)
class StepResult:
    """One finished step.

    Attributes:
        step: 1-based.
        class_names: the classes that arrived.
        top1, top5: percent over the test images of all seen classes; None without a test set.
        class_set_top1: percent for the classes of step 1 … this one; None where the test set has none of them.
        confusion: counts, rows true, columns predicted; None without a test set.
        params: parameters used at inference (all extractors and the classifier).
        params_unpruned: the same without pruning.
        params_added: of this step's extractor.
        bytes, bytes_unpruned: size of the weights as they are deployed, batch-norm folded, float32, and the same without pruning.
        kept: channels kept and in all, by group; None without masks.
        kept_share: share of the new extractor's parameters that was kept.
        compaction_error: max relative difference between the masked and the compact extractor on a real batch.
        latency_ms: one image through the whole model, median.
        latency_added_ms: one image through this step's extractor, median.
        latency_added_unpruned_ms: one image through one unpruned extractor, median, timed in turn with the others.
        latency_spread_ms, latency_added_spread_ms, latency_added_unpruned_spread_ms: half of the range of the middle half of the rounds.
        latency_unpruned_ms: one image through as many unpruned extractors and a classifier, median, timed in turn with the others.
        saved_seconds: of the settled epochs, how much longer they would have taken on the masked network; None where there were none.
        seconds: wall time of learning the step; neither measuring it nor the forward-transfer reference model are in it.
        memory_per_class: exemplars of each class after the step.
        training_seconds: wall time of the step's epochs; None where they were not measured.
        data_seconds: of these, spent waiting for images.
        reference_top1: percent of the forward-transfer reference model on this step's classes, or None.
    """

    step: int
    class_names: tuple[str, ...]
    top1: float | None
    top5: float | None
    class_set_top1: list[float | None]
    confusion: list[list[int]] | None
    params: int
    params_unpruned: int
    params_added: int
    bytes: int
    bytes_unpruned: int
    kept: dict[str, list[int]] | None
    kept_share: float
    compaction_error: float
    latency_ms: float
    latency_added_ms: float
    latency_unpruned_ms: float
    seconds: float
    memory_per_class: int
    saved_seconds: float | None = None
    reference_top1: float | None = None
    training_seconds: float | None = None
    data_seconds: float | None = None
    latency_added_unpruned_ms: float | None = None
    latency_spread_ms: float | None = None
    latency_added_spread_ms: float | None = None
    latency_added_unpruned_spread_ms: float | None = None


def backward_transfer(class_set_top1: Sequence[Sequence[float | None]], gone: Collection[int] = ()) -> float | None:
    """BWT = 1/(T−1) Σ_{i=2..T} 1/i Σ_{j=1..i} (A^i_j − A^j_j), in percent points (eq. 16); None for T = 1 or without a full test set.

    Args:
        class_set_top1: row i holds A^i_j for j = 1…i.
        gone: the steps (from 0) all of whose classes were forgotten: they count as if they had not been.
    """
    kept = [step for step in range(len(class_set_top1)) if step not in gone]
    table = [[class_set_top1[i][j] for j in kept if j <= i] for i in kept]
    if len(table) < 2 or any(value is None for row in table for value in row):
        return None
    full = [[float(value) for value in row if value is not None] for row in table]
    drops = [sum(full[i][j] - full[j][j] for j in range(i + 1)) / (i + 1) for i in range(1, len(full))]
    return sum(drops) / (len(full) - 1)


def forward_transfer(own: Sequence[float | None], reference: Sequence[float | None]) -> float | None:
    """FWT = 1/(T−1) Σ_{i=2..T} (A^i_i − Ā^i_i), in percent points (eq. 17); None for T = 1 or where a value is missing.

    Args:
        own: A^i_i for i = 1…T.
        reference: Ā^i_{y_i}, of a model trained from random initialisation with cross-entropy only.
    """
    pairs = list(zip(own, reference, strict=True))[1:]
    if not pairs or any(a is None or b is None for a, b in pairs):
        return None
    return sum(float(a) - float(b) for a, b in pairs if a is not None and b is not None) / len(pairs)


def unmeasured_note(result: StepResult, class_names: Sequence[str]) -> str | None:
    """Name the known classes of which a step's test set had no image; None where there are none, or was no test set."""
    if result.confusion is None:
        return None
    names = [repr(name) for name, row in zip(class_names, result.confusion, strict=True) if not sum(row)]
    shown = ", ".join(names[:_MOST_NAMED]) + (f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else "")
    return f"step {result.step}: no test images of {len(names)} of {len(class_names)} known classes: {shown}" if names else None


def mean(values: Sequence[float | int | None]) -> float | None:
    """Arithmetic mean; None where a value is missing or there is none."""
    present = [float(value) for value in values if value is not None]
    return sum(present) / len(present) if present and len(present) == len(values) else None


def metrics_of(results: Sequence[StepResult], facts: dict[str, Any], last: StepResult | None = None) -> dict[str, Any]:
    """Return what ``metrics.json`` holds.

    Args:
        results: every finished step.
        facts: what is the same for the whole run: protocol, dataset, name, backend, device, notes, config, events.
        last: what was measured last, where that was not after the last step.
    """
    last = last or results[-1]
    table = [result.class_set_top1 for result in results]
    top1, top5 = [r.top1 for r in results], [r.top5 for r in results]
    return {
        **facts,
        "class_names": [name for result in results for name in result.class_names],
        "steps": [list(result.class_names) for result in results],
        "top1": top1,
        "top5": top5,
        "average_top1": mean(top1),
        "last_top1": last.top1,
        "average_top5": mean(top5),
        "bwt": backward_transfer(table, {number for number, result in enumerate(results) if not result.class_names}),
        "fwt": forward_transfer([row[-1] if row else None for row in table], [r.reference_top1 for r in results]),
        "params": [r.params for r in results],
        "params_unpruned": [r.params_unpruned for r in results],
        "params_added": [r.params_added for r in results],
        "bytes": [r.bytes for r in results],
        "bytes_unpruned": [r.bytes_unpruned for r in results],
        "average_params": mean([r.params for r in results]),
        "final_params": last.params,
        "latency_ms": [r.latency_ms for r in results],
        "latency_added_ms": [r.latency_added_ms for r in results],
        "latency_unpruned_ms": [r.latency_unpruned_ms for r in results],
        "latency_added_unpruned_ms": [r.latency_added_unpruned_ms for r in results],
        "latency_spread_ms": [r.latency_spread_ms for r in results],
        "latency_added_spread_ms": [r.latency_added_spread_ms for r in results],
        "latency_added_unpruned_spread_ms": [r.latency_added_unpruned_spread_ms for r in results],
        "seconds": [r.seconds for r in results],
        "saved_seconds": [r.saved_seconds for r in results],
        "training_seconds": [r.training_seconds for r in results],
        "data_seconds": [r.data_seconds for r in results],
        "class_set_top1": table,
        "confusion": last.confusion,
        "kept": [r.kept for r in results],
        "kept_share": [r.kept_share for r in results],
        "compaction_error": [r.compaction_error for r in results],
        "memory_per_class": [r.memory_per_class for r in results],
        "versions": versions(),
    }


def times_of(records: Sequence[EpochRecord]) -> tuple[float | None, float | None]:
    """Return (training_seconds, data_seconds) of a step with these epochs; None where one was not measured."""
    spent, waited = [record.seconds for record in records], [record.data_seconds for record in records]
    if any(value is None for value in (*spent, *waited)):
        return None, None
    return sum(filter(None, spent)), sum(filter(None, waited))


def versions() -> dict[str, str]:
    """Versions of what decides about numbers."""
    names = ("der_fast", "torch", "numpy", "pillow", "safetensors", "scikit-learn")
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return {"python": platform.python_version(), **found}


def device_name(device: torch.device) -> str:
    """Name what a run computes on, for reports."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
