from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from der_fast.config.schema import Config, RuntimeConfig
from der_fast.config.tree import replace_keys
from der_fast.data import MemorySource
from der_fast.errors import CheckpointError, ConfigError
from der_fast.kernels import choices
from der_fast.kernels.choices import Choices
from der_fast.training import runtime
from der_fast.training.run import learn_more, run_protocol
from der_fast.training.runtime import apply_runtime, keep_large_buffers, refuse_several_processes

CPU = torch.device("cpu")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_the_allocator_is_told_once_for_each_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int]] = []

    class Library:
        @staticmethod
        def mallopt(parameter: int, value: int) -> int:
            told.append((parameter, value))
            return 1

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library)
    assert keep_large_buffers()
    # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h.
    assert told == [(-3, 1 << 30), (-1, 1 << 30)]


def test_elsewhere_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not keep_large_buffers()
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert not keep_large_buffers()


@pytest.mark.parametrize("tune", [True, False])
def test_threads_and_allocator_are_applied(tune: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []
    monkeypatch.setattr(runtime, "keep_large_buffers", lambda: calls.append(True))
    before = torch.get_num_threads()
    apply_runtime(RuntimeConfig(threads=None, tune_allocator=tune), CPU)
    assert torch.get_num_threads() == before
    apply_runtime(RuntimeConfig(threads=before + 1, tune_allocator=False), CPU)
    assert torch.get_num_threads() == before + 1
    torch.set_num_threads(before)
    assert calls == [True] * tune


def test_a_numbered_gpu_becomes_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for name in ("cpu", "cuda", "cuda:1"):
        apply_runtime(RuntimeConfig(threads=None, tune_allocator=False), torch.device(name))
    assert chosen == [torch.device("cuda", 1)]


def test_several_processes_of_torchrun_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny: Callable[..., Config], synthetic: Callable[..., MemorySource]
) -> None:
    refuse_several_processes()
    # A batch system may say so of jobs that have nothing to do with each other.
    monkeypatch.setenv("WORLD_SIZE", "2")
    refuse_several_processes()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    begun = (
        lambda: run_protocol(tiny(), synthetic("abc"), synthetic("abc"), tmp_path / "run"),
        lambda: learn_more(tmp_path / "run", synthetic("ab"), None, tiny()),
    )
    for begin in begun:
        with pytest.raises(ConfigError, match="torchrun started 2 processes, but a run needs exactly one"):
            begin()
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("WORLD_SIZE", "1")
    refuse_several_processes()


def test_cudnn_times_its_algorithms_unless_choices_are_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(runtime, "fit_to_compute", lambda device: None)
    own = Choices()
    monkeypatch.setattr(choices, "shared", lambda: own)
    config = RuntimeConfig(tune_allocator=False)
    apply_runtime(config, CPU)
    assert not torch.backends.cudnn.benchmark
    apply_runtime(config, torch.device("cuda"))
    assert torch.backends.cudnn.benchmark
    own.pin({})
    apply_runtime(config, torch.device("cuda"))
    assert torch.backends.cudnn.benchmark
    own.pin({"a machine|a shape": "cudnn"})
    apply_runtime(config, torch.device("cuda"))
    assert not torch.backends.cudnn.benchmark


def test_a_run_keeps_the_precision_that_it_began_with(
    tmp_path: Path, tiny: Callable[..., Config], synthetic: Callable[..., MemorySource]
) -> None:
    images = synthetic("abcd"), synthetic("abcd", 3, 8, 1)
    config = tiny({"protocol.name": "B0-2", "runtime.precision": "bf16", "runtime.device": "cpu", "first.epochs": 1, "later.epochs": 1})
    run_protocol(config, *images, tmp_path / "run")
    left_open = replace_keys(config, {"runtime.precision": "auto"})
    assert run_protocol(left_open, *images, tmp_path / "run", resume=True).config.runtime.precision == "bf16"
    assert run_protocol(left_open, *images, tmp_path / "other").config.runtime.precision == "fp32"
    with pytest.raises(CheckpointError, match=r"runtime.precision was 'bf16', now 'fp32'"):
        run_protocol(replace_keys(config, {"runtime.precision": "fp32"}), *images, tmp_path / "run", resume=True)
