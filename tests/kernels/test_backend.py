"""Which backend and device are chosen, and what is said where they do not work."""

from __future__ import annotations

import pytest
import torch

from der_fast.errors import BackendError, UserError
from der_fast.kernels import backend, triton_runtime
from der_fast.kernels.backend import Backend, available, resolve, resolve_device, resolve_precision

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def fused_works(monkeypatch, works):
    monkeypatch.setattr(backend, "available", lambda device: {"reference": (True, "eager"), "fused": (works, "because of the weather")})


def with_devices(monkeypatch, count):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def test_every_backend_is_listed_with_a_reason():
    table = available()
    assert set(table) == {"reference", "fused"}
    assert table["reference"][0] is True
    assert all(reason for _, reason in table.values())


@pytest.mark.parametrize("device", [CPU, CUDA])
@pytest.mark.parametrize("works", [True, False])
def test_reference_is_what_was_asked_for(monkeypatch, device, works):
    fused_works(monkeypatch, works)
    assert resolve("reference", device) == Backend("reference", "asked for")


@pytest.mark.parametrize(
    ("device", "works", "name", "words"),
    [
        (CPU, False, "reference", "no CUDA device"),
        (CPU, True, "reference", "no CUDA device"),
        (CUDA, False, "reference", "because of the weather"),
        (CUDA, True, "fused", "as measured"),
    ],
)
def test_auto_is_fused_on_a_cuda_device_where_that_works(monkeypatch, device, works, name, words):
    fused_works(monkeypatch, works)
    choice = resolve("auto", device)
    assert choice.name == name and choice.measured == (name == "fused")
    assert choice.reason.startswith("auto: ") and words in choice.reason


def test_fused_by_name_measures_as_auto_does(monkeypatch):
    fused_works(monkeypatch, True)
    fastest = "because of the weather, the fastest of cuDNN and der_fast's kernels as measured"
    assert resolve("fused", CUDA) == Backend("fused", f"asked for: {fastest}", measured=True)
    assert resolve("auto", CUDA) == Backend("fused", f"auto: {fastest}", measured=True)
    # In the interpreter times say nothing.
    assert resolve("fused", CPU) == Backend("fused", "asked for: because of the weather", measured=False)


@pytest.mark.parametrize(
    ("asked", "device", "capability", "found"),
    [
        ("auto", CPU, None, "fp32"),
        ("bf16", CPU, None, "bf16"),
        ("fp32", CPU, None, "fp32"),
        ("auto", CUDA, (9, 0), "bf16"),
        ("auto", CUDA, (8, 0), "bf16"),
        ("auto", CUDA, (7, 5), "fp32"),
        ("fp32", CUDA, (9, 0), "fp32"),
        ("bf16", CUDA, (8, 6), "bf16"),
    ],
)
def test_auto_is_bf16_where_a_gpu_has_it(monkeypatch, asked, device, capability, found):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert resolve_precision(asked, device) == found


def test_bf16_on_a_gpu_without_it_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(BackendError, match=r"Tesla T4 \(compute capability 7.5\) has no bfloat16 arithmetic; use"):
        resolve_precision("bf16", CUDA)
    with pytest.raises(BackendError, match="unknown precision 'fp8'"):
        resolve_precision("fp8", CPU)


def test_fused_where_it_does_not_work_is_the_reference_and_one_line_says_why(monkeypatch, caplog):
    fused_works(monkeypatch, False)
    assert resolve("fused", CUDA) == Backend("reference", "fused was asked for, but because of the weather")
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "backend 'fused' does not work here, so the reference is used instead: because of the weather")
    ]


def on_a_gpu(monkeypatch, capability):
    """A CUDA device without the interpreter, as kernels find it on a GPU."""
    with_devices(monkeypatch, 1)
    monkeypatch.setattr(triton_runtime, "interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old Card 2000")


@pytest.mark.parametrize("capability", [(6, 0), (7, 5)])
def test_a_gpu_that_is_too_old_falls_back_and_says_so(monkeypatch, caplog, capability):
    on_a_gpu(monkeypatch, capability)
    reason = f"Old Card 2000 has compute capability {capability[0]}.{capability[1]}; the kernels need 8.0 or newer"
    assert resolve("auto", CUDA) == Backend("reference", f"auto: {reason}")
    assert available()["fused"] == (False, reason)
    assert resolve("fused", CUDA) == Backend("reference", f"fused was asked for, but {reason}")
    assert reason in caplog.text


def test_without_triton_the_reference_is_used_and_says_so(monkeypatch, caplog):
    on_a_gpu(monkeypatch, (9, 0))
    monkeypatch.setattr(triton_runtime, "_triton", lambda: (None, "No module named 'triton'"))
    reason = "Triton is not installed (No module named 'triton')"
    assert resolve("auto", CUDA) == Backend("reference", f"auto: {reason}")
    assert resolve("fused", CUDA) == Backend("reference", f"fused was asked for, but {reason}")
    assert reason in caplog.text


def test_a_gpu_with_triton_runs_fused(monkeypatch):
    on_a_gpu(monkeypatch, (8, 0))
    assert resolve("auto", CUDA).name == resolve("fused", CUDA).name == "fused"


def test_without_a_gpu_fused_works_in_the_interpreter_only(monkeypatch):
    with_devices(monkeypatch, 0)
    monkeypatch.setattr(triton_runtime, "interpreting", lambda: True)
    assert resolve("fused", CPU).name == "fused" and available()["fused"][0]
    monkeypatch.setattr(triton_runtime, "interpreting", lambda: False)
    assert available()["fused"] == (False, "Triton kernels need a CUDA device, not cpu")
    assert resolve("fused", CPU) == Backend("reference", "fused was asked for, but Triton kernels need a CUDA device, not cpu")


@pytest.mark.parametrize("name", ["", "Fused", "cuda", "triton"])
def test_unknown_backend_lists_the_known_ones(name):
    with pytest.raises(UserError, match=rf"{name!r}.*auto, reference, fused"):
        resolve(name, CPU)


def test_auto_device(monkeypatch):
    with_devices(monkeypatch, 0)
    assert resolve_device("auto") == CPU
    with_devices(monkeypatch, 1)
    assert resolve_device("auto").type == "cuda"


def test_devices_that_exist(monkeypatch):
    with_devices(monkeypatch, 2)
    assert resolve_device("cpu") == CPU
    assert resolve_device("cuda") == torch.device("cuda")
    assert resolve_device("cuda:1") == torch.device("cuda", 1)


@pytest.mark.parametrize(("name", "count"), [("cuda", 0), ("cuda:0", 0), ("cuda:2", 2)])
def test_cuda_device_that_is_not_there(monkeypatch, name, count):
    with_devices(monkeypatch, count)
    with pytest.raises(BackendError, match=rf"{name!r} does not exist: PyTorch sees {count} .*device=.cpu."):
        resolve_device(name)


@pytest.mark.parametrize("name", ["", "gpu", "cuda:x", "cpu,cuda", "mps", "meta"])
def test_unusable_device_names(name):
    with pytest.raises(BackendError, match=rf"{name!r}.*cpu, cuda, cuda:N or auto"):
        resolve_device(name)
