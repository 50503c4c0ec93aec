"""A run that version 0.1.0 saved can be read, measured, taught, exported and reported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import der_fast
from der_fast.errors import CheckpointError
from der_fast.training.learner import Learner

SAVED = Path(__file__).with_name("saved") / "run-0.1.0"


@pytest.fixture
def run(tmp_path):
    return Path(shutil.copytree(SAVED, tmp_path / "run"))


def test_it_is_measured_as_it_was(run):
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    assert der_fast.evaluate_run(run, device="cpu").top1 == pytest.approx(metrics["last_top1"])
    learner = Learner.load(run, device="cpu")
    assert list(learner.class_names) == metrics["class_names"]
    volatile = {"backend", "device", "config", "versions"}
    now = learner.metrics()
    assert {name: now[name] for name in metrics if name not in volatile} == {key: metrics[key] for key in metrics if key not in volatile}
    assert 0 < metrics["kept_share"][-1] < 1


def test_it_goes_on_learning(run, synthetic):
    learner = Learner.load(run, device="cpu")
    height, width = learner.image_size
    assert height == width
    learner.learn(synthetic(["circle", "square"], side=height))
    assert learner.class_names[-2:] == ("circle", "square")
    assert len(learner.results) == 3
    learner.save(run)
    assert Learner.load(run, device="cpu").class_names == learner.class_names


def test_its_second_step_learns_the_classes_of_the_order_it_was_begun_with(run):
    wanted = json.loads((run / "metrics.json").read_text(encoding="utf-8"))["class_names"]
    shutil.rmtree(run / "steps" / "02")
    assert len(Learner.load(run, device="cpu").results) == 1
    result = der_fast.train("digits", out=run, resume=True, settings={"later.epochs": 12})
    assert result.metrics["class_names"] == wanted
    assert result.learner.config.protocol.class_order == "torch-1993"


def test_another_order_is_refused_by_name(run):
    with pytest.raises(
        CheckpointError, match=r"protocol.class_order was 'torch-1993', now None, protocol.class_order_seed was None, now 1993"
    ):
        der_fast.train("digits", out=run, resume=True, settings={"protocol.class_order_seed": 1993})


def test_it_is_resumed_exported_and_reported(run, tmp_path):
    config = Learner.load(run, device="cpu").config
    before = sorted(path.name for path in run.rglob("*.safetensors"))
    der_fast.train("digits", config=config, out=run, resume=True)
    assert sorted(path.name for path in run.rglob("*.safetensors")) == before
    assert (run / "report.html").exists()
    der_fast.export(run, tmp_path / "model.safetensors")
    assert der_fast.load(tmp_path / "model.safetensors").class_names == Learner.load(run, device="cpu").class_names
