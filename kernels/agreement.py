"""Checks that several implementations compute the same thing, on the data at hand, before the fastest one is chosen."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Run = Callable[[], object]
# Picks the tensors of a run's result that must agree.
Tensors = Callable[[object], Sequence[Tensor | None]]

# Far above what rounding does to a residual block (TensorFloat-32 counts as float32), far below what a wrong tile or a race does.
LARGEST = {torch.bfloat16: 0.1, torch.float16: 0.1, torch.float32: 0.02, torch.float64: 1e-6}

_log = logging.getLogger(__name__)


def difference(found: Tensor, trusted: Tensor) -> float:
    """Return ‖found − trusted‖ / ‖trusted‖ in float64; infinite where shapes differ or a number is not finite on one side only."""
    if found.shape != trusted.shape:
        return math.inf
    found, trusted = found.double(), trusted.double()
    same = (found == trusted) | (found.isnan() & trusted.isnan())
    if bool(same.all()):
        return 0.0
    error = float(torch.where(same, 0.0, found - trusted).norm() / trusted.norm().clamp_min(1e-30))
    return error if math.isfinite(error) else math.inf


def agreeing(runs: Mapping[str, Run], trusted: str, tensors: Tensors, what: str) -> dict[str, Run]:
    """Return the runs whose results equal the trusted one's up to rounding; the others are left out with a warning.

    A run that raises is left out too: a kernel that does not fit this device must not stop work that can continue without it.

    Args:
        runs: by name, including `trusted`; their results must not depend on how often they have run.
        trusted: the name of the run that is known to be right.
        tensors: returns the parts of a result to compare, the same number for every run; None for a part that is absent.
        what: what is computed, for the warning.
    """
    truth = [None if tensor is None else tensor.clone() for tensor in tensors(runs[trusted]())]
    kept: dict[str, Run] = {}
    for name, run in runs.items():
        problem = None if name == trusted else _problem(run, tensors, truth)
        if problem is None:
            kept[name] = run
        else:
            _log.warning("%s %r is not used, because it %s", what, name, problem)
    return kept


def _problem(run: Run, tensors: Tensors, truth: Sequence[Tensor | None]) -> str | None:
    try:
        found = tensors(run())
        worst = 0.0
        for one, other in zip(found, truth, strict=True):
            if (one is None) != (other is None):
                return "returns a gradient where there should be none, or none where there should be one"
            if one is not None and other is not None:
                # Vectors of sums are float32 whatever was summed, so the least exact dtype of the result sets the limit.
                worst = max(worst, difference(one, other))
    except Exception as error:
        return f"failed: {type(error).__name__}: {error}"
    allowed = max((LARGEST.get(tensor.dtype, 0.0) for tensor in truth if tensor is not None), default=0.0)
    if worst <= allowed:
        return None
    return (
        f"computes something else (it differs by {worst:.1e}, {allowed:.0e} is allowed): please report this with `der-fast doctor --json`"
    )
