"""Writes the results tables of README.md and bench/README.md and the picture from the files in bench/results/, never by hand.

`python -m bench readme` rewrites the text between the markers, and the picture; `--check` only checks whether a table would change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from bench.harness.facts import ROOT
from bench.reports import cpu_table, gpu_table, headline, launch_table

# The folder that holds the pages.
PLACE = ROOT
RESULTS = ROOT / "bench" / "results"
PAGES: dict[str, Mapping[str, Callable[[Path], str]]] = {
    "README.md": {"results": headline.table},
    "bench/README.md": {"cpu-results": cpu_table.table, "gpu-results": gpu_table.table, "launches": launch_table.table},
}


class MarkerError(ValueError):
    """A page lacks a marker."""


def markers(name: str) -> tuple[str, str]:
    """Return the lines that enclose a table."""
    return f"<!-- {name}: written by `python -m bench readme` from bench/results/ -->", f"<!-- end of {name} -->"


def replaced(text: str, name: str, table: str) -> str:
    """Return `text` with a new table between the markers.

    Raises:
        MarkerError: a marker is missing or appears twice.
    """
    begin, end = markers(name)
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise MarkerError(f"the page needs these two lines exactly once, in this order:\n{begin}\n{end}")
    head, _, rest = text.partition(begin)
    return f"{head}{begin}\n{table.strip()}\n{end}{rest.partition(end)[2]}"


def written() -> dict[Path, tuple[str, str]]:
    """Return every page as it is, and with its tables as the results say; links are relative to the page."""
    pages = {}
    for page, tables in PAGES.items():
        path = PLACE / page
        before = after = path.read_text(encoding="utf-8")
        for name, table in tables.items():
            text = table(RESULTS)
            after = replaced(after, name, text if page == "README.md" else text.replace("(bench/", "("))
        pages[path] = before, after
    return pages
