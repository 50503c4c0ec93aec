"""Where Triton kernels may run, and what is said where they may not."""

from __future__ import annotations

import importlib

import pytest
import torch

from der_fast.errors import BackendError
from der_fast.kernels import triton_runtime

CUDA = torch.device("cuda", 0)


@pytest.fixture
def again():
    triton_runtime.forget()
    yield
    triton_runtime.forget()


@pytest.fixture
def compiled(monkeypatch):
    monkeypatch.setattr(triton_runtime, "interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")


def test_without_triton(monkeypatch, again):
    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    works, reason = triton_runtime.usable(CUDA)
    assert not works and "not installed" in reason
    assert triton_runtime.interpreting() is False
    with pytest.raises(BackendError, match="masked_bn cannot run here: Triton is not installed.*'reference' or 'auto'"):
        triton_runtime.require(CUDA, "masked_bn")


@pytest.mark.parametrize(("capability", "works"), [((7, 5), False), ((8, 0), True), ((9, 0), True), ((10, 0), True)])
def test_generations(monkeypatch, compiled, capability, works):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found, reason = triton_runtime.usable(CUDA)
    assert found is works
    assert works or "Some GPU has compute capability 7.5; the kernels need 8.0" in reason


def test_no_cuda_device(compiled):
    works, reason = triton_runtime.usable(torch.device("cpu"))
    assert not works and "CUDA device, not cpu" in reason


def test_the_interpreter_runs_on_the_cpu(monkeypatch):
    monkeypatch.setattr(triton_runtime, "interpreting", lambda: True)
    works, reason = triton_runtime.usable(torch.device("cpu"))
    assert works and "interpreted" in reason
    assert triton_runtime.dot_in_float32()
