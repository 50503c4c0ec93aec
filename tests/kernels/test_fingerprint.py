"""The digits that stand for the kernels change with every file that defines one, and with nothing else."""

from __future__ import annotations

import subprocess
import sys

from der_fast.kernels.choices import machine
from der_fast.kernels.fingerprint import fingerprint, fingerprint_of


def test_the_fingerprint_is_of_every_file_that_defines_a_kernel(tmp_path):
    def of(**files):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        for name, content in {"conv/kernel.py": "a", "conv/kernel.cuh": "b", **files}.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(content)
        return fingerprint_of(folder, None)

    usual = of()
    assert usual == of() == of(**{"conv/README.md": "words", "conv/__pycache__/kernel.pyc": "code"}) and len(usual) == 12
    others = [of(**{name: "c"}) for name in ("conv/kernel.py", "conv/kernel.cuh", "conv/new.cu", "conv/new.hpp", "new.py")]
    assert len({usual, *others}) == 6
    module = tmp_path / "module.so"
    module.write_bytes(b"1")
    built = fingerprint_of(tmp_path / "0", module)
    module.write_bytes(b"2")
    assert len({usual, built, fingerprint_of(tmp_path / "0", module)}) == 3


def test_the_fingerprint_is_the_same_in_every_process():
    code = "from der_fast.kernels.fingerprint import fingerprint; print(fingerprint())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert other.stdout.strip() == fingerprint() and f"|kernels {fingerprint()}" in machine()
