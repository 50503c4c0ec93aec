"""Every CUDA source compiles for every architecture that is supported, without spilling registers."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "kernels"
ARCHITECTURES = ("80", "90", "100")
# Kernels of every source, each in all its instances, and the registers a thread may have for the blocks that should fit.
SOURCES = {
    # At least 8 blocks of 128 threads on a multiprocessor.
    "compact/compact.cu": (["compact_kernel"], 64),
    # One block of 1024 threads.
    "channel_masks/channel_masks.cu": (["channel_masks_forward"] * 2 + ["channel_masks_backward"] * 2, 64),
}


def test_every_source_is_compiled():
    assert {path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.cu")} == set(SOURCES)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
@pytest.mark.parametrize("source", SOURCES)
def test_compiles_without_spills(source, tmp_path):
    path = FOLDER / source
    kernels, most = SOURCES[source]
    targets = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in ARCHITECTURES]
    command = ["nvcc", "-std=c++20", "-O3", "-fmad=false", "-Werror=all-warnings", "-Xptxas=-v", f"-I{FOLDER}", f"-I{path.parent}"]
    ended = subprocess.run([*command, *targets, "-c", str(path), "-o", str(tmp_path / "c.o")], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    for name in set(kernels):
        found = re.findall(rf"{name}\S*' for 'sm_(\d+)'", ended.stderr)
        assert sorted(found, key=int) == sorted(ARCHITECTURES * kernels.count(name), key=int)
    assert re.findall(r"(\d+) bytes spill", ended.stderr) == ["0"] * 2 * len(kernels) * len(ARCHITECTURES), ended.stderr
    assert set(re.findall(r"(\d+) bytes stack frame", ended.stderr)) == {"0"}, ended.stderr
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", ended.stderr)]
    assert len(registers) == len(kernels) * len(ARCHITECTURES) and max(registers) <= most
