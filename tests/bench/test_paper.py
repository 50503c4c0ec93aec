"""The paper's benchmark: how many epochs fit, what stands beside the paper's curve, and what does not."""

from __future__ import annotations

import json

import pytest

from bench.__main__ import main as command
from bench.reports import paper_table
from bench.studies import paper

IMAGES = [5000, 7000, 7000]


def row(step, **changes):
    facts = {"device": "a GPU", "commit": "abc"}
    found = {"step": step, "steps": 10, "classes": 10 * step, "whole": True, "epochs": 170, "epoch_seconds": 0.1, "seconds": 20.0}
    found |= {"top1": 90.0 - 3 * step, "params": 900_000 * step, "params_unpruned": 11_200_000 * step, "width": None, "per_class": None}
    return {**found, "target_params": 0.08, "precision": "bf16", "seed": 1993, "backend": "fused", "facts": facts, **changes}


def test_as_many_epochs_as_fit_and_no_more():
    plan = paper.Plan(IMAGES, lambda t: 1.0 + 0.1 * (t - 1), most=170, per_image=1e-4, fixed=2.0)
    epoch = 1e-4 * (5000 + 1.1 * 7000 + 1.2 * 7000) * (1 + paper.CLASSIFIER_SHARE)
    assert plan.epochs(1, 6 + 30.5 * epoch) == 30
    assert plan.epochs(1, 1e6) == 170 and plan.epochs(1, 6) == 0 and plan.epochs(1, -1) == 0
    assert plan.epochs(3, 2 + 10.5 * 1e-4 * 1.2 * 7000 * (1 + paper.CLASSIFIER_SHARE)) == 10


def test_what_a_step_showed_is_believed():
    plan = paper.Plan(IMAGES, lambda t: float(t), most=170)
    plan.learned(2, 10, epoch_seconds=0.7, seconds=12.0)
    assert plan.per_image == pytest.approx(0.7 / 7000 / 2)
    assert plan.fixed == pytest.approx(12.0 - 7.0 * (1 + paper.CLASSIFIER_SHARE))


def test_growth_comes_from_measured_epochs_where_there_are_some(tmp_path, header_of, record_of):
    assert paper.growth_of(None, 1.1)(11) == pytest.approx(2.0)
    assert paper.growth_of(tmp_path / "none", 0.9)(11) == 1.0
    path = tmp_path / "gpu.jsonl"
    records = [header_of(), *(record_of("epoch.train", "ours", ms, {"t": t, "batch": 128}) for t, ms in ((1, 2.0), (10, 3.0)))]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert paper.growth_of(path, 9.0)(10) == pytest.approx(1.5) and paper.growth_of(path, 9.0)(1) == 1.0


def test_the_paper_s_figures_stand_beside_a_run_like_its_own():
    text = paper_table.table([row(1, top1=1.0), *(row(step) for step in (1, 2))])
    assert "| 1 | 10 | 170 | 87.00 | 87.82 | -0.82 | 0.90 M | 8.0 % | 20.0 | 0.100 |" in text
    assert "| 2 | 20 | 170 | 84.00 | 83.67 | +0.33 |" in text
    assert "Average over 2 of 10 steps: 85.50 %" in text and "over the same steps: 85.74 % pruned, 85.52 % unpruned" in text
    assert "4.96 M pruned, 61.6 M unpruned" in text and "shorter than the paper's" not in text
    assert "commit abc." in text and "pruned to 8 %, 170 of the paper's 170 epochs" in text
    # What the paper prints of the whole.
    assert "over the same steps: 74.64 % pruned, 75.36 % unpruned" in paper_table.table([row(step) for step in range(1, 11)])


def test_a_shorter_schedule_is_said():
    text = paper_table.table([row(1, epochs=60), row(2, epochs=50)])
    assert "50 to 60 of the paper's 170 epochs" in text and "The schedule is shorter than the paper's" in text


@pytest.mark.parametrize("changes", [{"whole": False, "steps": 5}, {"width": 8}, {"per_class": 20}])
def test_nothing_of_the_paper_stands_beside_another_run(changes):
    text = paper_table.table([row(step, **changes) for step in (1, 2)])
    assert "| 87.00 | – | – |" in text and "nothing of the paper stands beside it" in text and "87.82" not in text
    assert ("50 classes, a part of CIFAR-100's" in text) == ("whole" in changes)


def test_without_a_step_the_table_says_so(tmp_path, capsys):
    assert command(["paper", "--table", str(tmp_path / "none.jsonl")]) == 0
    assert capsys.readouterr().out == "No step was learned.\n"
    with pytest.raises(SystemExit):
        command(["paper"])
    assert "give the folder of CIFAR-100" in capsys.readouterr().err
