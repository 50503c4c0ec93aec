"""Makes it safe to compute in a process that was forked after its parent had computed.

PyTorch's CPU code runs on OpenMP threads (GNU's OpenMP on Linux). A forked process inherits the parent's record of its threads but not the
threads themselves, so the first operation that needs several waits for ever. With one thread there is nothing to wait for.
"""

from __future__ import annotations

import functools
import logging
import os

import torch

from der_fast.errors import BackendError, Spelling

_log = logging.getLogger(__name__)

CPU = torch.device("cpu")

# The process in which der_fast last computed, and whether that was ever a different process from this one.
_process: int | None = None
_forked = False


def fit_to_compute(device: torch.device = CPU) -> None:
    """Make this process fit to compute. Call it before anything is computed and after the number of threads is set.

    In a process that was forked after der_fast had computed, this limits PyTorch to one thread and logs it.

    Args:
        device: where it will compute.

    Raises:
        BackendError: `device` is a GPU, but this process was forked from one that used GPUs.
    """
    global _process, _forked
    refuse_cuda_after_fork(device)
    here = os.getpid()
    _forked = _forked or _process not in (None, here)
    _process = here
    if _forked and torch.get_num_threads() > 1:
        torch.set_num_threads(1)
        _say_so(here)


@functools.cache
def _say_so(process: int) -> None:
    """Warn once in every process."""
    _log.warning(
        "process %d was forked from one that had already computed, so it computes with one thread; for more, fork before anything is "
        "loaded, or start processes with 'spawn'",
        process,
    )


def refuse_cuda_after_fork(device: torch.device) -> None:
    """Raise BackendError if `device` is a GPU and this process was forked from one that used GPUs: CUDA does not support that."""
    if device.type == "cuda" and torch.cuda._is_in_bad_fork():
        raise BackendError(
            "this process was forked from one that used a GPU, so it cannot use GPUs itself: fork before anything is loaded, start "
            "processes with 'spawn' (multiprocessing.get_context('spawn')), or compute on the CPU with ",
            Spelling("--device cpu", "device='cpu'"),
        )
