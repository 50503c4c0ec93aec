"""No program of any Triton kernel touches what another program of the launch writes, and results do not depend on their order."""

from __future__ import annotations

import importlib
import pkgutil
import runpy
from pathlib import Path

import pytest

from der_fast import kernels
from der_fast.kernels import triton_runtime

pytestmark = pytest.mark.skipif(not triton_runtime.interpreting(), reason="programs are recorded by Triton's interpreter")

HERE = Path(__file__)
disturbed = runpy.run_path(str(HERE.with_name("recording.py")))["disturbed"]
CASES = runpy.run_path(str(HERE.with_name("race_cases.py")))["CASES"]
PREFIX = f"{kernels.__name__}."

# Kernels whose programs are meant to write to the same place, and why that is right.
SHARING: dict[str, str] = {}
# Kernels that always run as one program, and why.
ALONE = {"channel_masks.triton_masks._forward_kernel": "the sparsity loss depends on every mask"}


@pytest.mark.parametrize("name", CASES)
def test_programs_keep_to_themselves(name):
    case = CASES[name]
    launches, wrong = disturbed(case.run, meant=[PREFIX + kernel for kernel in SHARING])
    assert not wrong, "\n".join(wrong)
    assert {launch.kernel for launch in launches} == {PREFIX + kernel for kernel in case.kernels}
    for launch in launches:
        assert (launch.programs == 1) == (launch.kernel.removeprefix(PREFIX) in ALONE), f"{launch.kernel}: {launch.programs} program(s)"


def test_every_kernel_has_a_case():
    """Every function under `triton.jit` is launched by a case, or called by a kernel that is."""
    from triton.runtime.jit import KernelInterface

    def unwrapped(function):
        # Of what Triton wraps around a kernel to tune it.
        while isinstance(function, KernelInterface) and isinstance(function.fn, KernelInterface):
            function = function.fn
        return function

    def jitted(names, scope):
        found = (unwrapped(scope.get(name)) for name in names)
        return {f"{f.fn.__module__}.{f.fn.__name__}".removeprefix(PREFIX): f.fn for f in found if isinstance(f, KernelInterface)}

    functions = {}
    for module in pkgutil.walk_packages(kernels.__path__, PREFIX):
        scope = vars(importlib.import_module(module.name))
        functions |= jitted(list(scope), scope)
    covered, waiting = set(), sorted(set().union(*(case.kernels for case in CASES.values()), SHARING, ALONE))
    assert set(waiting) <= functions.keys()
    while waiting:
        name = waiting.pop()
        if name not in covered:
            covered.add(name)
            waiting += jitted(functions[name].__code__.co_names, functions[name].__globals__)
    assert covered == functions.keys(), "write a case in race_cases.py"
