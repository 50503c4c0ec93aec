"""docs/watching.md names every column of history.json, and its program reads one."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

from der_fast.training.progress import EpochRecord
from der_fast.training.storage.history import write_history

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "watching.md").read_text(encoding="utf-8")


def test_every_column_is_named() -> None:
    table = TEXT[TEXT.index("| column |") :]
    named = {name for row in table.splitlines() if row.startswith("| `") for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert named == {field.name for field in fields(EpochRecord)}


def test_its_program_shows_a_run(tmp_path: Path) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    write_history(tmp_path, [EpochRecord(2, "classifier", 3, 9, 0.51234, 81.25, 0.1, None, None, 1234.5)])
    ended = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=True)
    assert ended.stdout == "2 classifier 3/9 loss 0.512 accuracy 81.2 %\n"
