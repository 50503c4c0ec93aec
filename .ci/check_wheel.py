"""Check that a wheel holds every file of the package, and nothing else.

python .ci/check_wheel.py der_fast-0.1.0-cp311-cp311-linux_x86_64.whl
"""

from __future__ import annotations

import re
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SUFFIXES = {".py", ".toml", ".json", ".html", ".typed", ".cu", ".cuh", ".hpp"}
# The native module's name also tells the Python version and machine that it was built for.
NATIVE = re.compile(r"der_fast/_C\.[\w.-]+\.(so|pyd)")


def expected() -> set[str]:
    """Return the paths of the source tree as a wheel names them."""
    found = set()
    for folder, package in ((ROOT / "der_fast", "der_fast"), (ROOT / "kernels", "der_fast/kernels")):
        for path in folder.rglob("*"):
            if path.suffix in SUFFIXES or path.name == "py.typed":
                found.add(f"{package}/{path.relative_to(folder).as_posix()}")
    return found


def main(wheel: str) -> int:
    """Print what is missing or superfluous; return the exit code."""
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    native = {name for name in names if NATIVE.fullmatch(name)}
    missing, superfluous = expected() - names, names - native - expected()
    if len(native) != 1:
        missing.add("der_fast/_C")
    for word, paths in (("missing from", missing), ("superfluous in", superfluous)):
        for path in sorted(paths):
            print(f"{word} the wheel: {path}")
    print(f"{len(names)} files in {Path(wheel).name}")
    return 1 if missing or superfluous else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
