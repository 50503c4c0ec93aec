"""The study of how convolutions start."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from bench.studies import initialisation as study
from der_fast.config.resolve import resolve_config
from der_fast.data import load_dataset
from der_fast.data.memory_source import MemorySource
from der_fast.model import extractor
from der_fast.model.extractor import INITIALISATION
from der_fast.training.protocol import steps_of

TINY = {
    "data.train_per_class": 4,
    "data.test_per_class": 2,
    "model.width": 2,
    "first.epochs": 2,
    "first.milestones": [],
    "later.epochs": 2,
    "later.milestones": [],
    "classifier.epochs": 1,
    "classifier.milestones": [],
    "memory.total": 20,
}


@pytest.fixture
def tiny(monkeypatch):
    config = resolve_config("digits", changes=TINY)
    monkeypatch.setattr(study, "task_of", lambda name, root: (config, *load_dataset(config.data)))


def test_runs_are_measured_once_and_tabled(tiny, tmp_path, capsys, monkeypatch):
    path = tmp_path / "r.jsonl"
    options = ["--tasks", "digits", "--seeds", "1", "--json", str(path)]
    study.main([*options, "--starts", "1 / (3 · fan-in)"])
    study.main(options)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert {study.identity(row) for row in rows} == {("digits", variant, start, 1) for variant in study.VARIANTS for start in study.STARTS}
    assert len(rows) == 6
    assert all(len(row["top1"]) == 5 and row["seconds"] > 0 for row in rows)
    assert sum(rows[0]["params_added"]) > sum(rows[1]["params_added"])
    assert len({json.dumps(row["top1"]) for row in rows if row["variant"] == "unpruned"}) > 1
    monkeypatch.setattr(study, "run", lambda *args: pytest.fail("measured again"))
    study.main(options)
    assert capsys.readouterr().out.count("| digits | unpruned | 2 / fan-out |") == 2


def test_a_start_holds_during_its_run_only(monkeypatch):
    seen = []

    class Metrics(dict):
        def metrics(self):
            seen.append(extractor.INITIALISATION)
            return dict.fromkeys(("top1", "average_top1", "last_top1", "params_added", "versions"))

    monkeypatch.setattr(study, "run_protocol", lambda *args: Metrics())
    for start in study.STARTS:
        study.run(None, None, None, start)
    assert seen == list(study.STARTS.values()) and len(set(seen)) == 3
    assert extractor.INITIALISATION is INITIALISATION


def test_the_table_has_mean_worst_and_deviation():
    row = {"data": "cifar100", "variant": "pruned", "start": "2 / fan-out"}
    rows = [{**row, "seed": seed, "average_top1": top1, "last_top1": top1 - 1} for seed, top1 in enumerate((50.0, 54.0))]
    line = "| cifar100 | pruned | 2 / fan-out | 52.0 | 50.0 | 2.8 | 51.0 | 49.0 | 2.8 | 2 |"
    assert line in study.table(rows)
    assert "| 50.0 | 50.0 | – | 49.0 | 49.0 | – | 1 |" in study.table(rows[:1])
    assert len({text.count("|") for text in study.table(rows).splitlines()}) == 1


def test_ten_classes_of_cifar100_are_one_step(tmp_path, monkeypatch):
    names = [f"class{index:02d}" for index in range(100)]
    labels = torch.arange(100).repeat_interleave(2)
    source = MemorySource(torch.zeros(200, 32, 32, 3, dtype=torch.uint8), labels, names)
    asked = []
    monkeypatch.setattr(study, "load_dataset", lambda config: asked.append(config) or (source, source))
    config, train, test = study.task_of("cifar100", str(tmp_path))
    assert asked == [replace(config.data, root=str(tmp_path))] and asked[0].train_per_class == 100
    # 68, 56, 78, … is how the order numpy-1993 begins for 100 classes.
    assert train.class_names[:3] == test.class_names[:3] == ("class68", "class56", "class78")
    assert len(train.class_names) == 10 and config.protocol.name == "B0-1" and config.model.backbone == "resnet32"
    assert steps_of(train.class_names, config.protocol) == [train.class_names]
