"""Pictures of a results file: one PNG per group of cases, one bar per variant, relative to eager bf16 (or plain eager)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from bench.harness.records import Record, by_variant, runs


def plot(records: Sequence[Record], folder: Path) -> list[Path]:
    """Write the pictures and return their paths; cases without a baseline are left out."""
    groups: dict[str, list[tuple[str, dict[str, float]]]] = {}
    for (case, params), variants in by_variant(records).items():
        baseline = variants.get("eager_bf16", variants.get("eager"))
        if baseline is None:
            continue
        over = {name: baseline["ms"] / record["ms"] for name, record in variants.items()}
        groups.setdefault(case.split(".")[0], []).append((f"{case.partition('.')[2]}, {params}", over))
    folder.mkdir(parents=True, exist_ok=True)
    title = _title(records)
    return [_picture(folder / f"{group}.png", f"{group}: {title}", rows) for group, rows in groups.items()]


def _title(records: Sequence[Record]) -> str:
    headers = runs(records)
    device = headers[-1]["facts"]["device"] if headers else "unknown device"
    smoke = any(header["scale"] == "smoke" for header in headers)
    return f"{device}{' – smoke run, not a measurement' if smoke else ''}"


def _picture(path: Path, title: str, rows: Sequence[tuple[str, dict[str, float]]]) -> Path:
    names = sorted({name for _, over in rows for name in over})
    thickness = 0.8 / len(names)
    figure = Figure(figsize=(9, 1.2 + 0.22 * len(rows) * len(names)), layout="constrained")
    axes = figure.add_subplot()
    for number, name in enumerate(names):
        places = [place + number * thickness for place, (_, over) in enumerate(rows) if name in over]
        axes.barh(places, [over[name] for _, over in rows if name in over], thickness, label=name)
    axes.set_yticks([place + 0.4 - thickness / 2 for place in range(len(rows))], [label for label, _ in rows], fontsize=7)
    axes.invert_yaxis()
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("speed relative to the eager baseline (baseline's time / time)")
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)
    return path
