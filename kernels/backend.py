"""Which implementation of the kernels runs: one decision, made once, with its reason."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from der_fast.errors import BackendError, Spelling
from der_fast.kernels import triton_runtime
from der_fast.kernels.forked import refuse_cuda_after_fork

BACKENDS = ("auto", "reference", "fused")
PRECISIONS = ("auto", "fp32", "bf16")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Backend:
    """The chosen implementation and why it was chosen.

    Attributes:
        name: 'reference' or 'fused'.
        reason: for people.
        measured: for 'fused', whether each part uses the implementation measured to be fastest here, cuDNN's convolutions
            included; if False, der_fast's kernels run wherever they can, as tests and benchmarks want.
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
    if not works:
        return Backend("reference", f"auto: {reason}")
    asked = "asked for" if backend == "fused" else "auto"
    if device.type != "cuda":
        # In the interpreter, times mean nothing.
        return Backend("fused", f"{asked}: {reason}")
    return Backend("fused", f"{asked}: {reason}, the fastest of cuDNN and der_fast's kernels as measured", measured=True)


def resolve_precision(precision: str, device: torch.device) -> str:
    """Turn 'auto', 'fp32' or 'bf16' into what extractors compute in on `device`: 'auto' is bf16 on a GPU that has it, else fp32.

    Raises:
        BackendError: 'bf16' on a GPU without bfloat16 arithmetic, or an unknown name.
    """
    if precision not in PRECISIONS:
        raise BackendError(f"unknown precision {precision!r}: choose from {', '.join(PRECISIONS)}")
    if device.type != "cuda":
        return "fp32" if precision == "auto" else precision
    capability = torch.cuda.get_device_capability(device)
    has_bf16 = capability >= triton_runtime.OLDEST
    if precision == "auto":
        return "bf16" if has_bf16 else "fp32"
    if precision == "bf16" and not has_bf16:
        raise BackendError(
            f"{torch.cuda.get_device_name(device)} (compute capability {capability[0]}.{capability[1]}) has no bfloat16 arithmetic; use ",
            Spelling("--set runtime.precision=fp32", 'precision="fp32"'),
            ".",
        )
    return precision


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
