"""What every Triton kernel's machine code is made of, for every GPU generation, against what its case declares. Needs no GPU.

    python -m bench machine-code                                                   # all of it; some minutes
    python -m bench machine-code 'conv.forward.bf16.*' --arch 90
    python -m bench machine-code --json bench/results/machine-code.jsonl           # writes one row per kernel and GPU

A row has the counts that `kernels/machine_code.py` reads, what the case wants, what it lacks and why, and Triton's version. The exit code
is 1 where a kernel is not what its case declares.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from fnmatch import fnmatchcase
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from bench.harness.arguments import study_parser
from der_fast.errors import BackendError
from der_fast.files import write_atomically
from der_fast.kernels import ahead_of_time, machine_code, triton_runtime
from der_fast.kernels.compile_case import CAPABILITIES, CompileCase

Row = dict[str, Any]


@cache
def cases_by_name() -> dict[str, CompileCase]:
    """Return every case by its name."""
    return {case.name: case for case in ahead_of_time.cases()}


def row_of(name: str, capability: int) -> Row:
    """Compile one case and return its row."""
    case = cases_by_name()[name]
    code = machine_code.read(case, capability, ahead_of_time.compiled(case, capability))
    stated = {
        "kernel": case.kernel.__name__,
        "stack_budget": case.stack_budget,
        "resident": case.resident,
        "wants": case.wanted,
        "lacks": case.lacking(capability),
    }
    return {**asdict(code), **stated, "faults": machine_code.faults(code, case), "triton": triton_runtime.version()}


def pairs(names: Sequence[str], capabilities: Sequence[int]) -> list[tuple[str, int]]:
    """Return every case with each of the GPUs on which it is launched."""
    return [(name, capability) for name in names for capability in capabilities if capability in cases_by_name()[name].capabilities]


def rows_of(names: Sequence[str], capabilities: Sequence[int], jobs: int) -> Iterator[Row]:
    """Yield the rows in order, compiled by so many processes."""
    wanted = pairs(names, capabilities)
    if jobs == 1:
        yield from (row_of(*one) for one in wanted)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield from pool.map(row_of, *zip(*wanted, strict=True))


def counts(found: dict[int, int] | dict[str, int]) -> str:
    """Return '16×4 4×2' of what is counted."""
    return " ".join(f"{name}×{count}" for name, count in found.items()) or "-"


def line_of(row: Row) -> str:
    """Return a row for people."""
    products = counts(row["products"]) if row["products"] else f"FFMA×{row['multiply_adds']}"
    takes = f"{row['registers']:3d} registers {row['shared'] / 1024:5.1f} KiB {row['stack']:4d} B stack {row['blocks']:2d} blocks"
    moves = f"loads {counts(row['loads'])}, copies {counts(row['copies'])}, stores {counts(row['stores'])}"
    text = f"{row['name']:44} sm_{row['capability']:<3} {takes}  {moves}, {products}"
    lacks = "".join(f"\n{'':8}lacks {what}: {why}" for what, why in row["lacks"].items())
    return text + lacks + "".join(f"\n{'':8}FAULT: {fault}" for fault in row["faults"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print and write; returns 1 where a kernel is not what its case declares, 2 for a mistake of the caller."""
    parser = study_parser("machine-code", __doc__)
    parser.add_argument("cases", nargs="*", default=["*"], metavar="CASE", help="names, * for anything")
    parser.add_argument("--arch", type=int, nargs="+", choices=CAPABILITIES, default=list(CAPABILITIES), help="90 for 9.0 (default: all)")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile")
    args = parser.parse_args(arguments)
    try:
        names = [name for name in cases_by_name() if any(fnmatchcase(name, pattern) for pattern in args.cases)]
    except BackendError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not names:
        print(f"error: no case fits {' '.join(args.cases)}: names begin with {', '.join(_heads())}", file=sys.stderr)
        return 2
    count = len(pairs(names, args.arch))
    rows: list[Row] = []
    for row in rows_of(names, args.arch, max(1, args.jobs)):
        rows.append(row)
        print(f"{len(rows):4d}/{count} {line_of(row)}", flush=True)
    if args.json:
        write_atomically(args.json, lambda path: _write(path, rows))
    wrong = sum(bool(row["faults"]) for row in rows)
    lacking = sum(bool(row["lacks"]) for row in rows)
    print(f"Triton {triton_runtime.version()}: {count} kernels, {lacking} lack something and say so, {wrong} are not what they declare")
    return int(wrong > 0)


def _heads() -> list[str]:
    return sorted({name.partition(".")[0] for name in cases_by_name()})


def _write(path: Path, rows: Sequence[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
