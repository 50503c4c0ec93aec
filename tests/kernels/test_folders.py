"""Kernel folders look alike: who has read one finds the way in all."""

from __future__ import annotations

from pathlib import Path

import pytest

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
FOLDERS = sorted(path.parent for path in KERNELS.glob("*/__init__.py"))
# In the order in which they are read. What is special to an operation: its data structures, its passes, the draw before it.
COMMON = ("__init__", "checks", "reference", "autograd", "launch", "cases")
OWN = {
    "augment": ("draw",),
    "channel_masks": ("structure", "measured"),
    "conv": ("shape", "strided", "registers", "parts", "join", "boxes", "boxed_cases"),
    "grouped_conv": ("layer",),
    "masked_bn": ("operation", "passes", "norms", "reference_passes"),
}


def test_there_are_kernels():
    assert len(FOLDERS) >= 6


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_folder_has_the_files_that_every_folder_has(folder):
    names = {path.stem for path in folder.glob("*.py")}
    assert {"__init__", "reference"} <= names
    assert {name for name in names if not name.startswith("triton_")} <= {*COMMON, *OWN.get(folder.name, ())}
