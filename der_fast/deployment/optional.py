"""Parts that need packages or programs that are not installed with der_fast, and whether these exist here."""

from __future__ import annotations

import os
import shutil
import sys
from importlib import import_module, metadata
from typing import Any

from der_fast.errors import ExportError

EXTRA = "pip install 'der_fast[onnx]'"


def optional(name: str, purpose: str) -> Any:
    """Import a package of the extra `onnx`.

    Args:
        name: 'onnx' or 'onnxruntime'.
        purpose: what it is needed for, for the message.

    Raises:
        ExportError: the package is not installed, or cannot be imported.
    """
    try:
        return import_module(name)
    except ImportError as error:
        if _version(name) is None:
            raise ExportError(f"{purpose} needs {name}, which is not installed: {EXTRA}") from error
        raise ExportError(f"{purpose} needs {name}, which is installed but cannot be imported ({error}): reinstall it, {EXTRA}") from error


def availability() -> dict[str, tuple[bool, str]]:
    """Return for every optional part whether it is available, and how to use or install it."""
    found = {}
    for name, use in (("onnx", "der-fast export RUN model.onnx"), ("onnxruntime", "der-fast predict model.onnx")):
        version = _version(name)
        found[name] = (True, f"{version}; {use}") if version else (False, f"not installed; {EXTRA}")
    compiler = cpp_compiler()
    found["AOTInductor"] = (
        (True, f"{compiler}; der-fast export RUN model.pt2 --aoti")
        if compiler
        else (False, "needs a C++ compiler: install g++ (clang++ on macOS), or name yours in the variable CXX")
    )
    return found


def cpp_compiler() -> str | None:
    """Return the path of the C++ compiler that PyTorch would use, or None if there is none."""
    name = os.environ.get("CXX", {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++"))
    return shutil.which(name)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
