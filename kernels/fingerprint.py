"""What the kernels are, in a few digits: a choice that was measured with others does not count."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from der_fast import native

# Everything that defines a kernel, in Triton, C++ or Python. An installed package has no C++ sources, but the module made of them.
SUFFIXES = frozenset({".py", ".cu", ".cuh", ".hpp"})


@functools.cache
def fingerprint() -> str:
    """Return 12 hexadecimal digits of a hash of the files below `kernels/` and of the native module; read once per process."""
    return fingerprint_of(Path(__file__).parent, native.binary())


def fingerprint_of(folder: Path, binary: Path | None) -> str:
    """Return the digits for the sources below a folder and for a native module, if there is one."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.suffix in SUFFIXES}
    if binary is not None:
        files["native module"] = binary
    total = hashlib.sha256()
    for name in sorted(files):
        total.update(f"{name} {hashlib.sha256(files[name].read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()[:12]
