"""The reference page of metrics.json.

python -m der_fast.training.document docs/metrics.md
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

from der_fast.errors import ConfigError
from der_fast.files import write_bytes
from der_fast.training.figures import EVENT, RunFigures, names_for
from der_fast.training.methods import METHODS
from der_fast.training.results import LISTED

_HEAD = """# Metrics

<!-- Written by `python -m der_fast.training.document docs/metrics.md`; a test compares the two. -->

`RUN/metrics.json` is written after every step; `train` and `Learner.metrics()` return the same. [method.md](method.md#metrics) says how
the figures are computed; [watching.md](watching.md) describes the epochs.

| key | what it is |
| --- | --- |
| `protocol`, `dataset`, `name` | the protocol, the data set, and the method's label under this configuration |
| `backend`, `device`, `versions` | what the run ran on |
| `config` | the whole configuration ([configuration.md](configuration.md)) |
| `notes` | what you should know: images that could not be read, classes without test images, … |
| `class_names`, `steps` | every class in the order it was learned; the classes of every step |
| `confusion` | counts of the last measurement: rows true, columns predicted; `null` without test images |
"""


def metrics_page() -> str:
    """Return the page as Markdown: every key of metrics.json."""
    events = ", ".join(f"`{name}`" for name in names_for(EVENT))
    parts = [
        _HEAD.rstrip("\n"),
        f"| `events` | what happened to classes between the steps: `kind`, `step`, `class_names`, `images`, and then {events} |",
        *_table("Per step, as lists", ((each.name, each.metadata["unit"], each.metadata["meaning"]) for each in LISTED)),
        *_table("Per run", ((each.name, each.metadata["unit"], each.metadata["meaning"]) for each in fields(RunFigures))),
    ]
    for name, method in METHODS.items():
        if method.figures:
            parts += _table(f"Per step of `{name}`, as lists", ((key, *told) for key, told in method.figures.items()))
    return "\n".join(parts) + "\n"


def _table(title: str, rows: Iterable[tuple[str, str, str]]) -> list[str]:
    written = (f"| `{key}` | {unit} | {meaning} |" for key, unit, meaning in rows)
    return [f"\n## {title}\n\n| key | unit | what it is |\n| --- | --- | --- |", *written]


def main(arguments: list[str]) -> None:
    """Write the page to the path given; raises ConfigError without one."""
    if len(arguments) != 1:
        raise ConfigError("give one path, e.g. docs/metrics.md")
    write_bytes(Path(arguments[0]), metrics_page().encode())


if __name__ == "__main__":
    main(sys.argv[1:])
