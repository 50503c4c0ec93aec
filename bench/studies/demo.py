"""The accuracy of `der-fast demo` over seeds and numbers of threads, and how long it takes.

    python -m bench demo --seeds 1993 1 2 --thread-counts 1 2 --json bench/results/demo.json

The number of threads changes the order of sums, which changes the result as much as another seed does. Runs that FILE already holds are
not repeated. Seconds are wall time, so measure them on an idle machine (`--again` measures again).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.harness.arguments import study_parser
from der_fast.machine import processor_name


def run(seed: int, threads: int) -> dict[str, Any]:
    """Run the demo in a separate process and return its results."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "demo"
        options = ["--quiet", "--out", str(out), "--seed", str(seed), "--set", f"runtime.threads={threads}"]
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "der_fast.cli.main", "demo", *options], check=True)
        seconds = time.perf_counter() - started
        metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    found = {key: metrics[key] for key in ("average_top1", "last_top1", "final_params", "versions")}
    unpruned = metrics["params_unpruned"][-1]
    return {"seed": seed, "threads": threads, **found, "final_params_unpruned": unpruned, "seconds": seconds, "processor": processor_name()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the missing combinations and write the file after every run."""
    parser = study_parser("demo", __doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1993], help="the demo's default is 1993")
    parser.add_argument("--thread-counts", type=int, nargs="+", default=[1])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--again", action="store_true", help="repeat runs that FILE already holds")
    args = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = json.loads(args.json.read_text(encoding="utf-8")) if args.json and args.json.exists() else []
    for seed in args.seeds:
        for threads in args.thread_counts:
            same = [row for row in rows if (row["seed"], row["threads"]) == (seed, threads)]
            if same and not args.again:
                continue
            row = run(seed, threads)
            rows = [*(old for old in rows if old not in same), row]
            print(f"seed {seed}, {threads} thread(s): {row['average_top1']:.2f} %, last {row['last_top1']:.2f} %, {row['seconds']:.0f} s")
            if args.json:
                args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
