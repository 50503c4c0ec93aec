"""Compile every Triton kernel ahead of time and report its registers, local memory and shared memory. Needs no GPU.

    python -m der_fast.kernels.resources                 # a table, for compute capabilities 8.0, 9.0 and 10.0
    python -m der_fast.kernels.resources --json --capability 90 --only conv

Every module `kernels/<op>/triton*.py` lists its launches in a function `compile_cases() -> list[CompileCase]`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import der_fast.kernels
from der_fast.errors import BackendError
from der_fast.kernels import triton_runtime
from der_fast.kernels.compile_case import CompileCase

CAPABILITIES = (80, 90, 100)


@dataclass(frozen=True)
class Usage:
    """Resources of one compiled kernel.

    Attributes:
        name: the case's name.
        capability: 80 for 8.0, and so on.
        registers: per thread.
        stack: bytes of local memory per thread; 0 unless registers spill.
        shared: bytes of shared memory per block.
        stack_budget: what the case allows.
    """

    name: str
    capability: int
    registers: int
    stack: int
    shared: int
    stack_budget: int


def modules() -> Iterator[str]:
    """Yield the names of the modules that hold Triton kernels."""
    for package in pkgutil.iter_modules(der_fast.kernels.__path__):
        if package.ispkg:
            folder = Path(der_fast.kernels.__path__[0]) / package.name
            yield from (f"der_fast.kernels.{package.name}.{path.stem}" for path in sorted(folder.glob("triton*.py")))


def cases() -> list[CompileCase]:
    """Return every launch to compile.

    Raises:
        BackendError: Triton is not installed, or its interpreter is on.
    """
    if triton_runtime.interpreting():
        raise BackendError(f"{triton_runtime.INTERPRET} is set, so kernels are interpreted, not compiled. Unset it")
    try:
        return [case for name in modules() for case in importlib.import_module(name).compile_cases()]
    except ModuleNotFoundError as error:
        raise BackendError(f"Triton is not installed ({error})") from error


def compile_case(case: CompileCase, capability: int) -> Usage:
    """Compile one case for one compute capability."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    signature = {name: "constexpr" if name in case.constants else case.signature[name] for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in case.aligned}
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=dict(case.constants), attrs=aligned)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, stack = _resources(compiled.asm["cubin"])
    return Usage(case.name, capability, registers, stack, int(compiled.metadata.shared), case.stack_budget)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Return registers and bytes of stack per thread, as read by the tool that comes with Triton."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+).* LOCAL:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage:\n{text}")
    return int(found[1]), int(found[2]) + int(found[3])


def main() -> None:
    """Print the report; exit with code 1 if a case exceeds its budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    parser.add_argument("--capability", type=int, nargs="+", default=list(CAPABILITIES))
    parser.add_argument("--only", default="", help="cases whose name contains this")
    args = parser.parse_args()
    try:
        chosen = [case for case in cases() if args.only in case.name]
    except BackendError as error:
        sys.exit(str(error))
    exceeded = False
    for case in chosen:
        for capability in args.capability:
            usage = compile_case(case, capability)
            exceeded |= usage.stack > usage.stack_budget
            line = f"{usage.name:60} sm_{capability:<4} {usage.registers:4d} registers {usage.stack:5d} B stack {usage.shared:7d} B shared"
            print(json.dumps(asdict(usage)) if args.json else line, flush=True)
    sys.exit(1 if exceeded else 0)


if __name__ == "__main__":
    main()
