from __future__ import annotations

import dataclasses

import pytest

from der_fast.training.results import StepResult, backward_transfer, forward_transfer, mean, metrics_of


def test_backward_transfer_by_hand() -> None:
    # i = 2: ((80 − 90) + 0) / 2 = −5;  i = 3: ((75 − 90) + (65 − 70) + 0) / 3 = −20/3;  their mean over T − 1 = 2 steps.
    table = [[90.0], [80.0, 70.0], [75.0, 65.0, 60.0]]
    assert backward_transfer(table) == pytest.approx((-5 - 20 / 3) / 2)


def test_backward_transfer_is_positive_where_old_classes_gain() -> None:
    assert backward_transfer([[50.0], [54.0, 10.0]]) == pytest.approx(2.0)


@pytest.mark.parametrize("table", [[], [[90.0]], [[90.0], [None, 70.0]], [[None], [80.0, 70.0]]])
def test_backward_transfer_is_unknown(table: list[list[float | None]]) -> None:
    assert backward_transfer(table) is None


def test_forward_transfer_by_hand() -> None:
    assert forward_transfer([90.0, 70.0, 60.0], [None, 65.0, 64.0]) == pytest.approx((5 - 4) / 2)


@pytest.mark.parametrize(("own", "reference"), [([90.0], [None]), ([90.0, 70.0], [None, None]), ([90.0, None], [None, 60.0])])
def test_forward_transfer_is_unknown(own: list[float | None], reference: list[float | None]) -> None:
    assert forward_transfer(own, reference) is None


def test_a_mean_with_a_gap_is_unknown() -> None:
    assert mean([1, 2, 6]) == 3.0
    assert mean([1.0, None]) is None
    assert mean([]) is None


def result(step: int, **rest: object) -> StepResult:
    values: dict[str, object] = {field.name: 0 for field in dataclasses.fields(StepResult)}
    values.update(step=step, class_names=(f"a{step}", f"b{step}"), confusion=None, kept=None, reference_top1=None, facts={})
    return StepResult(**{**values, **rest})  # type: ignore[arg-type]


def test_metrics_of_a_run() -> None:
    results = [
        result(1, top1=90.0, top5=100.0, class_set_top1=[90.0], params=100, params_unpruned=400, latency_ms=1.0, seconds=10.0),
        result(2, top1=60.0, top5=95.0, class_set_top1=[50.0, 70.0], params=250, params_unpruned=800, latency_ms=2.5, seconds=20.0,
               reference_top1=64.0, confusion=[[1]]),
    ]  # fmt: skip
    metrics = metrics_of(results, {"protocol": "B0-2"})
    assert metrics["protocol"] == "B0-2"
    assert metrics["class_names"] == ["a1", "b1", "a2", "b2"]
    assert metrics["steps"] == [["a1", "b1"], ["a2", "b2"]]
    assert (metrics["top1"], metrics["average_top1"], metrics["last_top1"]) == ([90.0, 60.0], 75.0, 60.0)
    assert (metrics["top5"], metrics["average_top5"]) == ([100.0, 95.0], 97.5)
    assert (metrics["bwt"], metrics["fwt"]) == (-20.0, 6.0)
    assert (metrics["params"], metrics["average_params"], metrics["final_params"]) == ([100, 250], 175.0, 250)
    assert metrics["params_unpruned"] == [400, 800]
    assert (metrics["latency_ms"], metrics["seconds"]) == ([1.0, 2.5], [10.0, 20.0])
    assert metrics["class_set_top1"] == [[90.0], [50.0, 70.0]]
    assert metrics["confusion"] == [[1]]
    assert {"python", "torch", "der_fast"} <= set(metrics["versions"])


def test_steps_whose_classes_are_gone_count_as_if_they_had_not_been() -> None:
    table = [[90.0], [80.0, 70.0], [None, 60.0, 50.0]]
    assert backward_transfer(table) is None
    assert backward_transfer(table, {0}) == pytest.approx(-5.0)
    assert backward_transfer(table, {0, 2}) is None
