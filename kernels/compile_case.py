"""One way of launching a Triton kernel, described so that it can be compiled without a GPU, and what its machine code should be made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

CAPABILITIES = (80, 90, 100)
# What a case can want; `machine_code.holds` says when it is there.
TENSOR_CORES = "tensor cores"
NO_SCALAR_LOOP = "no scalar loop"
WIDE_LOADS = "16-byte loads"
WIDE_STORES = "16-byte stores"
COPIES = "asynchronous copies"
ASKED_ASYNCHRONOUS = "asynchronous products in the IR"
ASYNCHRONOUS = "asynchronous products"
NO_LOCAL = "no local memory"
RESIDENT = "resident blocks"


@dataclass(frozen=True)
class Lack:
    """Something that a case should have and that its code does not have today; a test fails as soon as it does.

    Attributes:
        what: one of the names above.
        why: the reason, in a few words.
        capabilities: for which GPUs.
    """

    what: str
    why: str
    capabilities: tuple[int, ...] = CAPABILITIES


@dataclass(frozen=True)
class CompileCase:
    """A kernel with the types of its arguments.

    Attributes:
        name: of the case, e.g. 'conv.forward.bf16.64x64.chain'.
        kernel: the `triton.jit` function.
        signature: type of every run-time argument in Triton's notation, e.g. '*bf16', 'i32', 'fp32'.
        constants: every `tl.constexpr` argument (and arguments that are None).
        aligned: names of arguments that are multiples of 16 (pointers: of 16 bytes), as they are in practice.
        num_warps, num_stages: as launched.
        capabilities: of the GPUs on which it is launched.
        stack_budget: the most bytes of local memory per thread where `NO_LOCAL` is lacking.
        resident: blocks per multiprocessor that the launch code counts on; 0 where it counts on none.
        tile_loads, tile_stores: bytes of activations and weights that a block loads for one tile or step, and stores of one.
        wants: what its code should be made of. `NO_LOCAL` is wanted of every case, `RESIDENT` of each that counts on blocks.
        lacks: the part of it that is not there today.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    aligned: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 2
    capabilities: tuple[int, ...] = CAPABILITIES
    stack_budget: int = 0
    resident: int = 0
    tile_loads: int = 0
    tile_stores: int = 0
    wants: tuple[str, ...] = ()
    lacks: tuple[Lack, ...] = ()

    @property
    def wanted(self) -> tuple[str, ...]:
        """Everything that is wanted."""
        return (*self.wants, NO_LOCAL, *((RESIDENT,) if self.resident else ()))

    def lacking(self, capability: int) -> dict[str, str]:
        """Return what is missing today on one GPU, and why."""
        return {lack.what: lack.why for lack in self.lacks if capability in lack.capabilities}


def typed(kernel: Any, pointers: Mapping[str, str], dtype: str, sizes: Mapping[str, int], constants: Mapping[str, Any]) -> dict[str, Any]:
    """Return `signature`, `constants` and `aligned` of a launch, as Triton derives them from its arguments.

    An argument that is 1 is compiled as a constant; of every other Triton knows whether it is a multiple of 16.

    Args:
        kernel: the `triton.jit` function.
        pointers: name → element type of every tensor that is passed, 'act' for activations; the kernel's other arguments are None.
        dtype: of activations.
        sizes: name → value of every integer argument.
        constants: name → value of every other `tl.constexpr` argument.
    """
    fixed = {**constants, **{name: value for name, value in sizes.items() if value == 1}}
    signature = {name: f"*{dtype if kind == 'act' else kind}" for name, kind in pointers.items()}
    signature |= {name: "i32" for name in sizes if name not in fixed}
    absent = {name: None for name in kernel.arg_names if name not in signature and name not in fixed}
    multiples = (name for name, value in sizes.items() if name not in fixed and value % 16 == 0)
    return {"signature": signature, "constants": {**fixed, **absent}, "aligned": (*pointers, *multiples)}
