"""Settings of the process: CPU threads, the C allocator and the current GPU."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import sys

import torch

from der_fast.config.schema import RuntimeConfig
from der_fast.errors import ConfigError
from der_fast.kernels import choices
from der_fast.kernels.forked import fit_to_compute

# Parameters of glibc's mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST = 1 << 30
_CPU = torch.device("cpu")


def keep_large_buffers() -> bool:
    """Let glibc keep freed memory instead of returning every large buffer to the system; returns whether it did.

    By default each activation is a new mapping, whose pages the kernel must zero in every batch.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST)) and bool(mallopt(_M_TRIM_THRESHOLD, _LARGEST))


def refuse_several_processes() -> None:
    """Refuse to run as one of several processes of torchrun: each would train the same run and write to the same folder.

    Raises:
        ConfigError: there are several.
    """
    world = os.environ.get("WORLD_SIZE", "1")
    if "TORCHELASTIC_RUN_ID" in os.environ and world != "1":
        raise ConfigError(
            f"torchrun started {world} processes, but a run needs exactly one; start it without torchrun, or with one process"
        )


def refuse_rerun() -> None:
    """Refuse to train in a process that `multiprocessing` is starting: it first runs the user's script again.

    Raises:
        ConfigError: this is such a process.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise ConfigError(
            "a process that this script has started runs the script again, and would train again: put what must run only once under "
            '`if __name__ == "__main__":`, as in the README\'s example'
        )


def apply_runtime(config: RuntimeConfig, device: torch.device = _CPU) -> None:
    """Apply threads and allocator settings to this process, and make `device` the current GPU if it is a numbered one.

    On a GPU cuDNN may time its algorithms for every new shape, unless an earlier run's choices are pinned: then it must repeat itself.
    """
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = not choices.shared().pinned
    if device.type == "cuda" and device.index is not None:
        # Triton launches on the current device, even if its tensors are on another.
        torch.cuda.set_device(device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    fit_to_compute(device)
    if config.tune_allocator:
        keep_large_buffers()
