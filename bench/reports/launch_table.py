"""The table of a batch's GPU launches, from results/launches.jsonl: counted and modelled, not measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from der_fast.training.methods.der.sparsity import MOST_BATCHES

HEAD = "| one batch of | launches | with a parameter target | modelled | with a parameter target |\n|---|---|---|---|---|"
_STAGES = {
    "representation": "t = {steps}, masks being learned",
    "settled": "t = {steps}, masks settled",
    "kept": "the same with the features of earlier extractors kept",
    "classifier": "the classifier stage after step {steps}",
    "between": f"λ_s, chosen before one batch in {MOST_BATCHES} (not captured)",
}
# The goal for a captured step.
GOAL = 200


def table(results: Path) -> str:
    """Return the table, with launches above the goal in bold, and the kinds of launches of the step that has most."""
    path = results / "launches.jsonl"
    if not path.exists():
        return HEAD
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    both: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in found:
        both.setdefault((row["stage"], row["steps"]), []).append(row)
    rows = [_row(_STAGES[stage].format(steps=steps), pair) for (stage, steps), pair in both.items()]
    most = max(found, key=lambda row: row["launches"])
    kinds = sorted(most["kinds"].items(), key=lambda entry: -entry[1][0])
    listed = ", ".join(f"{name} {count} ({milliseconds:.2f} ms)" for name, (count, milliseconds) in kinds)
    return "\n".join([HEAD, *rows, f"\nThe {most['launches']} at t = {most['steps']}: {listed}."])


def _row(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    counts = [f"**{row['launches']}**" if row["launches"] > GOAL else str(row["launches"]) for row in rows]
    times = [f"{row['modelled_ms']:.2f} ms" for row in rows]
    return f"| {name} | {' | '.join([*counts, *times])} |"
