"""What bfloat16 costs on this processor is measured once and said in one line."""

from __future__ import annotations

import pytest
import torch

from der_fast.model.architecture import build_architecture
from der_fast.training import precision
from der_fast.training.learner import Learner
from der_fast.training.precision import PrecisionTimes, measured_precision, precision_note

SMALL = build_architecture("resnet20", width=2)


def test_both_times_are_said_and_what_follows():
    assert str(PrecisionTimes(10.0, 82.5, 8)) == (
        "a training step of 8 image(s) takes 82.5 ms in bf16 and 10 ms in fp32 on this processor: bf16 is slower here, use fp32 "
        "(runtime.precision)"
    )
    assert "slower" not in str(PrecisionTimes(10.0, 5.0, 8))


def timed(monkeypatch, seconds):
    """Count the steps that are measured: (images, whether in bfloat16)."""
    steps = []

    def step(extractor, batch, *, bf16):
        steps.append((len(batch), bf16))
        return seconds(len(batch), bf16)

    monkeypatch.setattr(precision, "_step", step)
    return steps


def test_a_slow_network_is_measured_on_few_images(monkeypatch):
    steps = timed(monkeypatch, lambda images, bf16: 0.02 * images * (9 if bf16 else 1))
    times = measured_precision(SMALL, (8, 8), 128)
    assert (times.images, times.fp32, times.bf16) == (4, pytest.approx(80.0), pytest.approx(720.0))
    # What is far behind is not measured again.
    assert steps[-1] == (4, True) and sum(bf16 for _, bf16 in steps) == 2


def test_close_times_are_the_best_of_three(monkeypatch):
    steps = timed(monkeypatch, lambda images, bf16: 0.001)
    assert measured_precision(SMALL, (8, 8), 16).images == 16
    assert steps.count((16, True)) == steps.count((16, False)) == 3


def test_a_real_measurement_leaves_the_random_numbers_alone():
    before = torch.random.get_rng_state()
    times = measured_precision(SMALL, (8, 8), 4)
    assert times.fp32 > 0 and times.bf16 > 0 and times.images == 4
    assert torch.equal(torch.random.get_rng_state(), before)


def test_only_bfloat16_on_a_processor_is_measured(tiny):
    cpu, size = torch.device("cpu"), (8, 8)
    assert precision_note(tiny(), cpu, SMALL, size) is None
    assert precision_note(tiny({"runtime.precision": "bf16"}), torch.device("cuda"), SMALL, size) is None
    assert precision_note(tiny({"runtime.precision": "fp32"}), cpu, SMALL, size) is None
    assert "ms in bf16 and" in precision_note(tiny({"runtime.precision": "bf16"}), cpu, SMALL, size)


def test_what_fp32_costs_on_a_gpu_with_tensor_cores_is_said(tiny, monkeypatch):
    config, cuda = tiny({"runtime.precision": "fp32"}), torch.device("cuda")
    for capability, said in (((9, 0), True), ((7, 5), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        note = precision_note(config, cuda, SMALL, (8, 8))
        assert (note is not None and "without tensor cores" in note and "\n" not in note) == said


def test_a_learner_says_it_once(tiny, synthetic, watcher):
    learner = Learner(tiny({"runtime.precision": "bf16", "first.epochs": 1, "later.epochs": 1}), observer=watcher)
    for names in ("ab", "cd"):
        learner.learn(synthetic(names))
    assert sum("ms in bf16 and" in message for message in watcher.messages) == 1
