"""The CUDA source compiles for every architecture that is supported, without spilling registers."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "kernels" / "compact"
ARCHITECTURES = ("80", "90", "100")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
def test_compiles_without_spills(tmp_path):
    targets = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in ARCHITECTURES]
    command = ["nvcc", "-std=c++20", "-O3", "-fmad=false", "-Werror=all-warnings", "-Xptxas=-v", f"-I{FOLDER}", *targets]
    ended = subprocess.run(
        [*command, "-c", str(FOLDER / "compact.cu"), "-o", str(tmp_path / "c.o")], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert sorted(re.findall(r"compact_kernel\S*' for 'sm_(\d+)'", ended.stderr), key=int) == list(ARCHITECTURES)
    assert re.findall(r"(\d+) bytes spill", ended.stderr) == ["0"] * 2 * len(ARCHITECTURES), ended.stderr
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", ended.stderr)]
    # 128 threads a block: with 64 registers a thread, at least 8 blocks fit on a multiprocessor.
    assert len(registers) == len(ARCHITECTURES) and max(registers) <= 64
