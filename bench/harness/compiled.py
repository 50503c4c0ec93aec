"""torch.compile as a rival: max-autotune, one compilation per variant, and an error instead of a silent return to eager code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from bench.harness.registry import Setting

Result = TypeVar("Result")


def compiled(function: Callable[..., Result], setting: Setting, *, graphs: bool = False) -> Callable[..., Result]:
    """Return `function` compiled at its first call; smoke runs only trace it, because compiling takes minutes.

    Args:
        function: of tensors and modules; static shapes.
        setting: 'smoke' takes the backend aot_eager.
        graphs: let torch.compile make the CUDA graphs, as it does for a user who asks for max-autotune; without, whoever times captures.
    """
    made: list[Callable[..., Result]] = []

    def call(*args: Any) -> Result:
        if not made:
            # All cases of a kind share one code object, and the compiler's cache for that is small.
            torch._dynamo.reset()
            torch._dynamo.config.fail_on_recompile_limit_hit = True
            # A backward pass that is timed alone runs many times on one forward pass.
            torch._functorch.config.donated_buffer = False
            made.append(torch.compile(function, dynamic=False, **_options(setting, graphs)))
        return made[0](*args)

    return call


def _options(setting: Setting, graphs: bool) -> dict[str, Any]:
    if setting.smoke:
        return {"backend": "aot_eager"}
    return {"mode": "max-autotune" if graphs else "max-autotune-no-cudagraphs"}
