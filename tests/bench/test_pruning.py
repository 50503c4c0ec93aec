"""The study of pruning: its rivals rank as they should, budgets are met, and a killed study goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench.__main__ import main as command
from bench.harness.claims import Claims
from bench.reports.pruning import identity, rows_in, table
from bench.studies import pruning
from bench.subjects.rankings import HELD_OPEN, RANKINGS, RankedStage, ranks
from der_fast.compaction.bank import FrozenBank
from der_fast.config import methods as declared
from der_fast.config.resolve import resolve_config
from der_fast.config.schema import Config, MasksConfig
from der_fast.config.tree import flatten, replace_keys, to_dict
from der_fast.data import MemorySource
from der_fast.data.augment.transform import transforms_for
from der_fast.model.architecture import build_architecture
from der_fast.model.extractor import Convolution, MaskedBatchNorm
from der_fast.model.layout import MaskLayout
from der_fast.training import latency
from der_fast.training.context import Context
from der_fast.training.methods import METHODS
from der_fast.training.methods.der.method import begin_step
from der_fast.training.methods.der.pruning import binarise, kept_share
from der_fast.training.model import Model, Network

CLASSES = tuple("abcd")
QUICK = ["--backbones", "resnet20", "--steps", "1", "--epochs", "2", "--held", "2", "--seeds", "1", "--classes-per-step", "2"]


def images(per_class: int, seed: int) -> MemorySource:
    noise = torch.Generator().manual_seed(seed)
    labels = torch.arange(len(CLASSES)).repeat_interleave(per_class)
    pixels = 50 * labels[:, None, None, None] + torch.randint(0, 50, (len(labels), 8, 8, 3), generator=noise)
    return MemorySource(pixels.to(torch.uint8), labels, CLASSES)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Few and small images, narrow networks, one thread; methods that a study registers are gone afterwards."""
    threads, before = torch.get_num_threads(), (dict(METHODS), dict(declared.METHODS))
    monkeypatch.setattr(pruning, "load_dataset", lambda config: (images(10, 0), images(4, 1)))
    monkeypatch.setattr(pruning, "WIDTHS", {"resnet20": 8})
    monkeypatch.setattr(latency, "REPEATS", 1)
    yield
    torch.set_num_threads(threads)
    for registered, usual in zip((METHODS, declared.METHODS), before, strict=True):
        registered.clear()
        registered.update(usual)


def study(out: Path, *options: str) -> list[dict]:
    assert command(["pruning", *QUICK, "--out", str(out), *options]) == 0
    return rows_in(out)


def ranked(name: str, group: str | None = None, live: tuple[int, ...] = ()) -> tuple[RankedStage, torch.Tensor]:
    """A stage of ResNet-20 that ranks, and its scores; of `group`, all channels but the `live` ones are scaled down to 1 %."""
    config = replace_keys(Config(), {**HELD_OPEN, "masks.target_params": 0.12, "runtime.threads": 1})
    source = images(10, 0)
    context = Context(config, torch.device("cpu"), *transforms_for(config.data, source.image_size))
    architecture = build_architecture("resnet20", width=8)
    state = begin_step(context, Model(Network(architecture)), len(CLASSES))
    layout = MaskLayout(architecture)
    if group is not None:
        scale = torch.ones(layout.channels)
        layout.by_group(scale)[group].fill_(0.01)[list(live)] = 1.0
        convs = [module for module in state.extractor.modules() if isinstance(module, Convolution)]
        for conv, module in zip(architecture.convs(), convs, strict=True):
            module.weight.data.mul_(scale[layout.slice_of(conv.target)].reshape(-1, 1, 1, 1))
        for module in state.extractor.modules():
            if isinstance(module, MaskedBatchNorm):
                module.weight.data.mul_(scale[module.where])
    stage = RankedStage(context, state, FrozenBank(), source, 0, config.first, score=RANKINGS[name])
    return stage, stage.score(stage)


def test_every_variant_gives_a_row_that_meets_its_budget(tmp_path):
    rows = study(tmp_path / "rows.jsonl", "--budgets", "0.24", "1/12", "--trials", "2")
    measured = [row for row in rows if not row["trial"]]
    assert {(row["variant"], row["budget"]) for row in measured} == {("unpruned", None)} | {
        (variant, budget) for variant in pruning.VARIANTS if variant != "unpruned" for budget in (0.24, 1 / 12)
    }
    assert len(measured) == 1 + 2 * (len(pruning.VARIANTS) - 1)
    for row in measured:
        assert 0 <= row["test_top1"] <= 100 and 0 <= row["held_top1"] <= 100 and len(row["per_step"]) == 1
        if row["variant"] not in ("unpruned", "paper"):
            # Of groups of 8 channels, one more would exceed the budget.
            assert 0.6 * row["budget"] < row["kept"] <= row["budget"]
            assert row["kept"] == row["per_step"][0]["kept_share"]
    # They differ in the channels of a group, not in how many it keeps.
    kept = {json.dumps(row["per_step"][0]["kept"]) for row in measured if row["variant"] in RANKINGS and row["budget"] == 0.24}
    assert len(kept) == 1
    trials = [row for row in rows if row["trial"]]
    assert trials and all(row["test_top1"] is None for row in trials)
    assert {row["sparsity"] for row in measured if row["variant"] == "paper"} <= {row["sparsity"] for row in trials}
    # The two defaults are one run as long as they are the same.
    assert [row["seconds"] for row in measured if row["variant"] == "default"] == [
        row["seconds"] for row in measured if row["variant"] == "default_before"
    ]
    said = table(rows)
    assert said.count("\n| ResNet-20, width 8 | 1 | 2 |") == len(measured) and "λ_s" in said


def test_a_killed_study_resumes_without_repeating_rows(tmp_path, monkeypatch):
    out, options = tmp_path / "rows.jsonl", ("--budgets", "0.24", "--variants", "unpruned", "random", "magnitude")
    result, calls = pruning.Study.result, []

    def dying(self, variant, job, trial):
        calls.append(variant)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return result(self, variant, job, trial)

    monkeypatch.setattr(pruning.Study, "result", dying)
    with pytest.raises(KeyboardInterrupt):
        study(out, *options)
    first = rows_in(out)
    # What a process leaves that is killed while it writes.
    out.write_text(out.read_text() + '{"variant": "rand')
    rows = study(out, *options)
    assert calls == ["unpruned", "random", "random", "magnitude"]
    assert rows[:1] == first and [row["variant"] for row in rows] == ["unpruned", "random", "magnitude"]
    assert study(out, *options) == rows and len(calls) == 4
    assert not out.with_name("rows.jsonl.claims").exists()


def test_a_row_that_another_process_measures_is_left_to_it(tmp_path):
    out = tmp_path / "rows.jsonl"
    args = pruning.parsed([*QUICK, "--budgets", "0.24", "--variants", "unpruned", "--out", str(out)])
    here = pruning.Study(args)
    (_, job), *_ = here.jobs()
    with Claims(out).claim(identity({**vars(job), "trial": False})) as mine:
        assert mine
        here.run()
        assert rows_in(out) == []
    here.run()
    assert len(rows_in(out)) == 1


def test_processes_get_the_same_options_and_the_worst_code_counts(tmp_path, monkeypatch):
    started = []

    class Worker:
        def __init__(self, command):
            started.append(command)

        def wait(self):
            return len(started) - 1

    monkeypatch.setattr(pruning.subprocess, "Popen", Worker)
    options = ["pruning", *QUICK, "--out", str(tmp_path / "rows.jsonl"), "--processes", "2"]
    assert command(options) == 1 and len(started) == 2
    assert all(pruning.parsed(each[4:]).processes == 1 and each[3 : 3 + len(options)] == options for each in started)


def test_two_steps_and_an_experiment_of_one_s_own(tmp_path):
    options = ("--steps", "2", "--budgets", "0.24", "--variants", "default", "--set", "masks.settle=0.5", "--name", "settle 0.5")
    (row,) = study(tmp_path / "rows.jsonl", *options, "--set", "classifier.epochs=1")
    assert row["variant"] == "settle 0.5" and row["changes"] == {"masks.settle": 0.5}
    assert [step["step"] for step in row["per_step"]] == [1, 2] and row["held_top1"] == row["per_step"][1]["top1"]
    assert all(-1 <= value <= 1 for step in row["per_step"] for value in step["rank_correlation"].values())
    for wrong in (["--set", "masks.lr=2"], ["--set", "masks.lr=2", "--name", "x"]):
        with pytest.raises(SystemExit):
            command(["pruning", *wrong])


@pytest.mark.parametrize("group", ["stage2", "stage2.1"])
@pytest.mark.parametrize("name", ["magnitude", "bn_scale", "saliency"])
def test_channels_that_matter_are_kept(name, group):
    layout, live = MaskLayout(build_architecture("resnet20", width=8)), (3, 5)
    stage, scores = ranked(name, group, live)
    best = {
        name: set(layout.by_group(values)[group].topk(2).indices.tolist())
        for name, values in (("it", scores), ("draw", ranked("random")[1]))
    }
    assert best["it"] == set(live) != best["draw"]
    masks = stage.state.masks
    masks.logits.data.copy_(ranks(layout, scores))
    keep = binarise(masks, stage.context.config.masks)
    kept = set(layout.by_group(keep)[group].nonzero().flatten().tolist())
    assert kept and (kept <= set(live) or kept >= set(live))
    assert 0.06 < kept_share(layout, keep) <= 0.12


def test_saliency_is_the_loss_s_and_leaves_the_network_alone():
    stage, scores = ranked("saliency")
    before = {name: value.clone() for name, value in stage.state.extractor.state_dict().items()}
    assert torch.equal(stage.score(stage), scores) and bool((scores > 0).all())
    assert all(torch.equal(value, before[name]) for name, value in stage.state.extractor.state_dict().items())


def test_masks_are_held_open_while_a_ranking_waits():
    stage, _ = ranked("random")
    for scale in (1 / HELD_OPEN["masks.s_max"], HELD_OPEN["masks.s_max"]):
        assert bool((stage.state.masks.with_sparsity(scale)[0] == 1).all())


def test_every_key_of_the_masks_has_its_value_from_before():
    keys = {key for key in flatten(to_dict(Config())) if key.startswith("masks.")}
    assert keys - {"masks.enabled", "masks.target_params"} == set(pruning.BEFORE)
    assert MasksConfig(**{key.partition(".")[2]: value for key, value in pruning.BEFORE.items()}) == MasksConfig()


def test_the_next_trial_lies_between_those_on_either_side():
    assert pruning.next_sparsity({}, 0.1) == pruning.FIRST_SPARSITY
    assert pruning.next_sparsity({3.0: 0.5}, 0.1) == 6.0 and pruning.next_sparsity({3.0: 0.01}, 0.1) == 1.5
    assert 3 < pruning.next_sparsity({1.0: 0.8, 3.0: 0.3, 6.0: 0.0}, 0.1) < 6
    assert 3 < pruning.next_sparsity({3.0: 0.11, 6.0: 0.05}, 0.1) < 4


def test_only_the_last_of_a_row_s_versions_counts(tmp_path):
    row = {"data": "cifar100", "backbone": "resnet20", "width": None, "steps": 1, "epochs": 60, "held": 50, "per_class": None}
    row |= {"precision": "fp32", "variant": "default", "budget": 0.24, "seed": 1, "changes": {}, "trial": False, "kept": 0.239}
    row |= {"test_top1": 70.0, "held_top1": 71.0, "sparsity": None, "per_step": [{"rank_correlation": {"stage1": 0.5}}]}
    newer = {**row, "changes": {"masks.settle": 0.5}, "test_top1": 72.0}
    other = {**newer, "seed": 2, "test_top1": 74.0}
    text = table([row, newer, other, {**row, "trial": True, "test_top1": 1.0}])
    assert "| ResNet-20 | 1 | 60 | 24.0 % | default | 71.0 ± 0.0 | 73.0 ± 1.4 | 23.9 ± 0.0 | – | 0.50 | 2 |" in text
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    assert command(["pruning", "--table", str(path), "--plot", str(tmp_path / "made" / "picture.svg")]) == 0
    assert "kept parameters" not in (tmp_path / "made" / "picture.svg").read_text()[:50]
    assert (tmp_path / "made" / "picture.svg").stat().st_size > 1000


def test_images_held_out_are_not_trained_on():
    base = resolve_config("cifar100", "B0-10", preset="cifar100-b0-10")
    found = pruning.load(base, 2, 5)
    assert torch.bincount(found.train.labels).tolist() == [5] * 4 and torch.bincount(found.held.labels).tolist() == [2] * 4
    whole = images(10, 0).images.reshape(4, 10, -1)
    assert torch.equal(found.train.images.reshape(4, 5, -1), whole[:, :5]) and torch.equal(
        found.held.images.reshape(4, 2, -1), whole[:, 8:]
    )
    assert pruning.load(base, 0, None).held is None and len(pruning.load(base, 0, None).train) == 40
