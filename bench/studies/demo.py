"""What `der-fast demo` reaches and how long it takes.

python -m bench demo --json bench/results/demo.json
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bench.harness.arguments import study_parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the demo in a process of its own and note its metrics."""
    parser = study_parser("demo", __doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "demo"
        command = [
            sys.executable,
            "-m",
            "der_fast.cli.main",
            "demo",
            "--quiet",
            "--out",
            str(out),
            "--set",
            f"runtime.threads={args.threads}",
        ]
        started = time.perf_counter()
        subprocess.run(command, check=True)
        seconds = time.perf_counter() - started
        metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    facts = {key: metrics[key] for key in ("average_top1", "last_top1", "final_params", "versions")}
    facts |= {"final_params_unpruned": metrics["params_unpruned"][-1], "threads": args.threads, "seconds": seconds}
    print(json.dumps(facts, indent=1))
    if args.json:
        args.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
