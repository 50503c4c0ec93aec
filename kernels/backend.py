"""Which implementation of the kernels runs: one decision, made once, with its reason."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from der_fast.errors import BackendError

BACKENDS = ("auto", "reference", "fused")


@dataclass(frozen=True)
class Backend:
    """The chosen implementation ('reference' or 'fused') and why it was chosen."""

    name: str
    reason: str


def available() -> dict[str, tuple[bool, str]]:
    """Return for every backend whether it works here, and why (not)."""
    return {
        "reference": (True, "eager PyTorch; works on every device"),
        "fused": (False, "this version has no fused kernels yet"),
    }


def resolve(backend: str, device: torch.device) -> Backend:
    """Choose the implementation for `device`.

    Args:
        backend: 'auto', 'reference' or 'fused'.
        device: where the network runs.

    Raises:
        BackendError: an unknown name, or a backend that does not work here.
    """
    if backend not in BACKENDS:
        raise BackendError(f"unknown backend {backend!r}: choose from {', '.join(BACKENDS)}")
    works, reason = available()["fused"]
    if backend == "fused" and not works:
        raise BackendError(f"backend 'fused' does not work here: {reason}. Use --backend reference or auto.")
    if backend == "reference":
        return Backend("reference", "asked for")
    if device.type == "cuda" and works:
        return Backend("fused", "auto: CUDA device")
    return Backend("reference", f"auto: {reason}" if device.type == "cuda" else "auto: no CUDA device in use")


def resolve_device(name: str) -> torch.device:
    """Turn 'auto', 'cpu', 'cuda' or 'cuda:1' into a device that exists; raises BackendError where it does not."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise BackendError(f"unknown device {name!r}: use cpu, cuda, cuda:N or auto") from error
    if device.type not in ("cpu", "cuda"):
        raise BackendError(f"device {name!r} is not supported: use cpu, cuda, cuda:N or auto")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise BackendError(f"device {name!r} is not there: PyTorch sees {torch.cuda.device_count()} CUDA device(s). Use --device cpu.")
    return device
