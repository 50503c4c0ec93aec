"""Every Triton kernel compiles for every supported GPU generation and stays within its budget of local memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from der_fast.errors import BackendError
from der_fast.kernels import resources, triton_runtime


def report(*arguments: str) -> subprocess.CompletedProcess[str]:
    # A process of its own: this one interprets its kernels.
    command = [sys.executable, "-m", "der_fast.kernels.resources", "--json", *arguments]
    environment = {name: value for name, value in os.environ.items() if name != triton_runtime.INTERPRET}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)


@pytest.mark.parametrize("capability", resources.CAPABILITIES)
def test_every_kernel_compiles_without_spilling(capability: int) -> None:
    done = report("--capability", str(capability))
    usages = [json.loads(line) for line in done.stdout.splitlines()]
    spilled = [f"{usage['name']}: {usage['stack']} bytes" for usage in usages if usage["stack"] > usage["stack_budget"]]
    assert done.returncode == 0, f"{spilled}\n{done.stderr[-4000:]}"
    assert {usage["name"].split(".")[0] for usage in usages} == {name.split(".")[2] for name in resources.modules()}
    assert all(0 < usage["registers"] <= 255 and usage["shared"] <= 232448 for usage in usages)


def test_interpreted_kernels_are_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_runtime, "interpreting", lambda: True)
    with pytest.raises(BackendError, match="TRITON_INTERPRET is set"):
        resources.cases()
