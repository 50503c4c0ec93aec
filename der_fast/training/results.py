"""The results of every step of a run, and the metrics computed from them (docs/method.md: metrics)."""

from __future__ import annotations

import platform
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from typing import Any

import torch

from der_fast.training.figures import RunFigures, StepFigures, figure
from der_fast.training.progress import EpochRecord

_MOST_NAMED = 10


@dataclass(frozen=True, kw_only=True)
class StepResult(StepFigures[int, "float | None"]):
    """One finished step: the figures of `StepFigures`, and what is not a single number.

    Attributes:
        step: 1-based.
        class_names: the step's classes.
        confusion: counts, rows true, columns predicted; None without a test set.
        reference_top1: percent of the forward-transfer reference model on this step's classes, or None.
        facts: the method's own figures, which it declares in `Method.figures`.
    """

    step: int
    class_names: tuple[str, ...]
    confusion: list[list[int]] | None
    class_set_top1: list[float | None] = figure(
        "percent", "of the classes of each step 1 … this one; null if the test set has none of them"
    )
    kept: dict[str, list[int]] | None = figure("channels", "kept and in total, by group; null if nothing is pruned", needed=False)
    reference_top1: float | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values, with the method's own among the others."""
        row = asdict(self)
        return {**row.pop("facts"), **row}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> StepResult:
        """The inverse of `to_json`; raises KeyError or TypeError if something is missing or invalid."""
        known = {each.name for each in fields(cls)}
        values = {name: value for name, value in row.items() if name in known}
        own = {name: value for name, value in row.items() if name not in known}
        return cls(**{**values, "class_names": tuple(row["class_names"]), "facts": own})


# What metrics.json holds for every step.
LISTED = tuple(each for each in fields(StepResult) if "meaning" in each.metadata)


def backward_transfer(class_set_top1: Sequence[Sequence[float | None]], gone: Collection[int] = ()) -> float | None:
    """BWT = 1/(T−1) Σ_{i=2..T} 1/i Σ_{j=1..i} (A^i_j − A^j_j), in percent points (eq. 16); None for T = 1 or without a full test set.

    Args:
        class_set_top1: row i holds A^i_j for j = 1…i.
        gone: the steps (from 0) whose classes were all forgotten: they do not count.
    """
    kept = [step for step in range(len(class_set_top1)) if step not in gone]
    table = [[class_set_top1[i][j] for j in kept if j <= i] for i in kept]
    if len(table) < 2 or any(value is None for row in table for value in row):
        return None
    full = [[float(value) for value in row if value is not None] for row in table]
    drops = [sum(full[i][j] - full[j][j] for j in range(i + 1)) / (i + 1) for i in range(1, len(full))]
    return sum(drops) / (len(full) - 1)


def forward_transfer(own: Sequence[float | None], reference: Sequence[float | None]) -> float | None:
    """FWT = 1/(T−1) Σ_{i=2..T} (A^i_i − Ā^i_i), in percent points (eq. 17); None for T = 1 or if a value is missing.

    Args:
        own: A^i_i for i = 1…T.
        reference: Ā^i_{y_i}, for a model trained from random initialisation with cross-entropy only.
    """
    pairs = list(zip(own, reference, strict=True))[1:]
    if not pairs or any(a is None or b is None for a, b in pairs):
        return None
    return sum(float(a) - float(b) for a, b in pairs if a is not None and b is not None) / len(pairs)


def unmeasured_note(result: StepResult, class_names: Sequence[str]) -> str | None:
    """Name the known classes without test images in a step; None if there are none, or no test set."""
    if result.confusion is None:
        return None
    names = [repr(name) for name, row in zip(class_names, result.confusion, strict=True) if not sum(row)]
    shown = ", ".join(names[:_MOST_NAMED]) + (f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else "")
    return f"step {result.step}: no test images of {len(names)} of {len(class_names)} known classes: {shown}" if names else None


def mean(values: Sequence[float | int | None]) -> float | None:
    """Arithmetic mean; None if a value is missing or there are none."""
    present = [float(value) for value in values if value is not None]
    return sum(present) / len(present) if present and len(present) == len(values) else None


def metrics_of(results: Sequence[StepResult], facts: dict[str, Any], last: StepResult | None = None) -> dict[str, Any]:
    """Return what ``metrics.json`` holds.

    Args:
        results: every finished step.
        facts: facts about the whole run: protocol, dataset, name, backend, device, notes, config, events.
        last: the last measurement, if it was not after the last step.
    """
    last = last or results[-1]
    table = [result.class_set_top1 for result in results]
    run = RunFigures(
        average_top1=mean([r.top1 for r in results]),
        last_top1=last.top1,
        average_top5=mean([r.top5 for r in results]),
        bwt=backward_transfer(table, {number for number, result in enumerate(results) if not result.class_names}),
        fwt=forward_transfer([row[-1] if row else None for row in table], [r.reference_top1 for r in results]),
        average_params=mean([r.params for r in results]),
        final_params=last.params,
    )
    own = dict.fromkeys(name for result in results for name in result.facts)
    return {
        **facts,
        "class_names": [name for result in results for name in result.class_names],
        "steps": [list(result.class_names) for result in results],
        **{each.name: [getattr(result, each.name) for result in results] for each in LISTED},
        **{name: [result.facts.get(name) for result in results] for name in own},
        **asdict(run),
        "confusion": last.confusion,
        "versions": versions(),
    }


def times_of(records: Sequence[EpochRecord]) -> tuple[float | None, float | None]:
    """Return (training_seconds, data_seconds) of a step with these epochs; None if one was not measured."""
    spent, waited = [record.seconds for record in records], [record.data_seconds for record in records]
    if any(value is None for value in (*spent, *waited)):
        return None, None
    return sum(filter(None, spent)), sum(filter(None, waited))


def versions() -> dict[str, str]:
    """Versions of the software that affects the numbers."""
    names = ("der_fast", "torch", "numpy", "pillow", "safetensors", "scikit-learn")
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return {"python": platform.python_version(), **found}


def device_name(device: torch.device) -> str:
    """Name the device of a run, for reports."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
