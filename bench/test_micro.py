"""The micro cases for pytest-benchmark: `pytest bench --benchmark-only`. Tiny shapes on a CPU, real ones on a GPU.

Each passes the same gate as in `python -m bench run`. These times include launch overhead; for results to quote use `python -m bench run`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.harness.gate import gated
from bench.harness.registry import Case, Setting, Variant, cases_of, seeded

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SETTING = Setting(DEVICE, "quick" if DEVICE.type == "cuda" else "smoke", "fused" if DEVICE.type == "cuda" else "reference")
GROUPS = ("masked_bn", "channel_masks", "conv", "conv_chain", "augment", "compact")
PAIRS = [
    pytest.param(case, variant, id=f"{case.id}-{variant.name}")
    for case in cases_of(SETTING, GROUPS)
    for variant in case.variants
    # torch.compile takes minutes, and a whole epoch of a loader is not a micro case.
    if variant.name != "compile" and case.timing != "once"
]


@pytest.mark.parametrize(("case", "variant"), PAIRS)
def test_micro(benchmark: Any, case: Case, variant: Variant) -> None:
    run = gated(case, variant, case.inputs(seeded(DEVICE, 0)))

    def once() -> None:
        run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = case.id
    benchmark.extra_info.update({"device": str(DEVICE), "dtype": str(variant.dtype), "note": variant.note})
    benchmark.pedantic(once, warmup_rounds=2 if DEVICE.type == "cuda" else 0, rounds=50 if DEVICE.type == "cuda" else 2)
