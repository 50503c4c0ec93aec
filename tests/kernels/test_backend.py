"""Which backend and device are chosen, and what is said where they do not work."""

from __future__ import annotations

import pytest
import torch

from der_fast.errors import BackendError, UserError
from der_fast.kernels import backend
from der_fast.kernels.backend import Backend, available, resolve, resolve_device

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def fused_works(monkeypatch, works):
    monkeypatch.setattr(backend, "available", lambda: {"reference": (True, "eager"), "fused": (works, "because of the weather")})


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
        (CUDA, True, "fused", "CUDA device"),
    ],
)
def test_auto_is_fused_on_a_cuda_device_where_that_works(monkeypatch, device, works, name, words):
    fused_works(monkeypatch, works)
    choice = resolve("auto", device)
    assert choice.name == name
    assert choice.reason.startswith("auto: ") and words in choice.reason


def test_fused_says_why_it_does_not_work(monkeypatch):
    fused_works(monkeypatch, False)
    with pytest.raises(BackendError, match=r"'fused' does not work here: because of the weather.*--backend reference"):
        resolve("fused", CUDA)


def test_what_is_offered_today_can_be_chosen():
    for name, (works, _) in available().items():
        if works:
            assert resolve(name, CPU).name == name
        else:
            with pytest.raises(BackendError, match=name):
                resolve(name, CPU)


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
    with pytest.raises(BackendError, match=rf"{name!r} is not there: PyTorch sees {count} .*--device cpu"):
        resolve_device(name)


@pytest.mark.parametrize("name", ["", "gpu", "cuda:x", "cpu,cuda", "mps", "meta"])
def test_unusable_device_names(name):
    with pytest.raises(BackendError, match=rf"{name!r}.*cpu, cuda, cuda:N or auto"):
        resolve_device(name)
