"""The table of GPU measurements in bench/README.md, and the longer one at the end of a run with every case and variant."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.harness.records import Record, by_variant, failures, read, runs
from bench.reports.goals import line, verdicts

NOTHING = (
    "`bench/results/` holds no GPU results: no GPU was available. The commands are in [bench/GPU_TODO.md](bench/GPU_TODO.md); "
    "no speed on a GPU is claimed until they have run."
)
HEAD = "| goal | measured | verdict |\n|---|---|---|"


def gpu_files(results: Path) -> list[Path]:
    """Return the results files with runs on a GPU, at a scale that counts."""
    return [path for path in sorted(results.glob("gpu*.jsonl")) if any(record["facts"]["kind"] == "cuda" for record in runs(read(path)))]


def table(results: Path) -> str:
    """Return a table of goals per GPU, each from that GPU's files; or a sentence that there are none."""
    by_device: dict[str, list[Record]] = {}
    for path in gpu_files(results):
        records = read(path)
        for header in runs(records):
            own = [record for record in records if record["run"] == header["run"]]
            by_device.setdefault(str(header["facts"]["device"]), []).extend(own)
    return "\n\n".join(_goals(device, records) for device, records in by_device.items()) or NOTHING


def _goals(device: str, records: Sequence[Record]) -> str:
    header = runs(records)[-1]
    facts, ceilings = header["facts"], header["ceilings"]
    where = (
        f"One {device}, driver {facts.get('nvidia_smi', {}).get('driver_version', 'unknown')}, torch {facts['versions']['torch']}, "
        f"triton {facts['versions']['triton']}, commit {facts['commit']}. Measured ceilings: {ceilings['gb_per_s']:.0f} GB/s by copying, "
        f"{ceilings['tflop_per_s']['bf16']:.0f} TFLOP/s by a bf16 matrix product."
    )
    rows = [f"| {' | '.join(line(goal, found))} |" for goal, found in verdicts(records)]
    return "\n".join([where, "", HEAD, *rows])


def full_table(records: Sequence[Record]) -> str:
    """Return every measurement as Markdown, and the failures."""
    lines = ["| case | variant | ms (p20–p80) | over eager bf16 | GB/s (of copy) | TFLOP/s (of matmul) | images/s | peak MB |"]
    lines.append("|---|---|---:|---:|---:|---:|---:|---:|")
    for (case, params), variants in by_variant(records).items():
        baseline = variants.get("eager_bf16", variants.get("eager"))
        for name, record in variants.items():
            lines.append(f"| {case}: {params} | {name} | {' | '.join(_cells(record, baseline))} |")
    broken = [f"* {record['case']} ({record['params']}) {record['variant']}: {record['reason']}" for record in failures(records)]
    return "\n".join(lines + (["", "Failed:", "", *broken] if broken else []))


def _cells(record: Record, baseline: Record | None) -> list[str]:
    over = f"{baseline['ms'] / record['ms']:.2f} ×" if baseline is not None else ""
    return [
        f"{record['ms']:.4g} ({record['ms_p20']:.4g}–{record['ms_p80']:.4g})",
        over,
        f"{record['gb_per_s']:.0f} ({100 * record['share_of_copy']:.0f} %)" if "gb_per_s" in record else "",
        _rate(record),
        f"{record['images_per_s']:.0f}" if "images_per_s" in record else "",
        f"{record['peak_mb']:.0f}" if record.get("peak_mb") is not None else "",
    ]


def _rate(record: Record) -> str:
    if "tflop_per_s" not in record:
        return ""
    share = f" ({100 * record['share_of_matmul']:.0f} %)" if "share_of_matmul" in record else ""
    return f"{record['tflop_per_s']:.3g}{share}"


def goals_table(records: Sequence[Record]) -> str:
    """Return the table of goals, or the reason why there is none."""
    if not any(header["facts"]["kind"] == "cuda" for header in runs(records)):
        return "No goals are judged: none of these results come from a GPU."
    return "\n".join([HEAD, *(f"| {' | '.join(line(goal, found))} |" for goal, found in verdicts(records))])
