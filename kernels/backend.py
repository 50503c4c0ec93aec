"""Which implementation of the kernels runs: one decision, made once, with its reason."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from der_fast.errors import BackendError, Spelling
from der_fast.kernels import triton_runtime
from der_fast.kernels.forked import refuse_cuda_after_fork

BACKENDS = ("auto", "reference", "fused")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Backend:
    """The chosen implementation and why it was chosen.

    Attributes:
        name: 'reference' or 'fused'.
        reason: for people.
        measured: of 'fused', whether every part runs the way that is fastest here, cuDNN's convolutions among them; otherwise our
            kernels run wherever they can.
    """

    name: str
    reason: str
    measured: bool = False


def available(device: torch.device | None = None) -> dict[str, tuple[bool, str]]:
    """Return for every backend whether it works on `device`, and why (not).

    Args:
        device: default: the one that `resolve_device('auto')` names.
    """
    return {
        "reference": (True, "eager PyTorch; works on every device"),
        "fused": triton_runtime.usable(resolve_device("auto") if device is None else device),
    }


def resolve(backend: str, device: torch.device) -> Backend:
    """Choose the implementation for `device`.

    'fused' where it does not work (no Triton, no GPU, or one that is too old) is the reference, and a warning says why: a run that was
    made on a GPU must go on where there is none.

    Args:
        backend: 'auto', 'reference' or 'fused'.
        device: where the network runs.

    Raises:
        BackendError: an unknown name.
    """
    if backend not in BACKENDS:
        raise BackendError(f"unknown backend {backend!r}: choose from {', '.join(BACKENDS)}")
    if backend == "reference":
        return Backend("reference", "asked for")
    if backend == "auto" and device.type != "cuda":
        return Backend("reference", "auto: no CUDA device in use")
    works, reason = available(device)["fused"]
    if backend == "fused" and not works:
        _log.warning("backend 'fused' does not work here, the reference is used instead: %s", reason)
        return Backend("reference", f"fused was asked for, but {reason}")
    if backend == "fused":
        return Backend("fused", f"asked for; {reason}")
    if works:
        return Backend("fused", f"auto: {reason}, the fastest of cuDNN and our kernels as measured", measured=True)
    return Backend("reference", f"auto: {reason}")


def resolve_device(name: str) -> torch.device:
    """Turn 'auto', 'cpu', 'cuda' or 'cuda:1' into a device that exists; BackendError where it does not, or not after a fork."""
    if name == "auto":
        refuse_cuda_after_fork(torch.device("cuda"))
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise BackendError(f"unknown device {name!r}: use cpu, cuda, cuda:N or auto") from error
    if device.type not in ("cpu", "cuda"):
        raise BackendError(f"device {name!r} is not supported: use cpu, cuda, cuda:N or auto")
    refuse_cuda_after_fork(device)
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        on_cpu = Spelling("--device cpu", 'device="cpu"')
        raise BackendError(f"device {name!r} is not there: PyTorch sees {torch.cuda.device_count()} CUDA device(s). Use ", on_cpu, ".")
    return device
