"""The README's results tables, written from the files in bench/results/ and never by hand.

`python -m bench readme` rewrites what stands between the markers; `--check` only says whether that would change anything.
"""

from __future__ import annotations

from pathlib import Path

from bench.harness.facts import ROOT
from bench.reports import cpu_table, gpu_table

README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"
BLOCKS = {"results": cpu_table.table, "gpu-results": gpu_table.table}


class MarkerError(ValueError):
    """The README lacks a marker."""


def markers(name: str) -> tuple[str, str]:
    """Return the lines between which a table stands."""
    return f"<!-- {name}: written by `python -m bench readme` from bench/results/ -->", f"<!-- end of {name} -->"


def replaced(text: str, name: str, table: str) -> str:
    """Return `text` with another table between the markers.

    Raises:
        MarkerError: a marker is missing, or stands there twice.
    """
    begin, end = markers(name)
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise MarkerError(f"the README needs these two lines exactly once, in this order:\n{begin}\n{end}")
    head, _, rest = text.partition(begin)
    return f"{head}{begin}\n{table.strip()}\n{end}{rest.partition(end)[2]}"


def written(text: str, results: Path = RESULTS) -> str:
    """Return the README with every table as the results say."""
    for name, table in BLOCKS.items():
        text = replaced(text, name, table(results))
    return text
