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
        measured: for 'fused', whether each part uses the implementation measured to be fastest here, cuDNN's convolutions
            included; if False, der_fast's kernels run wherever they can.
    """

    name: str
    reason: str
    measured: bool = False


def available(device: torch.device | None = None) -> dict[str, tuple[bool, str]]:
    """Return for every backend whether it works on `device`, and why or why not.

    Args:
        device: defaults to `resolve_device('auto')`.
    """
    return {
        "reference": (True, "eager PyTorch; works on every device"),
        "fused": triton_runtime.usable(resolve_device("auto") if device is None else device),
    }


def resolve(backend: str, device: torch.device) -> Backend:
    """Choose the implementation for `device`.

    Where 'fused' does not work (no Triton, no GPU, or a GPU that is too old) this returns the reference and logs a warning with the
    reason: a run that started on a GPU must be able to continue without one.

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
        _log.warning("backend 'fused' does not work here, so the reference is used instead: %s", reason)
        return Backend("reference", f"fused was asked for, but {reason}")
    if backend == "fused":
        return Backend("fused", f"asked for; {reason}")
    if works:
        return Backend("fused", f"auto: {reason}, the faster of cuDNN and der_fast's kernels as measured", measured=True)
    return Backend("reference", f"auto: {reason}")


def resolve_device(name: str) -> torch.device:
    """Turn 'auto', 'cpu', 'cuda' or 'cuda:1' into a device; raise BackendError where it does not exist or is unusable after a fork."""
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
        raise BackendError(f"device {name!r} does not exist: PyTorch sees {torch.cuda.device_count()} CUDA device(s). Use ", on_cpu, ".")
    return device
