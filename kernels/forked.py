"""Computing in a process that was forked from one which had computed.

PyTorch's CPU code runs on threads of OpenMP, GNU's on Linux. A forked process inherits what its parent knew of the threads that it had
started, and not the threads, so the first operation that wants several of them waits for ever. One thread waits for none.
"""

from __future__ import annotations

import functools
import logging
import os

import torch

from der_fast.errors import BackendError, Spelling

_log = logging.getLogger(__name__)

CPU = torch.device("cpu")

# The process in which something of ours computed last, and whether that was ever another than this one.
_process: int | None = None
_forked = False


def fit_to_compute(device: torch.device = CPU) -> None:
    """Make this process fit to compute: call it before anything does, and after the number of threads was set.

    In a process that was forked after something of ours had computed, PyTorch is held to one thread; the log says so.

    Args:
        device: where it will compute.

    Raises:
        BackendError: on a GPU, but this process was forked from one that used GPUs.
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
        "process %d was forked from one that had computed already, so it computes with one thread; for more, fork before anything is "
        "loaded, or start processes by 'spawn'",
        process,
    )


def refuse_cuda_after_fork(device: torch.device) -> None:
    """Raise BackendError where `device` is a GPU, and the process from which this one was forked used GPUs: CUDA does not bear that."""
    if device.type == "cuda" and torch.cuda._is_in_bad_fork():
        raise BackendError(
            "this process was forked from one that used a GPU, and cannot use GPUs itself: fork before anything is loaded, start processes "
            "by 'spawn' (multiprocessing.get_context('spawn')), or compute on the CPU by ",
            Spelling("--device cpu", "device='cpu'"),
        )
