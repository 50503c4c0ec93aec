"""Lists what a function launches on a GPU, without one: PyTorch's operations as they are dispatched, Triton's kernels as they are launched.

CPU tensors stand for the GPU's, and the meta device for the host: a tensor that a function makes without naming a device becomes a meta
tensor, and is refused when it is used with the others. PyTorch's operations run on the CPU; Triton's kernels do not run, so their results
are uninitialised memory. That makes no difference to a function that a CUDA graph can hold, since it reads no values.

A launch takes at least what its bytes take at the memory's speed, what its FLOP take at the peak, and 1.5 µs: a model, not a measurement.
Caches are ignored (activations may stay in the L2 cache), and so are narrow kernels that cannot fill the GPU.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from bench.harness import aten
from der_fast.kernels import checks, triton_runtime

# Published for the H100 SXM, without sparsity: bytes and FLOP per second; matrix products on tensor cores, except float32.
BANDWIDTH = 3.35e12
PEAK = {torch.bfloat16: 989.4e12, torch.float16: 989.4e12, torch.float32: 66.9e12, torch.float64: 66.9e12}
# The least time of a kernel in a CUDA graph.
LEAST_SECONDS = 1.5e-6

# Triton kernels that are not counted under their package.
_KINDS = {
    "conv_forward": "conv forward",
    "conv_dgrad": "conv dgrad",
    "conv_wgrad": "conv wgrad",
    "sum_parts": "sum of wgrad's parts",
    "finalize": "batch-norm vectors",
    "coefficients": "batch-norm vectors",
    "grouped_conv": "frozen bank",
}


class HostAccess(RuntimeError):
    """The function reads a value from the device or uses host memory; the message says where."""


@dataclass(frozen=True)
class Launch:
    """One kernel.

    Attributes:
        name: 'aten.mul.Tensor', 'conv.conv_forward'.
        kind: for sums.
        where: the function that launched it, 'autograd' for PyTorch's own backward pass.
        shape: of the largest tensor.
        bytes, flops: the least that it moves and computes.
        dtype: that it computes in.
    """

    name: str
    kind: str
    where: str
    shape: tuple[int, ...]
    bytes: float
    flops: float
    dtype: torch.dtype

    @property
    def seconds(self) -> float:
        """Modelled."""
        return max(self.bytes / BANDWIDTH, self.flops / PEAK.get(self.dtype, PEAK[torch.float32]), LEAST_SECONDS)


def launches_of(body: Callable[[], object]) -> list[Launch]:
    """Run `body` and return what it would launch, in order. First call `body` once under `no_kernels`, since first calls prepare things.

    Raises:
        HostAccess: it asks the device for a value, or uses the host's memory.
        UnknownOperation: nothing is assumed about an operation.
    """
    found: list[Launch] = []
    with _kernels_go_to(found.append), _Operations(found.append), torch.device("meta"), _Reads():
        body()
    return found


@contextlib.contextmanager
def no_kernels() -> Iterator[None]:
    """In this context, Triton's kernels count as usable but do not run, so their results are not written."""
    with _kernels_go_to(lambda launch: None):
        yield


@contextlib.contextmanager
def _kernels_go_to(note: Callable[[Launch], None]) -> Iterator[None]:
    from triton.runtime.jit import KernelInterface

    def launcher(kernel: Any, grid: object) -> Callable[..., None]:
        return lambda *args, **kwargs: note(_triton_launch(kernel, args, kwargs))

    usable = mock.patch.object(triton_runtime, "usable", lambda device: (True, "nothing is launched"))
    unread = mock.patch.object(checks, "readable", lambda tensor: False)
    with usable, unread, mock.patch.object(KernelInterface, "__getitem__", launcher):
        yield


def _triton_launch(kernel: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Launch:
    given = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
    package = kernel.fn.__module__.split(".")[-2]
    name = kernel.fn.__name__.strip("_").removesuffix("_kernel")
    # Arguments that a kernel does not need may be passed twice, and so may several views of one buffer.
    tensors = list({(one.data_ptr(), one.shape): one for one in given.values() if isinstance(one, Tensor)}.values())
    first = next(iter(tensors))
    moved = sum(map(aten.extent, tensors))
    return Launch(f"{package}.{name}", _KINDS.get(name, package), _caller(), _largest(tensors), moved, _flops(name, given), first.dtype)


def _flops(name: str, given: Mapping[str, Any]) -> float:
    """Return the FLOP of a kernel with a matrix product; the others are bound by their bytes."""
    products = 0
    if name == "conv_forward":
        products = given["rows"] * given["weight"].numel()
    elif name == "conv_dgrad":
        products = given["g"].numel() // given["g"].shape[1] * given["weight"].numel()
    elif name == "conv_wgrad":
        products = given["rows"] * given["g"].shape[1] * given["x"].shape[1] * given["KERNEL"] ** 2
    elif name == "grouped_conv":
        products = given["images"] * given["out_height"] * given["out_width"] * given["weights"].numel()
    return 2.0 * products


class _Reads(TorchFunctionMode):
    """Refuses code that reads a CPU tensor without dispatching an operation."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.cpu, Tensor.numpy, Tensor.tolist):
            raise _refusal(func.__name__, "asks the device for a value")
        return func(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    def __init__(self, note: Callable[[Launch], None]) -> None:
        super().__init__()
        self.note = note

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        _refuse_host(func, args, kwargs)
        result = func(*args, **kwargs)
        count = aten.count_of(func, args, result)
        if count:
            tensors = [*aten.tensors_of(result), *aten.tensors_of(args)]
            moved = aten.bytes_of(func, args, kwargs, result) / count
            flops = aten.flops_of(func, args, kwargs, result) / count
            launch = Launch(str(func), aten.kind_of(func), _caller(), _largest(tensors), moved, flops, tensors[0].dtype)
            for _ in range(count):
                self.note(launch)
        return result


def _refuse_host(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    tensors = list(aten.tensors_of((args, tuple(kwargs.values()))))
    name = aten.name_of(func)
    # Tensors made from the caller's numbers are lifted, and would be copied to the GPU.
    host = name == "lift_fresh" or any(tensor.device.type == "meta" for tensor in tensors)
    # A mask as an index needs to know how many elements it selects.
    counted = name in ("index", "index_put_") and any(tensor.dtype in (torch.bool, torch.uint8) for tensor in aten.tensors_of(args[1]))
    if host or counted or name in aten.FORBIDDEN:
        raise _refusal(func, "uses a tensor in the host's memory" if host else "asks the device for a value")


def _refusal(what: object, does: str) -> HostAccess:
    return HostAccess(f"{what} in {_caller()} {does}: a CUDA graph cannot hold it, and without one the device waits")


def _largest(tensors: list[Tensor]) -> tuple[int, ...]:
    return tuple(max(tensors, key=Tensor.numel).shape)


def _caller() -> str:
    """Return the package's innermost function outside its kernels; 'autograd' where it started a backward pass of PyTorch's own nodes."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module == "torch.autograd.graph":
            return "autograd"
        if (module.startswith("der_fast.") and not module.startswith("der_fast.kernels.")) or module.startswith("bench.subjects."):
            return f"{module.partition('.')[2]}.{frame.f_code.co_name}"
        frame = frame.f_back
    return "?"
