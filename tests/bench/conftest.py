"""Records and cases that the benchmark's tests share."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.harness.registry import Case, Setting, Tensors, Variant

FACTS = {
    "time": "2026-01-01T00:00:00Z",
    "commit": "0123456789ab",
    "device": "a GPU",
    "kind": "cuda",
    "versions": {"torch": "2.11.0", "triton": "3.6.0"},
    "nvidia_smi": {"driver_version": "580.1"},
}


@pytest.fixture
def setting() -> Setting:
    return Setting(torch.device("cpu"), "smoke", "reference")


@pytest.fixture
def header_of():
    def make(**changes: Any) -> dict[str, Any]:
        header = {"kind": "run", "run": "one", "scale": "full", "backend": "fused", "interpreted": False, "facts": dict(FACTS)}
        return {**header, "ceilings": {"gb_per_s": 3000.0, "tflop_per_s": {"bf16": 800.0}}, **changes}

    return make


@pytest.fixture
def record_of():
    def make(case: str, variant: str, ms: float, params: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
        record = {"kind": "result", "run": "one", "case": case, "params": params or {}, "variant": variant, "status": "ok", "ms": ms}
        record |= {"ms_p20": 0.9 * ms, "ms_p80": 1.1 * ms, "samples": 9, "timing": "graph", "device": "a GPU", "commit": "0123456789ab"}
        return {**record, "dtype": "bf16", "peak_mb": 10.0, **changes}

    return make


@pytest.fixture
def doubling():
    """A case that doubles four numbers, with one variant of the test's own beside a right baseline."""

    def make(variant: Variant, **changes: Any) -> Case:
        def double(tensors: Tensors, dtype: torch.dtype) -> Tensors:
            return {"y": 2 * tensors["x"].to(dtype)}

        baseline = Variant("eager", torch.float32, lambda tensors: lambda: double(tensors, torch.float32), baseline=True)
        return Case(
            "test.double",
            {"n": 4},
            lambda generator: {"x": torch.randn(4, generator=generator)},
            lambda tensors: double(tensors, torch.float64),
            (baseline, variant),
            **changes,
        )

    return make
