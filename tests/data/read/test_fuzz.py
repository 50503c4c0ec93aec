"""Mutated JPEGs crash no process and stop no pass."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("fuzzed.py")
COUNT = 500


def test_mutated_photos_crash_nothing(tmp_path, reader):
    ended = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path), reader, "11", str(COUNT)], capture_output=True, text=True, timeout=250, check=False
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    words = ended.stdout.split()
    read, skipped = int(words[-3]), int(words[-1])
    # Some must be bearable and some not, or nothing was tried.
    assert read + skipped == COUNT and min(read, skipped) > COUNT // 10
