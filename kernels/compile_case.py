"""One launch of a Triton kernel, described so that the kernel can be compiled without a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class CompileCase:
    """A kernel with the types of its arguments.

    Attributes:
        name: of the case, e.g. 'conv.forward.bf16.prologue'.
        kernel: the `triton.jit` function.
        signature: type of every run-time argument in Triton's notation, e.g. '*bf16', 'i32', 'fp32'.
        constants: every `tl.constexpr` argument (and arguments that are None).
        aligned: names of arguments that are multiples of 16 in practice (pointers: of 16 bytes).
        num_warps, num_stages: of the launch.
        stack_budget: bytes of local memory allowed per thread; more is a spill and fails the test.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    aligned: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 2
    stack_budget: int = 0
