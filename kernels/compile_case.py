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
