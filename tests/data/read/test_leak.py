"""A new list in every step costs neither memory nor threads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("stepping.py")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads resident memory from /proc")
def test_fifty_steps_in_one_process(photos, reader):
    ended = subprocess.run([sys.executable, str(SCRIPT), str(photos), reader], capture_output=True, text=True, timeout=250, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    rows = [tuple(map(int, line.split())) for line in ended.stdout.splitlines()]
    assert len(rows) == 50
    memory, ours, threads = zip(*rows, strict=True)
    assert max(memory[1:]) <= 1.05 * memory[1], memory
    assert max(ours[1:]) == ours[1] and max(threads[2:]) <= threads[1] + 1, (ours, threads)
