"""Pack folded, compacted weights into one arena."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from der_fast import native
from der_fast.kernels.affine import EPSILON
from der_fast.kernels.compact.reference import COPY, LAYOUTS, SCALE, SHIFT, WEIGHT, Job, Norm, compact_reference, value_of

__all__ = ["COPY", "LAYOUTS", "SCALE", "SHIFT", "WEIGHT", "Job", "Norm", "compact", "compact_reference", "value_of"]


def compact(jobs: Sequence[Job], storage: Tensor, *, layout: str = "KCRS", epsilon: float = EPSILON, threads: int = 0) -> int:
    """Fill the arena `storage` exactly as `compact_reference` does, bit for bit.

    Returns the first job with an entry that is not finite, or -1.

    Args:
        jobs: in ascending order of offsets; all weights on the storage's device.
        storage: uint8 (bytes,), at a multiple of 64 bytes, on the CPU or a CUDA device; every byte is written.
        layout: 'KCRS' or 'KRSC'.
        epsilon: added to the variance.
        threads: maximum number of CPU threads; 0 for PyTorch's number.

    Raises:
        ValueError: a job or the storage does not fit; the message names it.
        BackendError: the native module is not built, or built without CUDA where the storage lies on a CUDA device.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, not {layout!r}")
    device = storage.device
    for number, job in enumerate(jobs):
        for name, tensor in _tensors(job):
            wanted = torch.device("cpu") if name in ("rows", "columns") else device
            if tensor.device != wanted:
                raise ValueError(f"jobs[{number}].{name} must be on {wanted}, not on {tensor.device}")
    rows, code = [_facts(job) for job in jobs], LAYOUTS.index(layout)
    if device.type == "cuda":
        stream = torch.cuda.current_stream(device).cuda_stream
        index = torch.cuda.current_device() if device.index is None else device.index
        indices = sum(len(part) for job in jobs for part in (job.rows, job.columns) if part is not None)
        # Allocated by PyTorch, so that a table of a few kilobytes fits even on a device whose memory PyTorch has filled.
        workspace = torch.empty(native.pack_cuda_workspace(len(jobs), indices), dtype=torch.uint8, device=device)
        facts = (rows, native.facts_of(storage), native.facts_of(workspace))
        return native.pack_cuda(*facts, layout=code, epsilon=epsilon, device=index, stream=stream)
    if device.type != "cpu":
        raise ValueError(f"storage must be on the CPU or a CUDA device, not on {device}")
    return native.pack(rows, native.facts_of(storage), layout=code, epsilon=epsilon, threads=threads or torch.get_num_threads())


def _tensors(job: Job) -> list[tuple[str, Tensor]]:
    named = {"rows": job.rows, "columns": job.columns, "weight": job.weight}
    if job.norm is not None:
        named |= {"gamma": job.norm.weight, "beta": job.norm.bias, "mean": job.norm.mean, "variance": job.norm.variance}
    return [(name, tensor) for name, tensor in named.items() if tensor is not None]


def _facts(job: Job) -> tuple[Any, ...]:
    norm = None
    if job.norm is not None:
        norm = tuple(native.facts_of(tensor) for tensor in (job.norm.weight, job.norm.bias, job.norm.mean, job.norm.variance))
    columns, weight = (None if tensor is None else native.facts_of(tensor) for tensor in (job.columns, job.weight))
    return (job.kind, job.offset, native.dtype_code(job.dtype), native.facts_of(job.rows), columns, weight, norm)
