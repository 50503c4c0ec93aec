"""A process that was forked from one which had computed computes with one thread; others as they please."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from der_fast.errors import BackendError
from der_fast.kernels import forked
from der_fast.kernels.backend import resolve_device
from der_fast.kernels.forked import fit_to_compute

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system that forks processes")


@forks
@pytest.mark.parametrize(("computed", "threads"), [("fit_to_compute()", 1), ("", 2)])
def test_only_a_process_whose_parent_computed_is_held_to_one_thread(computed: str, threads: int) -> None:
    code = f"""
import os, torch
from der_fast.kernels.forked import fit_to_compute
torch.set_num_threads(2)
{computed}
child = os.fork()
if not child:
    for _ in range(2):
        fit_to_compute()
        if torch.get_num_threads() != {threads}:
            os._exit(1)
        torch.set_num_threads(2)
    fit_to_compute()
    grandchild = os.fork()
    if not grandchild:
        fit_to_compute()
        os._exit(0 if torch.get_num_threads() == 1 else 1)
    os._exit(0 if os.waitpid(grandchild, 0)[1] == 0 else 1)
assert os.waitpid(child, 0)[1] == 0
fit_to_compute()
assert torch.get_num_threads() == 2
"""
    subprocess.run([sys.executable, "-c", code], timeout=100, check=True)


def test_it_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(forked, "_process", os.getpid() + 1)
    monkeypatch.setattr(forked, "_forked", False)
    forked._say_so.cache_clear()
    try:
        for _ in range(2):
            torch.set_num_threads(2)
            fit_to_compute()
            assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    assert [record.getMessage().split(",")[0] for record in caplog.records] == [
        f"process {os.getpid()} was forked from one that had already computed"
    ]


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:1"])
def test_a_gpu_is_refused_where_the_parent_used_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    with pytest.raises(BackendError, match=r"forked from one that used a GPU.*spawn.*device='cpu'"):
        resolve_device(name)
    with pytest.raises(BackendError, match="forked"):
        fit_to_compute(torch.device("cuda"))
    assert resolve_device("cpu") == torch.device("cpu")
    fit_to_compute(torch.device("cpu"))
