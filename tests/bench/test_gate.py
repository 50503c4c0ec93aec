"""What computes the wrong thing is not timed."""

from __future__ import annotations

import itertools

import pytest
import torch

from bench.harness.ceilings import Ceilings
from bench.harness.gate import GateError, gated, poison, poisoned, relative_error
from bench.harness.registry import Variant
from bench.harness.runner import Runner


def variant_of(function, **options):
    return Variant("ours", torch.float32, lambda tensors: lambda: function(tensors["x"]), **options)


def refusal(case):
    with pytest.raises(GateError) as caught:
        gated(case, case.variants[1], case.inputs(torch.Generator().manual_seed(0)))
    return str(caught.value)


def test_what_is_right_passes(doubling):
    case = doubling(variant_of(lambda x: {"y": x + x}, deterministic=True))
    run = gated(case, case.variants[1], case.inputs(torch.Generator().manual_seed(0)))
    assert torch.equal(run()["y"], 2 * case.inputs(torch.Generator().manual_seed(0))["x"])


def test_a_wrong_result_is_refused_with_its_error(doubling):
    said = refusal(doubling(variant_of(lambda x: {"y": 2.001 * x})))
    assert "test.double[n=4], ours: y: relative error 0.0005, allowed" in said


def test_a_wrong_single_element_is_refused(doubling):
    def off_by_one(x):
        y = 2 * x
        y[-1] = y[0]
        return {"y": y}

    assert "relative error" in refusal(doubling(variant_of(off_by_one)))


def test_nan_is_refused(doubling):
    assert "relative error inf" in refusal(doubling(variant_of(lambda x: {"y": 2 * x / torch.tensor([1.0, 1.0, 1.0, float("nan")])})))


def test_an_output_that_is_not_written_is_refused(doubling):
    def forgets_the_last(x):
        y = torch.empty_like(x)
        y[:-1] = 2 * x[:-1]
        return {"y": y}

    assert "relative error inf" in refusal(doubling(variant_of(forgets_the_last, deterministic=True)))


def test_bits_that_change_are_a_race(doubling):
    count = itertools.count()
    said = refusal(doubling(variant_of(lambda x: {"y": 2 * x * (1 + 1e-6 * next(count))}, deterministic=True)))
    assert "changes from run to run" in said


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda x: {"y": 2 * x[:3]}, r"output y has shape \(3,\) instead of \(4,\)"),
        (lambda x: {"z": 2 * x}, "gives z instead of y"),
        (lambda x: {"y": 2 * x, "z": x}, "gives y, z instead of y"),
        (lambda x: {}, "gives nothing instead of y"),
    ],
)
def test_other_outputs_are_refused(doubling, function, said):
    with pytest.raises(GateError, match=said):
        case = doubling(variant_of(function))
        gated(case, case.variants[1], case.inputs(torch.Generator().manual_seed(0)))


def test_a_wrong_baseline_is_refused(doubling):
    wrong = Variant("other", torch.bfloat16, lambda tensors: lambda: {"y": -2 * tensors["x"]}, baseline=True)
    assert "other: y: relative error 2" in refusal(doubling(wrong))


def test_twice_the_error_of_the_baseline_is_allowed_and_not_more(doubling):
    def shifted(error, **options):
        return Variant("v", torch.bfloat16, lambda tensors: lambda: {"y": 2 * tensors["x"].double() * (1 + error)}, **options)

    def case_with(error):
        case = doubling(shifted(error))
        return type(case)(**{**vars(case), "variants": (shifted(0.02, baseline=True), shifted(error))})

    tensors = case_with(0.0).inputs(torch.Generator().manual_seed(0))
    case = case_with(0.039)
    gated(case, case.variants[1], tensors)
    case = case_with(0.041)
    with pytest.raises(GateError, match="relative error 0.041, allowed 0.04"):
        gated(case, case.variants[1], tensors)


def test_relative_error_of_zeros():
    zeros = torch.zeros(3)
    assert relative_error(zeros, zeros) == 0.0
    assert relative_error(torch.ones(3), zeros) == float("inf")


def test_memory_is_poisoned_only_inside():
    with poisoned():
        assert bool(torch.empty(1000).isnan().all())
    assert not torch.are_deterministic_algorithms_enabled()
    outputs = {"y": torch.zeros(3), "bits": torch.zeros(3, dtype=torch.uint8)}
    poison(outputs)
    assert bool(outputs["y"].isnan().all()) and outputs["bits"].tolist() == [113] * 3


def test_a_run_goes_on_after_a_wrong_variant(doubling, setting):
    said: list[str] = []
    ceilings = Ceilings(10.0, {"fp32": 1.0})
    runner = Runner(setting, ceilings, {"time": "now", "commit": "abc", "device": "a CPU"}, say=said.append)
    wrong, right = doubling(variant_of(lambda x: {"y": 3 * x})), doubling(variant_of(lambda x: {"y": 2 * x}))
    records = list(runner.run([wrong, right]))
    assert [(record["variant"], record["status"]) for record in records] == [
        ("eager", "ok"),
        ("ours", "failed"),
        ("eager", "ok"),
        ("ours", "ok"),
    ]
    assert records[1]["reason"].startswith("wrong result: test.double[n=4], ours: y: relative error 0.5") and "ms" not in records[1]
    assert "FAILED: wrong result" in said[1]


def test_baselines_are_gated_even_where_only_ours_is_asked_for(doubling, setting):
    runner = Runner(setting, Ceilings(10.0, {}), {"time": "now", "commit": "abc", "device": "a CPU"}, variants=["ours"])
    records = list(runner.run([doubling(variant_of(lambda x: {"y": 2 * x}))]))
    assert [record["variant"] for record in records] == ["ours"]


def test_an_error_in_one_variant_is_a_record_with_its_trace(doubling, setting):
    def breaks(x):
        raise RuntimeError("no such kernel")

    runner = Runner(setting, Ceilings(10.0, {}), {"time": "now", "commit": "abc", "device": "a CPU"})
    record = list(runner.run([doubling(variant_of(breaks))]))[1]
    assert record["status"] == "failed" and record["reason"] == "RuntimeError: no such kernel" and "in breaks" in record["trace"]


def test_what_needs_a_gpu_is_unavailable_and_no_failure(doubling, setting):
    runner = Runner(setting, Ceilings(10.0, {}), {"time": "now", "commit": "abc", "device": "a CPU"})
    record = list(runner.run([doubling(variant_of(lambda x: {"y": 2 * x}, needs_cuda=True))]))[1]
    assert (record["status"], record["reason"]) == ("unavailable", "needs a GPU")
