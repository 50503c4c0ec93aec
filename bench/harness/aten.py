"""The GPU launches of PyTorch's operations. These are assumptions, since nothing here runs on a GPU.

* Views and uninitialised tensors launch nothing, nor does anything without elements, nor a copy of a tensor onto itself.
* A pointwise operation, a fill, a copy or cast, a reduction, a scan, a gather and a matrix product are one kernel each. What cuBLAS, cuDNN
  and reductions may add for a split sum is not counted.
* An operation on lists takes one kernel per chunk, cut as PyTorch's `multi_tensor_apply` cuts: 65,536 elements a block, 320 blocks and 110,
  64, 48, 36 or 30 tensors of 1 to 5 lists a launch. Newer PyTorch may take more at once. Lists whose tensors differ in their strides take
  one kernel per tensor.
* Two kernels: `masked_fill` (clone, fill), padding (fill, copy), the backward pass of the negative log likelihood and of a slice (zeros,
  values). Three: a sort of up to 4096 numbers (indices, copy, sort); a longer one seven (a radix sort of eight bits a pass).
* A convolution is one kernel, its backward pass one per gradient.

Bytes: every input is read once and every output written once, ignoring caches. An expanded tensor counts as stored; a gather's source
counts as far as it is read. FLOP: of matrix products and convolutions, as `torch.utils.flop_counter` counts them; others are bound by their
bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

_UNINITIALISED = "empty empty_like empty_strided new_empty new_empty_strided"
NOTHING = frozenset(f"{_UNINITIALISED} _reshape_alias _unsafe_view squeeze_ t_ transpose_ unsqueeze_".split())
# Operations that wait for the GPU: no CUDA graph can hold them.
FORBIDDEN = frozenset(("_local_scalar_dense", "bincount", "equal", "is_nonzero", "masked_select", "nonzero", "unique_dim", "_unique2"))
ELEMENTWISE, COPY, FILL, REDUCTION, PRODUCT, CONV, SORT, LISTS = (
    "elementwise",
    "copy",
    "fill",
    "reduction",
    "matrix product",
    "convolution",
    "sort and scan",
    "lists of tensors",
)
_KINDS = {
    COPY: "_to_copy cat clone constant_pad_nd copy_ index_select select_backward slice_backward stack",
    FILL: "arange fill_ full full_like new_full new_ones new_zeros ones ones_like scalar_tensor zero_ zeros zeros_like",
    REDUCTION: (
        "_log_softmax _log_softmax_backward_data amin any argmax max max_pool2d_with_indices max_pool2d_with_indices_backward mean "
        "nll_loss_backward nll_loss_forward sum"
    ),
    PRODUCT: "addmm addmv bmm dot mm mv",
    CONV: "convolution convolution_backward",
    SORT: "cumsum searchsorted sort",
    ELEMENTWISE: "flip masked_fill masked_fill_",
}
KIND_OF = {name: kind for kind, names in _KINDS.items() for name in names.split()}
_TWO = frozenset(("constant_pad_nd", "masked_fill", "nll_loss_backward", "select_backward", "slice_backward"))
_SMALL_SORT = 4096
# Limits of `multi_tensor_apply`.
_CHUNK, _BLOCKS, _TENSORS = 65536, 320, (110, 64, 48, 36, 30)


class UnknownOperation(ValueError):
    """There is no assumption about an operation yet; the message names it."""


def name_of(operation: Any) -> str:
    """Return the name of an operation without its overload."""
    return str(operation).split(".")[1]


def kind_of(operation: Any) -> str:
    """Return the kind of an operation that launches something.

    Raises:
        UnknownOperation: nothing is assumed about it.
    """
    name = name_of(operation)
    if name.startswith(("_foreach_", "_fused_")):
        return "sgd" if "sgd" in name else LISTS
    if name in KIND_OF:
        return KIND_OF[name]
    if torch.Tag.pointwise in operation.tags:
        return ELEMENTWISE
    raise UnknownOperation(f"the GPU launches of {operation} are not known: add it to the table in bench/harness/aten.py")


def count_of(operation: Any, args: Sequence[Any], result: Any) -> int:
    """Return how many kernels an operation launches.

    Raises:
        UnknownOperation: nothing is assumed about it.
    """
    name = name_of(operation)
    written = list(tensors_of(result)) or list(tensors_of(args[:1]))
    if name in NOTHING or operation.is_view or not any(tensor.numel() for tensor in written):
        return 0
    kind = kind_of(operation)
    if name.startswith(("_foreach_", "_fused_")):
        lists = [value for value in args if isinstance(value, (list, tuple)) and value and all(isinstance(one, Tensor) for one in value)]
        return chunks_of([*lists, result] if isinstance(result, (list, tuple)) and not name.endswith("_") else lists)
    if name == "copy_" and _same_place(args[0], args[1]):
        return 0
    if kind == CONV and "backward" in name:
        return sum(tensor is not None for tensor in result)
    if name == "sort":
        return 3 if args[0].numel() <= _SMALL_SORT else 7
    return 2 if name in _TWO else 1


def chunks_of(lists: Sequence[Sequence[Tensor]]) -> int:
    """Return the kernels that an operation on lists of tensors launches."""
    if any(len({tensor.stride() for tensor in row}) > 1 for row in zip(*lists, strict=True)):
        return sum(tensor.numel() > 0 for tensor in lists[0])
    most = _TENSORS[len(lists) - 1]
    launches = tensors = blocks = 0
    for tensor in lists[0]:
        chunks = -(-tensor.numel() // _CHUNK)
        tensors += chunks > 0
        for chunk in range(chunks):
            blocks += 1
            last = chunk == chunks - 1
            if blocks == _BLOCKS or (tensors == most and last):
                launches += 1
                # The rest of a tensor continues in the next launch.
                blocks, tensors = 0, 0 if last else 1
    return launches + (blocks > 0)


def bytes_of(operation: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> int:
    """Return the bytes that an operation must read and write."""
    name = name_of(operation)
    written = list(tensors_of(result)) or list(tensors_of((args[0], args[2]) if name == "_fused_sgd_" else args[:1]))
    moved = sum(map(extent, written))
    if name == "index_select":
        return 2 * moved + extent(args[2])
    # A copy or a fill does not read the old content.
    given = args[1:] if name in ("copy_", "_foreach_copy_", "fill_", "zero_") else args
    return moved + sum(map(extent, unique(tensors_of((given, tuple(kwargs.values()))))))


def flops_of(operation: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> int:
    """Return the multiplications and additions of a matrix product or convolution; 0 for anything else."""
    counted = flop_registry.get(operation.overloadpacket)
    return 0 if counted is None else int(counted(*args, **kwargs, out_val=result))


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Yield every tensor of nested lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from tensors_of(one)


def unique(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the distinct tensors, in order."""
    return list({id(tensor): tensor for tensor in tensors}.values())


def extent(tensor: Tensor) -> int:
    """Return the bytes of a tensor's elements; an expanded dimension is stored once."""
    count = tensor.element_size()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride or not size else 1
    return count


def _same_place(tensor: Tensor, other: Tensor) -> bool:
    return tensor.data_ptr() == other.data_ptr() and tensor.shape == other.shape and tensor.stride() == other.stride()
