"""The project's performance goals on one H100, and what a results file says about each.

A goal is either met, missed or not measured. A ratio is computed within one run on one device, never across files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bench.harness.records import Record, latest

Found = list[tuple[str, float]]


@dataclass(frozen=True)
class Goal:
    """A performance goal.

    Attributes:
        text: what is measured.
        wanted: at least this (`most`: at most).
        unit: '×' or '%'.
        measure: returns (where, value), one pair for every case that must meet the goal.
        most: whether smaller is better.
    """

    text: str
    wanted: float
    unit: str
    measure: Callable[[Sequence[Record]], Found]
    most: bool = False

    def met(self, value: float) -> bool:
        """Return whether a value meets the goal."""
        return value <= self.wanted if self.most else value >= self.wanted


def _value(records: Sequence[Record], case: str, variant: str, key: str = "ms", **params: Any) -> list[tuple[Record, float]]:
    wanted = {name: str(value) for name, value in params.items()}
    return [
        (record, float(record[key]))
        for record in latest(records).values()
        if record["case"] == case
        and record["variant"] == variant
        and key in record
        and all(str(record["params"].get(name)) == value for name, value in wanted.items())
    ]


def _where(record: Record) -> str:
    return ", ".join(f"{name} {value}" for name, value in record["params"].items())


def _shares(key: str, case: str, **params: Any) -> Callable[[Sequence[Record]], Found]:
    def measure(records: Sequence[Record]) -> Found:
        return [(f"{case}, {_where(record)}", 100 * value) for record, value in _value(records, case, "ours", key, **params)]

    return measure


def _ratios(case: str, rival: str, **params: Any) -> Callable[[Sequence[Record]], Found]:
    """Return the rival's time over der_fast's, wherever both were measured in the same run."""

    def measure(records: Sequence[Record]) -> Found:
        found = []
        for record, own in _value(records, case, "ours", **params):
            same = [value for other, value in _value(records, case, rival, **record["params"]) if other["run"] == record["run"]]
            found += [(f"{case}, {_where(record)}", value / own) for value in same]
        return found

    return measure


def _several(*measures: Callable[[Sequence[Record]], Found]) -> Callable[[Sequence[Record]], Found]:
    return lambda records: [pair for measure in measures for pair in measure(records)]


def _growth(records: Sequence[Record]) -> Found:
    """Return the time of der_fast's pruned DER step at t = 10 over t = 1."""
    found = []
    for record, late in _value(records, "step.der", "ours", t=10):
        others = {**record["params"], "t": 1}
        same = [value for other, value in _value(records, "step.der", "ours", **others) if other["run"] == record["run"]]
        found += [(f"step.der, {_where(record)}", late / value) for value in same]
    return found


GOALS = (
    Goal("masked_bn: share of the measured copy bandwidth, batch 512", 85, "%", _several(
        *(_shares("share_of_copy", f"masked_bn.{what}", batch=512) for what in ("forward", "backward")))),
    Goal("masked_bn over eager bf16 batch-norm, mask, add, ReLU", 2, "×", _several(
        *(_ratios(f"masked_bn.{what}", "eager_bf16") for what in ("forward", "backward")))),
    Goal("channel_masks over the eager per-layer code", 20, "×", _ratios("channel_masks.both", "eager", how="launch")),
    Goal("der_fast's convolution over cuDNN, nothing fused (share of its speed)", 0.8, "×", _several(
        *(_ratios(f"conv.{what}", "eager_bf16") for what in ("forward", "dgrad", "wgrad")))),
    Goal("conv chain over cuDNN and batch-norm, stages 1 and 2", 1.1, "×", _several(
        *(_ratios("conv_chain.both", "eager_bf16", stage=stage) for stage in (1, 2)))),
    Goal("frozen bank at t = 10 over the eager loop", 3, "×", _ratios("bank.whole", "eager", t=10)),
    Goal("frozen bank at t = 10 over parallel cuDNN branches in one graph", 1.3, "×", _ratios("bank.whole", "branches", t=10)),
    Goal("ResNet-18 masked training step over eager bf16, batch 128", 4, "×", _ratios("step.train", "eager_bf16", batch=128)),
    Goal("ResNet-18 masked training step over eager bf16, batch 512", 1.6, "×", _ratios("step.train", "eager_bf16", batch=512)),
    Goal("ResNet-18 masked training step over torch.compile", 1.15, "×", _ratios("step.train", "compile")),
    Goal("share of the measured matrix rate in the training step (MFU)", 30, "%", _shares("share_of_matmul", "step.train")),
    Goal("full DER step at t = 10, pruned, over the per-extractor eager loop", 3, "×", _ratios("step.der", "eager_bf16", t=10)),
    Goal("full DER step at t = 10, pruned, over the same at t = 1", 1.25, "×", _growth, most=True),
)  # fmt: skip


def verdicts(records: Sequence[Record]) -> list[tuple[Goal, Found]]:
    """Return the results for every goal, only from measurements on GPUs at full or quick scale."""
    usable = {record["run"] for record in records if record["kind"] == "run" and _counts(record)}
    chosen = [record for record in records if record["run"] in usable]
    return [(goal, goal.measure(chosen)) for goal in GOALS]


def _counts(header: Record) -> bool:
    return bool(header["facts"]["kind"] == "cuda" and header["scale"] != "smoke" and header["backend"] == "fused")


def line(goal: Goal, found: Found) -> tuple[str, str, str]:
    """Return (goal, measured, verdict) as texts; the measured value is the range over all cases that must meet the goal."""
    word = "at most" if goal.most else "at least"
    wanted = f"{goal.text}: {word} {goal.wanted:g} {goal.unit}"
    if not found:
        return wanted, "–", "not measured"
    values = [value for _, value in found]
    low, high = min(values), max(values)
    digits = 0 if goal.unit == "%" else 2
    shown = f"{low:.{digits}f}" if f"{low:.{digits}f}" == f"{high:.{digits}f}" else f"{low:.{digits}f} to {high:.{digits}f}"
    met = sum(goal.met(value) for value in values)
    return wanted, f"{shown} {goal.unit}", "met" if met == len(values) else f"missed in {len(values) - met} of {len(values)}"
