"""The figures of a step and of a run: each is declared here, once, with its unit, its meaning and the places where it appears.

A step's result (`StepResult`), ``metrics.json``, the events in it, what a report reads, an exported file's facts and docs/metrics.md
follow from the declaration. A method declares its own figures in `Method.figures`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Generic, TypeVar

# Where a figure appears besides metrics.json: for observers when a step ends, in changes of classes, in exported files.
SUMMARY, EVENT, EXPORT = "summary", "event", "export"

Count = TypeVar("Count")
Value = TypeVar("Value")


def figure(unit: str, meaning: str, *also: str, needed: bool = True) -> Any:
    """Declare a figure.

    Args:
        unit: e.g. 'percent'.
        meaning: one line; it also says when the figure is null.
        also: any of SUMMARY, EVENT and EXPORT.
        needed: every run has it; otherwise it defaults to None, and a report does not list it as missing.
    """
    metadata = {"unit": unit, "meaning": meaning, "also": also, "needed": needed}
    return field(metadata=metadata) if needed else field(default=None, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class StepFigures(Generic[Count, Value]):
    """The numbers of a step (a count or a value each), or those of all steps."""

    top1: Value = figure("percent", "of the test images of all seen classes; null without test images", SUMMARY, EVENT, EXPORT)
    top5: Value = figure("percent", "as `top1`, with the true class among the top five", SUMMARY, EVENT, EXPORT)
    params: Count = figure("parameters", "used at inference: all extractors and the classifier", SUMMARY, EVENT, EXPORT)
    params_unpruned: Count = figure("parameters", "the same without pruning", SUMMARY)
    params_added: Count = figure("parameters", "of the step's extractor", EVENT, EXPORT)
    bytes: Count = figure("bytes", "size of the weights as deployed: batch-norm folded, float32", needed=False)
    bytes_unpruned: Count = figure("bytes", "the same without pruning", needed=False)
    latency_ms: Value = figure("milliseconds", "one image through the whole model, median", SUMMARY, EVENT)
    latency_added_ms: Value = figure("milliseconds", "one image through the step's extractor, median")
    latency_unpruned_ms: Value = figure(
        "milliseconds", "one image through the same number of unpruned extractors and a classifier, median, timed in turn with the others"
    )
    latency_added_unpruned_ms: Value = figure(
        "milliseconds", "one image through one unpruned extractor, median, timed in turn with the others", needed=False
    )
    latency_spread_ms: Value = figure("milliseconds", "half of the interquartile range of `latency_ms`'s rounds", needed=False)
    latency_added_spread_ms: Value = figure("milliseconds", "the same for `latency_added_ms`", needed=False)
    latency_added_unpruned_spread_ms: Value = figure("milliseconds", "the same for `latency_added_unpruned_ms`", needed=False)
    seconds: Value = figure(
        "seconds",
        "wall time of learning the step, without measuring it and without the reference model of forward transfer",
        SUMMARY,
        EVENT,
    )
    training_seconds: Value = figure("seconds", "wall time of the step's epochs; null if it was not measured", needed=False)
    data_seconds: Value = figure("seconds", "of these, time spent waiting for images", needed=False)
    kept_share: Value = figure(
        "share in [0, 1]", "kept parameters of the step's extractor, relative to the unpruned one", SUMMARY, EXPORT, needed=False
    )
    compaction_error: Value = figure(
        "relative", "largest difference between the trained and the compact extractor's features on a real batch", needed=False
    )
    memory_per_class: Count = figure("images", "exemplars per class after the step", EVENT)


@dataclass(frozen=True, kw_only=True)
class RunFigures:
    """The numbers of a run (docs/method.md: metrics)."""

    average_top1: float | None = figure("percent", "mean of `top1` over the steps")
    last_top1: float | None = figure("percent", "the last measurement of `top1`: after the last step or a later change of classes")
    average_top5: float | None = figure("percent", "mean of `top5` over the steps")
    bwt: float | None = figure("points", "backward transfer (eq. 16); null after one step, or without test images of every class")
    fwt: float | None = figure("points", "forward transfer (eq. 17); null without reference models (`method.fwt`)")
    average_params: float | None = figure("parameters", "mean of `params` over the steps")
    final_params: float | None = figure("parameters", "the last measurement of `params`")


def names_for(place: str) -> tuple[str, ...]:
    """Return the figures of a step that appear in a place: SUMMARY, EVENT or EXPORT."""
    return tuple(each.name for each in fields(StepFigures) if place in each.metadata["also"])
