"""Why channels stayed: what the start's draw explains and what learning changed, counted by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from scipy.stats import spearmanr

from der_fast.report import reasons, write_report
from der_fast.report.record import read_run
from der_fast.report.trajectory import MaskTrajectory

# Two groups. In the first, channel 3 rises above 0 and 1; in the second, nothing changes its order.
START = [2.0, 1.5, 1.0, 0.5, 0.1, 1.9, 0.2, 1.0]
LEARNED = [1.0, 0.9, 2.0, 1.8, 0.0, 1.9, 0.2, 1.0]
CUT = [-0.2, -0.3, 0.8, 0.6, -1.2, 1.4, -0.3, 0.5]


def trajectory(rows=(START, LEARNED, CUT), prices=(0.25, 1.0), thresholds=(1.2, 0.5), offsets=(0, 5, 8)):
    known = [None if values is None else np.array(values) for values in (prices, thresholds)]
    return MaskTrajectory(
        2, np.array(rows, dtype=np.float32), np.array([0.0, 1.0, 1.0]), np.array(offsets), ("stage1", "stage1.0"), 2, *known
    )


def test_groups_by_hand():
    first, second = reasons.reasons(trajectory())
    assert first.kept.tolist() == [False, False, True, True, False] and first.drawn.tolist() == [True, True, False, False, False]
    assert second.kept.tolist() == second.drawn.tolist() == [True, False, True]
    assert second.correlation == pytest.approx(1) and first.correlation == pytest.approx(spearmanr(START[:5], LEARNED[:5]).statistic)
    assert (first.price, first.threshold, second.price, second.threshold) == (0.25, 1.2, 1.0, 0.5)
    table = reasons.table_of([trajectory()])
    assert [len(row) for row in table.rows] == [len(table.columns)] * 2
    assert table.rows[0] == ("2", "stage1", "5", "2", "0.250", "1.20", "1.02", "1.14", "-0.06", "1.80", "1.00", "0.20", "0", "2", "2–3")
    assert table.rows[1][-4:] == ("1.00", "2", "0", "–")
    assert reasons.table_of([]) is None


def test_the_caption_says_what_explains_the_kept_channels():
    text = reasons.caption(reasons.reasons(trajectory()))
    assert "2 groups lost some channels and kept others, 4 in all. Of these, 2 would also have been kept by the order at the start" in text
    # 2 · 2 / 5 + 2 · 2 / 3 = 2.1.
    assert "(an order unrelated to it would share 2); 2 rose above others while masks were learned." in text
    assert "the median 0.60 over 2 groups (from 0.20 to 1.00), and is below 0.5 in 1." in text
    assert "logits had to exceed 0.50 to 1.20" in text


def test_without_a_choice_without_a_cut_and_without_records():
    everything = [[1.0] * 8, [1.0] * 8, [1.0] * 8]
    text = reasons.caption(reasons.reasons(trajectory(everything, thresholds=(0.0, 0.0))))
    assert text == "No group had a choice: each kept all of its channels or none. No budget cut any channel: logits had to exceed 0."
    unknown = trajectory(prices=None, thresholds=None)
    assert "did not record prices and thresholds" in reasons.caption(reasons.reasons(unknown))
    assert [row[4:6] for row in reasons.table_of([unknown]).rows] == [("–", "–")] * 2
    assert reasons.picture_of(unknown).width > 100


def test_rank_correlation_agrees_with_scipy():
    draw = np.random.default_rng(0)
    for size in (2, 3, 17, 64):
        # Few values: many are equal.
        one, other = (draw.integers(0, 6, size).astype(np.float32) for _ in range(2))
        one[:2], other[:2] = (0, 1), (1, 0)
        assert reasons.rank_correlation(one, other) == pytest.approx(spearmanr(one, other).statistic)
    single = np.ones(1, dtype=np.float32)
    assert reasons.rank_correlation(single, single) is None
    assert reasons.rank_correlation(np.ones(3, dtype=np.float32), np.arange(3, dtype=np.float32)) is None


def test_numbers_in_short():
    assert [reasons.spans(numbers) for numbers in ([], [4], [0, 1, 2, 5, 7, 8])] == ["", "4", "0–2, 5, 7–8"]


def test_a_run_of_an_earlier_version_says_what_is_not_known(tmp_path, make_run, read_page):
    make_run(tmp_path, [["a", "b"], ["c", "d"]], backbone="resnet20", epochs=2)
    file = tmp_path / "steps" / "01" / "mask_logits.safetensors"
    tensors = load_file(file)
    groups = list(read_run(tmp_path).trajectories[0].groups)
    for name in ("prices", "thresholds"):
        del tensors[name]
    save_file(tensors, file, metadata={"groups": json.dumps(groups)})
    page = read_page(write_report(tmp_path))
    assert "Prices and thresholds of the masks: the version that saved step 1 did not record them." in page.text
    assert "The version that saved this step did not record prices and thresholds." in page.text
    assert {row[4] == "–" for row in page.table("step", "group") if row[0] == "1"} == {True}
    assert {row[4] == "–" for row in page.table("step", "group") if row[0] == "2"} == {False}


@pytest.mark.parametrize("values", [[1.0], [np.nan] * 12, [-1.0] * 12])
def test_damaged_thresholds_are_refused(tmp_path, make_run, values):
    make_run(tmp_path, [["a", "b"]], backbone="resnet20", epochs=2)
    file = tmp_path / "steps" / "01" / "mask_logits.safetensors"
    groups = list(read_run(tmp_path).trajectories[0].groups)
    save_file({**load_file(file), "thresholds": np.array(values)}, file, metadata={"groups": json.dumps(groups)})
    run = read_run(tmp_path)
    assert run.trajectories == () and any("thresholds of shape" in sentence for sentence in run.missing)
