"""What is read from a run folder, and what is said about folders that are missing something or damaged."""

from __future__ import annotations

import json
from dataclasses import fields

import numpy as np
import pytest
from safetensors.numpy import save_file

from der_fast.errors import CheckpointError
from der_fast.report.record import read_run
from der_fast.training.figures import StepFigures

CLASSES = [["cat", "dog"], ["hen", "owl"]]


def test_reads_everything(tmp_path, make_run):
    metrics = make_run(tmp_path, CLASSES, backbone="resnet20", epochs=4, settle_from=3)
    run = read_run(tmp_path)
    assert run.class_names == ("cat", "dog", "hen", "owl")
    assert run.class_counts == (2, 4)
    assert run.top1 == tuple(metrics["top1"])
    assert run.kept[1]["stage3"] == tuple(metrics["kept"][1]["stage3"])
    assert run.confusion == tuple(map(tuple, metrics["confusion"]))
    assert [(row.step, row.stage, row.epoch) for row in run.history][3:6] == [
        (1, "representation", 4),
        (2, "representation", 1),
        (2, "representation", 2),
    ]
    assert run.pruned
    # 0.6 and 1.2 s of twice 30 s.
    assert run.data_share == pytest.approx(3.0)
    assert run.missing == ()


@pytest.mark.parametrize("name", [each.name for each in fields(StepFigures)])
def test_every_figure_of_a_step_is_read_as_it_is_declared(tmp_path, make_run, name):
    make_run(tmp_path / "run", CLASSES, **{name: [1.5, 2.5]})
    assert getattr(read_run(tmp_path / "run"), name) == (1.5, 2.5)
    make_run(tmp_path / "damaged", CLASSES, **{name: [1.5, "2.5"]})
    with pytest.raises(CheckpointError, match=f"'{name}' should be a number, not '2.5'"):
        read_run(tmp_path / "damaged")


@pytest.mark.parametrize("changes", [{"data_seconds": None}, {"training_seconds": [30.0]}, {"data_seconds": [None, 1.0]}])
def test_waiting_is_left_out_where_it_was_not_measured(tmp_path, make_run, changes):
    make_run(tmp_path, CLASSES, **changes)
    run = read_run(tmp_path)
    assert run.data_share is None and not any("seconds" in line for line in run.missing)


def test_trajectories_know_groups_and_settling(tmp_path, make_run):
    make_run(tmp_path, CLASSES, backbone="resnet20", epochs=4, settle_from=3)
    first, second = read_run(tmp_path).trajectories
    assert (first.step, second.step, first.epochs, first.settled_from) == (1, 2, 4, 3)
    # ResNet-20 of width 16: the stream's parts have 16, 16 and 32 channels; 3 blocks each of 16, 32 and 64 inside.
    kinds = first.kinds()
    assert {kind: int(chosen.sum()) for kind, chosen in kinds.items()} == {"residual streams": 64, "inner channels": 336}


def test_trajectory_counts_by_hand(tmp_path, make_run):
    make_run(tmp_path, [["a", "b"]], backbone="resnet20")
    logits = np.array([[1, 1, -1], [-1, 1, -1], [1, 2, 1], [1, -1, 1]], dtype=np.float32)
    times = np.array([0, 0.5, 1, 1])
    file = tmp_path / "steps" / "01" / "mask_logits.safetensors"
    groups = json.dumps(["stage1", "stage1.0"])
    save_file({"logits": logits, "times": times, "offsets": np.array([0, 1, 3])}, file, metadata={"groups": groups})
    (masks,) = read_run(tmp_path).trajectories
    # The last row is the cut: what it changes is not wavering.
    assert (masks.learned, masks.epochs) == (3, 1)
    assert masks.crossings().tolist() == [2, 0, 1]
    # Kept: the first group's only channel, and of the second group the one that stood behind the other.
    assert masks.led_from_the_start() == 0.5
    assert masks.alive_share_per_group().tolist() == [[1.0, 0.0, 1.0, 1.0], [0.5, 0.5, 1.0, 0.5]]


def test_missing_folder_and_missing_metrics(tmp_path):
    with pytest.raises(CheckpointError, match=r"no run folder .*nowhere"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no metrics\.json.*resume=True"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"top1": [90.0', "damaged"),
        ("\x00\x01", "damaged"),
        ('{"top1": [NaN]}', "NaN is not a JSON number"),
        ("[1, 2]", "list instead of a table"),
        ("{}", "no 'top1'.*no step has finished"),
        ('{"top1": [], "steps": []}', "no step has finished"),
        ('{"top1": ["90"], "steps": [["a"]]}', "'top1' should be a number, not '90'"),
        ('{"top1": 90.0, "steps": [["a"]]}', "'top1' should be a list"),
        ('{"top1": [90.0, 80.0], "steps": [["a"]]}', "'steps' should be a list of 2 lists"),
        ('{"top1": [90.0], "steps": [["a"]], "kept": [{"stage1": [1]}]}', r"'kept\.stage1' should be \[kept, total\]"),
    ],
)
def test_damaged_metrics_name_file_and_key(tmp_path, text, complaint):
    (tmp_path / "metrics.json").write_text(text)
    with pytest.raises(CheckpointError, match=complaint) as error:
        read_run(tmp_path)
    assert str(tmp_path / "metrics.json") in str(error.value)


def test_only_the_essentials(tmp_path):
    (tmp_path / "metrics.json").write_text('{"top1": [90.0, 80.0], "steps": [["a"], ["b"], ["c"]]}')
    run = read_run(tmp_path)
    assert (run.average_top1, run.last_top1, run.planned_steps) == (85.0, 80.0, 3)
    assert run.params == (None, None)
    assert run.compaction_error == (None, None)
    assert not run.pruned
    named = " ".join(run.missing)
    for what in (
        "history.json",
        "params:",
        "latency_ms:",
        "Accuracy per class set",
        "Confusion matrix",
        "Kept channels",
        "Mask trajectories",
    ):
        assert what in named


def test_null_in_a_list_is_a_gap_not_an_error(tmp_path, make_run):
    make_run(tmp_path, CLASSES, latency_ms=[None, 3.0])
    assert read_run(tmp_path).latency_ms == (None, 3.0)


def test_lists_shorter_than_the_run_are_named(tmp_path, make_run):
    make_run(tmp_path, CLASSES, seconds=[1.5])
    run = read_run(tmp_path)
    assert run.seconds == (1.5, None)
    assert "seconds: has 1 of 2 values in metrics.json." in run.missing


def test_confusion_of_another_size_is_left_out(tmp_path, make_run):
    make_run(tmp_path, CLASSES, confusion=[[1, 0], [0, 1]])
    run = read_run(tmp_path)
    assert run.confusion == ()
    assert any("2 rows for 4 classes" in sentence for sentence in run.missing)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"epochs": 3}', '{"epochs": [{"step": 1}]}', '{"epochs": [{"step": "x", "epoch": 1}]}'])
def test_damaged_history_is_named_and_left_out(tmp_path, make_run, text):
    make_run(tmp_path, CLASSES)
    (tmp_path / "history.json").write_text(text)
    run = read_run(tmp_path)
    assert run.history == ()
    assert any("history.json is damaged" in sentence for sentence in run.missing)


def unfinished_rows(*epochs):
    row = {"step": 3, "epochs": 8, "loss": 0.51234, "accuracy": 81.26}
    return [{**row, "stage": stage, "epoch": epoch} for stage, epoch in epochs]


def test_a_step_in_progress_is_said(tmp_path, make_run):
    make_run(tmp_path, CLASSES)
    assert read_run(tmp_path).unfinished is None
    rows = json.loads((tmp_path / "history.json").read_text())["epochs"]
    rows += unfinished_rows(("representation", 7), ("representation", 8), ("classifier", 1))
    (tmp_path / "history.json").write_text(json.dumps({"epochs": rows}))
    run = read_run(tmp_path)
    told = "Step 3 is not finished: its last finished epoch is 1 of 8 of the classifier stage (loss 0.512, training accuracy 81.3 %)."
    assert run.unfinished == told
    assert any(sentence.startswith(told) for sentence in run.missing)
    assert len(run.top1) == 2
    del rows[-1]["epochs"], rows[-1]["loss"], rows[-1]["accuracy"]
    (tmp_path / "history.json").write_text(json.dumps({"epochs": rows}))
    assert read_run(tmp_path).unfinished == "Step 3 is not finished: its last finished epoch is 1 of the classifier stage."


@pytest.mark.parametrize(
    ("history", "told"),
    [
        (None, ""),
        ("{", ""),
        ('{"epochs": []}', ""),
        (
            json.dumps({"epochs": unfinished_rows(("representation", 2))}),
            "its last finished epoch is 2 of 8 of the representation stage (loss 0.512",
        ),
    ],
)
def test_a_run_whose_first_step_is_in_progress(tmp_path, history, told):
    if history is not None:
        (tmp_path / "history.json").write_text(history)
    with pytest.raises(CheckpointError, match="holds no metrics.json.*when the first step ends") as error:
        read_run(tmp_path)
    assert told in str(error.value)


def test_truncated_mask_file_is_named_and_left_out(tmp_path, make_run):
    make_run(tmp_path, CLASSES, backbone="resnet20")
    file = tmp_path / "steps" / "01" / "mask_logits.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    run = read_run(tmp_path)
    assert [masks.step for masks in run.trajectories] == [2]
    assert any("Mask trajectories of step 1: steps/01/mask_logits.safetensors is damaged" in sentence for sentence in run.missing)


@pytest.mark.parametrize(
    ("logits", "offsets", "groups"),
    [
        (np.zeros(4, dtype=np.float32), [0, 4], ["stage1"]),
        (np.full((2, 4), np.nan, dtype=np.float32), [0, 4], ["stage1"]),
        (np.zeros((2, 4), dtype=np.float32), [0, 3], ["stage1"]),
        (np.zeros((2, 4), dtype=np.float32), [0, 2, 2, 4], ["a", "b", "c"]),
        (np.zeros((2, 4), dtype=np.float32), [0, 4], ["a", "b"]),
    ],
    ids=["one-dimensional", "not finite", "channels left over", "empty group", "more groups than offsets"],
)
def test_mask_files_that_contradict_themselves_are_left_out(tmp_path, make_run, logits, offsets, groups):
    make_run(tmp_path, CLASSES)
    file = tmp_path / "steps" / "01" / "mask_logits.safetensors"
    file.parent.mkdir(parents=True)
    save_file({"logits": logits, "offsets": np.array(offsets)}, file, metadata={"groups": json.dumps(groups)})
    run = read_run(tmp_path)
    assert run.trajectories == ()
    assert any("step 1" in sentence and "damaged" in sentence for sentence in run.missing)


def test_masks_off_is_said_once(tmp_path, make_run):
    make_run(tmp_path, CLASSES)
    assert read_run(tmp_path).missing == ("Kept channels and mask trajectories: the run was not pruned (masks.enabled = false).",)
