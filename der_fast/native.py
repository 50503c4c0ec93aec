"""The native module der_fast._C, behind typed functions; if it was not built, calling one of them says how to build it.

The module knows nothing of PyTorch: it takes addresses, shapes, strides and dtype codes, checks them, and releases the GIL while it
works. It refuses an argument with a ValueError that begins with the argument's name.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from der_fast.errors import BackendError

MODULE = "der_fast._C"
# The module's codes for PyTorch's dtypes.
DTYPES = {
    "torch.float64": 0,
    "torch.float32": 1,
    "torch.bfloat16": 2,
    "torch.float16": 3,
    "torch.int32": 4,
    "torch.bool": 5,
    "torch.uint8": 6,
}

TensorFacts = tuple[int, tuple[int, ...], tuple[int, ...], int]


class TensorLike(Protocol):
    """The parts of a `torch.Tensor` that are needed here."""

    @property
    def shape(self) -> Sequence[int]: ...
    @property
    def dtype(self) -> Any: ...
    def data_ptr(self) -> int: ...
    def stride(self) -> Sequence[int]: ...


@functools.cache
def _load() -> tuple[Any, str]:
    try:
        return importlib.import_module(MODULE), ""
    except ImportError as error:
        return None, str(error)


def _module() -> Any:
    module, reason = _load()
    if module is None:
        raise BackendError(
            f"the native module {MODULE} is not there ({reason}). Build it with `pip install .` (or `pip install -e .`) in der_fast's "
            "source tree; this needs a C++20 compiler such as g++ 11 or newer."
        )
    return module


def available() -> tuple[bool, str]:
    """Return whether the native module can be imported, and what it was built with or why it cannot."""
    module, reason = _load()
    if module is None:
        return False, reason
    info = module.build_info()
    return True, f"{info['compiler']}, " + (f"CUDA {info['nvcc']} for {info['cuda_architectures']}" if info["cuda"] else "without CUDA")


def binary() -> Path | None:
    """Return the file that the module was loaded from; None where it was not built."""
    module, _ = _load()
    return None if module is None else Path(module.__file__)


def build_info() -> dict[str, Any]:
    """Return compiler, flags, C++ standard, pybind11's version, and whether CUDA is included (with which nvcc, for which architectures)."""
    info: dict[str, Any] = _module().build_info()
    return info


def dtype_code(dtype: object) -> int:
    """Return the module's code for a `torch.dtype`; raises ValueError for one that it does not know."""
    try:
        return DTYPES[str(dtype)]
    except KeyError:
        raise ValueError(f"the native module does not know {dtype}, only {', '.join(DTYPES)}") from None


def facts_of(tensor: TensorLike) -> TensorFacts:
    """Return address, shape, strides (in elements) and dtype code; the tensor must outlive the call that receives it."""
    return tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()), dtype_code(tensor.dtype)


def plan(network: dict[str, Any], keep: TensorFacts, *, align: int, weight_dtype: int, vector_dtype: int) -> dict[str, Any]:
    """Decide which channels stay and where every folded tensor is stored; a pure function.

    Args:
        network: `groups` (full widths), `image_channels`, `streams` and `inner` (lists of group numbers: every residual stream, and each
            block's inner groups), `units` (tuples (kind, block, when, source groups, target groups, kernel, norm), see csrc/plan.hpp).
        keep: boolean (C,), the concatenated masks of all groups.
        align: stored widths are multiples of this.
        weight_dtype, vector_dtype: dtype codes; they determine the offsets.

    Returns:
        `constant`, `lost` (per block), `keep` (uint8 (C,)), `widths` and `stored` (per group), `pieces` ((unit, part, shape, offset in
        bytes) for every stored tensor), `rows` and `columns` (per unit: int32 source indices, -1 for padding), `bytes`, `parameters`,
        `elements`, `stored_elements`.

    Raises:
        ValueError: the description contradicts itself, or `keep` has another length or dtype.
        BackendError: the native module is not built.
    """
    found: dict[str, Any] = _module().plan(network, keep, align, weight_dtype, vector_dtype)
    return found


def pack(jobs: list[tuple[Any, ...]], storage: TensorFacts, *, layout: int, epsilon: float, threads: int) -> int:
    """Fill an arena on the CPU; every byte of it is written.

    Args:
        jobs: (kind, offset, dtype code, rows, columns, weight, (γ, β, μ, σ²)), see kernels/compact/compact.cuh; ascending offsets.
        storage: uint8, at a multiple of 64 bytes.
        layout: 0 for KCRS, 1 for KRSC.
        epsilon: added to the variance.
        threads: at most this many; 0 for one per processor.

    Returns:
        The first job with an entry that is not a finite number, or -1.

    Raises:
        ValueError: an argument that does not fit.
        BackendError: the native module is not built.
    """
    return int(_module().pack(jobs, storage, layout, epsilon, threads))


def pack_cuda_workspace(jobs: int, indices: int) -> int:
    """Return the bytes of device memory that `pack_cuda` needs for this many jobs with this many rows and columns in total.

    Raises:
        BackendError: the native module is not built, or built without CUDA.
    """
    return int(_with_cuda(0).pack_cuda_workspace(jobs, indices))


def pack_cuda(
    jobs: Sequence[tuple[Any, ...]],
    storage: TensorFacts,
    workspace: TensorFacts,
    *,
    layout: int,
    epsilon: float,
    device: int,
    stream: int,
) -> int:
    """Fill an arena on a CUDA device: as `pack`, with weights and storage on the device and index vectors on the host.

    Args:
        jobs, storage, layout, epsilon: as for `pack`.
        workspace: uint8, `pack_cuda_workspace` bytes on the device, for the table of jobs.
        device: its number.
        stream: handle of the CUDA stream to use; the call waits for it.

    Raises:
        ValueError: an argument that does not fit.
        RuntimeError: CUDA reports an error.
        BackendError: the native module is not built, or built without CUDA.
    """
    return int(_with_cuda(device).pack_cuda(jobs, storage, workspace, layout, epsilon, device, stream))


def channel_masks_forward(
    structure: tuple[Any, ...],
    logits: TensorFacts,
    scale: TensorFacts,
    masks: TensorFacts,
    loss: TensorFacts,
    work: TensorFacts,
    *,
    device: int | None,
    stream: int,
) -> None:
    """Fill masks, loss and work; see kernels/channel_masks/channel_masks.cuh.

    Args:
        structure: (rows, row_offsets, convs, user_offsets, users, full), see kernels/channel_masks/structure.py.
        logits: float32 or float64 (C,), contiguous; scale, masks (C,) and loss are of its dtype, scale and loss one number each.
        scale, masks, loss: see `logits`.
        work: float64 (R + G + 2L,); its last 2L entries are the sides that `channel_masks_backward` needs.
        device: the CUDA device that holds everything, or None for the CPU, where the tables' entries are checked too.
        stream: handle of the CUDA stream to launch on; the call does not wait.

    Raises:
        ValueError: an argument that does not fit.
        RuntimeError: CUDA reports an error.
        BackendError: the native module is not built, or built without CUDA.
    """
    _with_cuda(device).channel_masks_forward(structure, logits, scale, masks, loss, work, device, stream)


def channel_masks_backward(
    structure: tuple[Any, ...],
    logits: TensorFacts,
    sides: TensorFacts,
    grad_masks: TensorFacts | None,
    grad_loss: TensorFacts | None,
    gradient: TensorFacts,
    *,
    device: int | None,
    stream: int,
) -> None:
    """Fill the gradient of the logits from those of masks and loss; arguments and errors as in `channel_masks_forward`."""
    _with_cuda(device).channel_masks_backward(structure, logits, sides, grad_masks, grad_loss, gradient, device, stream)


def _with_cuda(device: int | None) -> Any:
    module = _module()
    if device is not None and not module.build_info()["cuda"]:
        raise BackendError("der_fast._C was built without CUDA: install with DER_FAST_CUDA=ON in the environment, with nvcc on PATH")
    return module


def lanes_isa() -> str | None:
    """Return the instruction set that the batch-in-lanes executor runs with on this processor, 'avx512' or 'avx2'; None for none.

    Raises:
        BackendError: the native module is not built.
    """
    found: str | None = _module().lanes_isa()
    return found


def lanes_program(image_channels: int, ops: list[tuple[int, ...]], bytes: int) -> Any:
    """Check the operations of a compact extractor and return them as a program for `run_lanes`; its `features` are counted.

    Args:
        image_channels: channels of the images.
        ops: (kind, source, residual, inputs, outputs, kernel, stride, relu, weight, bias) each, see csrc/lanes/executor.hpp.
        bytes: size of the arena that holds the weights.

    Raises:
        ValueError: an operation does not fit its input, or its weights are not inside the arena.
        BackendError: the native module is not built.
    """
    return _module().LanesProgram(image_channels, ops, bytes)


def run_lanes(programs: list[Any], arenas: list[TensorFacts], images: TensorFacts, output: TensorFacts, threads: int) -> None:
    """Write the features of several extractors side by side into `output`, with at most `threads` threads.

    Args:
        programs: made by `lanes_program`.
        arenas: uint8, each of the size that its program was made for.
        images: float32 (N, C, H, W), any strides.
        output: float32 (N, Σ F), contiguous.
        threads: at least 1.

    Raises:
        ValueError: an argument that does not fit.
        RuntimeError: this processor has no suitable instruction set.
        BackendError: the native module is not built.
    """
    _module().run_lanes(programs, arenas, images, output, threads)
