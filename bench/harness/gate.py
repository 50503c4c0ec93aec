"""The correctness gate: a variant that computes a wrong result is not timed.

An output passes if ‖out − exact‖ / ‖exact‖, both in float64, is at most twice eager PyTorch's own error in the same dtype, or a stated
floor. Memory that a run should write is first filled with NaN, so that missing writes are noticed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from bench.harness.registry import FLOORS, Case, Run, Tensors, Variant

FACTOR = 2.0
# A race shows up as bits that change from run to run.
REPEATS = 3


# The baselines' errors, by dtype and output.
Baselines = dict[torch.dtype, dict[str, float]]


class GateError(AssertionError):
    """A variant computes something other than the case defines."""


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Return ‖found − exact‖ / ‖exact‖ in float64; infinite where a number is not finite."""
    if found.shape != exact.shape:
        raise GateError(f"has shape {tuple(found.shape)} instead of {tuple(exact.shape)}")
    one, other = found.detach().double(), exact.detach().double().to(found.device)
    if not bool(one.isfinite().all()):
        return float("inf")
    norm, distance = float(other.norm()), float((one - other).norm())
    return distance / norm if norm else (0.0 if distance == 0 else float("inf"))


def errors_of(found: Tensors, exact: Tensors) -> dict[str, float]:
    """Return the error of every output.

    Raises:
        GateError: an output is missing, superfluous or has the wrong shape.
    """
    if found.keys() != exact.keys():
        raise GateError(f"gives {', '.join(sorted(found)) or 'nothing'} instead of {', '.join(sorted(exact))}")
    errors = {}
    for name, value in found.items():
        try:
            errors[name] = relative_error(value, exact[name])
        except GateError as error:
            raise GateError(f"output {name} {error}") from None
    return errors


def bounds_of(case: Case, dtype: torch.dtype, baseline: Mapping[str, float], outputs: Tensors) -> dict[str, float]:
    """Return the largest error that each output may have."""
    floor = max(FLOORS[dtype], case.floors.get(dtype, 0.0))
    return {name: max(FACTOR * baseline.get(name, 0.0), floor) for name in outputs}


def refuse_above(case: Case, variant: Variant, errors: Mapping[str, float], bounds: Mapping[str, float]) -> None:
    """Raise GateError where an error exceeds its bound."""
    wrong = [
        f"{name}: relative error {error:.3g}, allowed {bounds[name]:.3g}" for name, error in errors.items() if not error <= bounds[name]
    ]
    if wrong:
        raise GateError(f"{case.id}, {variant.name}: {'; '.join(wrong)}")


def check_repeats(case: Case, variant: Variant, run: Run, first: Tensors) -> None:
    """Raise GateError if a deterministic variant gives different bits when it runs again."""
    kept = {name: value.clone() for name, value in first.items()}
    for _ in range(REPEATS - 1):
        for name, value in run().items():
            if not torch.equal(value, kept[name]):
                raise GateError(f"{case.id}, {variant.name}: {name} changes from run to run on the same inputs; this is a race")


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill the results of `torch.empty` and similar functions with NaN (integers: their largest value)."""
    # A property of the module that type checkers do not see.
    memory: Any = torch.utils.deterministic
    before, mode = memory.fill_uninitialized_memory, torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    memory.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        memory.fill_uninitialized_memory = before
        torch.use_deterministic_algorithms(mode, warn_only=warn_only)


def poison(outputs: Tensors) -> None:
    """Overwrite outputs, so that a replay that writes nothing is noticed."""
    with torch.no_grad():
        for value in outputs.values():
            value.fill_(float("nan") if value.is_floating_point() else 113)


def pass_gate(case: Case, variant: Variant, run: Run, exact: Tensors, baselines: Baselines) -> dict[str, float]:
    """Run once and return the error of every output; a baseline's errors are noted in `baselines`.

    Raises:
        GateError: the result is wrong, or changes from run to run although it must not.
    """
    # Deterministic mode, which fills memory, makes libraries and torch.compile choose other kernels, so only der_fast's variants get it.
    with poisoned() if variant.deterministic else nullcontext():
        outputs = run()
    errors = errors_of(variant.shown(outputs), exact)
    if variant.baseline:
        refuse_above(case, variant, errors, dict.fromkeys(errors, case.sanity))
        baselines.setdefault(variant.dtype, errors)
    refuse_above(case, variant, errors, bounds_of(case, variant.dtype, baselines.get(variant.dtype, {}), exact))
    if variant.deterministic:
        check_repeats(case, variant, run, outputs)
    return errors


def gated(case: Case, variant: Variant, tensors: Tensors) -> Run:
    """Return a variant ready for timing, once it and the baselines of its dtype have passed the gate."""
    exact, baselines = case.expected(tensors), Baselines()
    for baseline in case.variants:
        if baseline.baseline and baseline.dtype == variant.dtype:
            pass_gate(case, baseline, baseline.prepare(tensors), exact, baselines)
    run = variant.prepare(tensors)
    pass_gate(case, variant, run, exact, baselines)
    return run
