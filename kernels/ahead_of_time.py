"""Compile the Triton kernels without a GPU.

Every module `kernels/<op>/triton*.py` lists its launches in a function `compile_cases() -> list[CompileCase]`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import der_fast.kernels
from der_fast.errors import BackendError
from der_fast.kernels import triton_runtime
from der_fast.kernels.compile_case import CompileCase


def modules() -> Iterator[str]:
    """Yield the names of the modules that hold Triton kernels."""
    for package in pkgutil.iter_modules(der_fast.kernels.__path__):
        if package.ispkg:
            folder = Path(der_fast.kernels.__path__[0]) / package.name
            yield from (f"der_fast.kernels.{package.name}.{path.stem}" for path in sorted(folder.glob("triton*.py")))


def cases() -> list[CompileCase]:
    """Return every launch that is compiled.

    Raises:
        BackendError: Triton is not installed, or it interprets.
    """
    if triton_runtime.interpreting():
        raise BackendError(f"{triton_runtime.INTERPRET} is set: what is interpreted is not compiled. Unset it")
    try:
        return [case for name in modules() for case in importlib.import_module(name).compile_cases()]
    except ModuleNotFoundError as error:
        raise BackendError(f"Triton is not installed ({error})") from error


def compiled(case: CompileCase, capability: int) -> Any:
    """Return Triton's compiled kernel for one compute capability, 80 for 8.0; its `asm` holds the binary and all that led to it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    signature = {name: "constexpr" if name in case.constants else case.signature[name] for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in case.aligned}
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=dict(case.constants), attrs=aligned)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
