"""Which implementation of the channel masks runs: the faster of those that agree with plain PyTorch, where the extension has the code."""

from __future__ import annotations

import logging
import runpy
from pathlib import Path

import pytest
import torch

from der_fast import native
from der_fast.kernels import choices
from der_fast.kernels.channel_masks import measured
from der_fast.kernels.channel_masks.measured import FUSED, NATIVE, REFERENCE, fastest_backend
from der_fast.kernels.choices import Choices
from der_fast.model.architecture import build_architecture
from der_fast.model.layout import MaskLayout
from der_fast.model.masks import ChannelMasks

structure_of = runpy.run_path(str(Path(__file__).with_name("mask_structures.py")))["structure_of"]
DEVICE = torch.device("cuda" if torch.cuda.is_available() and native.build_info()["cuda"] else "cpu")


def logits_of(structure):
    return torch.randn(structure.channels, generator=torch.Generator().manual_seed(0)).to(DEVICE)


@pytest.fixture
def times(monkeypatch):
    def set_times(**milliseconds):
        offered = []

        def measure(runs, device):
            for run in runs.values():
                run()
            offered.append(set(runs))
            return {name: milliseconds[name] for name in runs}

        monkeypatch.setattr(choices, "measure", measure)
        return offered

    return set_times


@pytest.mark.parametrize("faster", [FUSED, NATIVE])
def test_the_faster_of_two_that_agree_is_taken_and_remembered(times, tmp_path, faster):
    offered = times(**{FUSED: 2.0, NATIVE: 2.0, faster: 1.0})
    structure, path = structure_of("odd", DEVICE), tmp_path / "choices.json"
    logits = logits_of(structure)
    for _ in range(2):
        assert fastest_backend(logits, 3.0, structure, Choices(path)) == faster
    assert offered == [{FUSED, NATIVE}] and not logits.requires_grad
    scale = torch.tensor(3.0, device=DEVICE)
    with torch.no_grad():
        assert fastest_backend(logits.requires_grad_(), scale, structure, Choices(path)) == faster
    assert logits.grad is None


@pytest.mark.parametrize("wrong", [FUSED, NATIVE])
@pytest.mark.parametrize("part", [0, 1, 2])
def test_one_that_computes_something_else_is_not_taken_however_fast(times, monkeypatch, caplog, wrong, part):
    times(**{FUSED: 2.0, NATIVE: 2.0, wrong: 1.0})
    right = measured.masks_and_sparsity

    def spoilt(logits, scale, structure, *, backend):
        masks, loss = right(logits, scale, structure, backend=backend)
        if backend != wrong:
            return masks, loss
        # One mask, the loss, or one gradient.
        if part == 0:
            masks = masks * (1 + 0.2 * (torch.arange(len(masks), device=masks.device) == int(masks.argmax())))
        elif part == 1:
            loss = loss * 1.2
        else:
            loss = loss + (logits.abs().sum() - logits.detach().abs().sum())
        return masks, loss

    monkeypatch.setattr(measured, "masks_and_sparsity", spoilt)
    structure = structure_of("odd", DEVICE)
    with caplog.at_level(logging.WARNING):
        assert fastest_backend(logits_of(structure), 3.0, structure, Choices()) == ({FUSED, NATIVE} - {wrong}).pop()
    assert f"channel masks run as {wrong!r} is not used, because it computes something else" in caplog.text


def test_without_cuda_code_in_the_extension_only_tritons_is_offered(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for built in (True, False):
        monkeypatch.setattr(native, "build_info", lambda built=built: {"cuda": built})
        assert measured._has_native_code(cpu) and measured._has_native_code(gpu) == built
    monkeypatch.setattr(native, "available", lambda: (False, "not built"))
    assert not measured._has_native_code(cpu)
    monkeypatch.setattr(choices, "measure", lambda runs, device: pytest.fail("there is nothing to choose from"))
    structure, store = structure_of("odd", DEVICE), Choices()
    assert fastest_backend(logits_of(structure), 3.0, structure, store) == FUSED


@pytest.mark.parametrize("error", [RuntimeError("no kernel image"), torch.OutOfMemoryError("CUDA out of memory")])
@pytest.mark.parametrize("failing", [{FUSED}, {NATIVE}, {FUSED, NATIVE}])
def test_what_fails_is_left_out_in_one_line(times, monkeypatch, caplog, failing, error):
    times(**{FUSED: 2.0, NATIVE: 1.0})
    right = measured.masks_and_sparsity

    def broken(logits, scale, structure, *, backend):
        if backend in failing:
            raise error
        return right(logits, scale, structure, backend=backend)

    monkeypatch.setattr(measured, "masks_and_sparsity", broken)
    structure = structure_of("odd", DEVICE)
    with caplog.at_level(logging.WARNING):
        chosen = fastest_backend(logits_of(structure), 3.0, structure, Choices())
    assert chosen == ({FUSED, NATIVE, REFERENCE} - failing - ({REFERENCE} if len(failing) == 1 else set())).pop()
    (record,) = caplog.records
    assert f"failed: {type(error).__name__}: {error}" in record.getMessage()


def test_masks_of_a_network_take_it(monkeypatch):
    asked = []
    monkeypatch.setattr("der_fast.model.masks.fastest_backend", lambda *arguments: asked.append(arguments) or NATIVE)
    layout = MaskLayout(build_architecture("resnet20", width=2))
    masks = ChannelMasks(layout, low=-1.0, high=1.0, clamp=6.0, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    found = [masks.with_sparsity(3.0, backend="auto") for _ in range(2)]
    for one, other in zip(found[1], masks.with_sparsity(3.0, backend=NATIVE), strict=True):
        assert torch.equal(one, other)
    assert len(asked) == 1 and asked[0][0] is masks.logits
