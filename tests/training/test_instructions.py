"""Training tests of narrow networks, under each instruction set that this processor has.

oneDNN reads ONEDNN_MAX_CPU_ISA once, so each set has a process of its own; an abort in it is a failed test (docs/cpu.md).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
NARROW = (
    "tests/model/test_fused_training.py::test_single_precision_is_about_as_exact_as_autograd",
    "tests/training/test_imagenet.py::test_a_preset_runs_from_a_folder_in_the_standard_layout[imagenet100-b50-10]",
    "tests/training/test_step.py::test_every_backbone_learns_two_steps[resnet18-small]",
    "tests/training/test_step.py::test_every_backbone_learns_two_steps[preact_resnet18-small]",
)
# The value of the variable, and what oneDNN calls that set.
SETS = {"AVX2": r"Intel AVX2", "AVX512_CORE": r"Intel AVX-512 with AVX512BW, AVX512VL, and AVX512DQ extensions", "DEFAULT": ".+"}


@pytest.mark.parametrize("instructions", SETS)
def test_narrow_networks_learn_under(instructions: str) -> None:
    # What it prints is a line about the processor, and what arguments it finds wrong.
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": instructions, "ONEDNN_VERBOSE": "check", "OMP_NUM_THREADS": "1"}
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_ADDOPTS"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "-p", "no:xdist", *NARROW]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, f"ended with {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-1000:]}"
    used = re.search(r"^onednn_verbose,.*cpu,isa:(.*)$", done.stdout, re.MULTILINE)
    if used is None:
        pytest.skip("PyTorch has no oneDNN here, or one that does not name its instruction set")
    if not re.fullmatch(SETS[instructions], used[1].strip()):
        pytest.skip(f"the processor has no {instructions}: oneDNN used {used[1].strip()}")
