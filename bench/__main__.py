"""`python -m bench`: the commands for cases (list, run, compare, table, readme, plot) and the studies, by name; see bench/README.md."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

# Imported on demand: each needs different packages, and one of them measures memory.
STUDIES = {
    name: f"bench.studies.{name.replace('-', '_')}"
    for name in (
        "agreement",
        "cifar10",
        "cifar10-gpu",
        "compaction",
        "demo",
        "growth",
        "index",
        "initialisation",
        "launches",
        "loading",
        "machine-code",
        "needed",
        "paper",
        "pruning",
        "sanitize",
        "saving",
        "schedule",
        "step-overhead",
        "strategies",
        "sweep",
        "tiles",
        "views",
    )
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a study or a command; return the exit code: 0, 1 if something failed, 2 for a mistake by the caller."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0] in STUDIES:
        return int(importlib.import_module(STUDIES[given[0]]).main(given[1:]) or 0)
    from bench import commands

    return commands.main(given, list(STUDIES))


if __name__ == "__main__":
    sys.exit(main())
