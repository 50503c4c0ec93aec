"""torch.compile as a rival: max-autotune, one compilation per variant, and an error instead of a silent return to eager code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from bench.harness.registry import Setting

Result = TypeVar("Result")


def compiled(function: Callable[..., Result], setting: Setting, *, graphs: bool = False) -> Callable[..., Result]:
    """Return `function`, compiled on its first call; smoke runs only trace it, because compiling takes minutes.

    Args:
        function: of tensors and modules; static shapes.
        setting: its 'smoke' scale uses the backend aot_eager.
        graphs: let torch.compile make the CUDA graphs, as it does for a user of max-autotune; otherwise the harness captures them.
    """
    made: list[Callable[..., Result]] = []

    def call(*args: Any) -> Result:
        if not made:
            # All cases of a kind share one code object, for which the compiler's cache is small.
            torch._dynamo.reset()
            torch._dynamo.config.fail_on_recompile_limit_hit = True
            # A backward pass timed on its own runs many times on one forward pass.
            torch._functorch.config.donated_buffer = False
            made.append(torch.compile(function, dynamic=False, **_options(setting, graphs)))
        return made[0](*args)

    return call


def _options(setting: Setting, graphs: bool) -> dict[str, Any]:
    if setting.smoke:
        return {"backend": "aot_eager"}
    return {"mode": "max-autotune" if graphs else "max-autotune-no-cudagraphs"}
