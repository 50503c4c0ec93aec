"""Results files: reading, comparing, judging goals, tables."""

from __future__ import annotations

import json

import pytest

from bench.harness import records, runner
from bench.harness.ceilings import Ceilings
from bench.harness.registry import Work
from bench.harness.timing import summary
from bench.reports import compare, goals, gpu_table, plots


def write(path, *entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return path


def test_what_was_appended_is_read(tmp_path, header_of, record_of):
    path = tmp_path / "new" / "r.jsonl"
    entries = [header_of(), record_of("a.b", "ours", 1.0)]
    for entry in entries:
        runner.append(path, entry)
    assert records.read(path) == entries


def test_half_a_last_line_is_left_out(tmp_path, record_of):
    path = write(tmp_path / "r.jsonl", record_of("a.b", "ours", 1.0))
    path.write_text(path.read_text() + '{"kind": "res', encoding="utf-8")
    assert len(records.read(path)) == 1


@pytest.mark.parametrize(
    ("line", "said"), [("nonsense", "line 1: not JSON"), ("[1]", "line 1: not a record"), ('{"kind": "x"}', "line 1: not a record")]
)
def test_damage_is_named(tmp_path, line, said, record_of):
    path = tmp_path / "r.jsonl"
    path.write_text(line + "\n" + json.dumps(record_of("a.b", "ours", 1.0)) + "\n", encoding="utf-8")
    with pytest.raises(records.ResultsError, match=said):
        records.read(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(records.ResultsError, match="no_such.jsonl"):
        records.read(tmp_path / "no_such.jsonl")


def test_the_last_measurement_counts_and_a_later_failure_takes_it_away(record_of):
    old, new = record_of("a.b", "ours", 2.0), record_of("a.b", "ours", 1.0)
    broken = {**record_of("a.b", "ours", 0.0), "status": "failed", "reason": "wrong result"}
    assert [entry["ms"] for entry in records.latest([old, new]).values()] == [1.0]
    assert records.latest([old, broken]) == {}
    assert records.failures([old, broken]) == [broken]
    assert records.failures([broken, new]) == []
    assert records.failures([{**broken, "status": "unavailable"}]) == []


def test_ratios_of_two_files(header_of, record_of):
    before = [header_of(), record_of("a.b", "ours", 2.0, {"n": 1}), record_of("a.b", "ours", 1.0, {"n": 2}), record_of("a.c", "ours", 1.0)]
    after = [header_of(), record_of("a.b", "ours", 1.0, {"n": 1}), record_of("a.b", "ours", 1.05, {"n": 2}), record_of("a.d", "ours", 1.0)]
    found = compare.compare(before, after)
    assert [(change.params, round(change.ratio, 3), change.clear) for change in found.changes] == [
        ("n 1", 2.0, True),
        ("n 2", 0.952, False),
    ]
    assert found.only_before == ["a.c[] ours"] and found.only_after == ["a.d[] ours"] and found.warnings == []
    text = compare.text(found)
    assert "   2.000       2.0000 →      1.0000 ms  a.b[n 1] ours" in text and "~  0.952" in text


def test_incomparable_files_are_called_so(header_of, record_of):
    cpu = header_of(scale="smoke")
    cpu["facts"]["kind"] = "cpu"
    found = compare.compare([header_of(), record_of("a.b", "ours", 1.0)], [cpu, record_of("a.b", "ours", 1.0, device="a CPU")])
    assert found.warnings == [
        "different devices: a GPU and a CPU",
        "measured on a CPU: this says nothing about a GPU",
        "smoke runs are not measurements: tiny shapes, one sample",
    ]
    assert compare.text(compare.compare([], [])) == "the files have nothing in common"


def judged(entries, text):
    (pair,) = [pair for pair in goals.verdicts(entries) if pair[0].text.startswith(text)]
    return goals.line(*pair)


def step(record_of, eager, ours, batch=128, **changes):
    rows = (("eager_bf16", eager), ("ours", ours))
    return [record_of("step.train", name, ms, {"batch": batch}, **changes) for name, ms in rows]


def test_a_goal_is_met_or_missed_by_the_measured_ratio(header_of, record_of):
    name = "ResNet-18 masked training step over eager bf16, batch 128"
    assert judged([header_of(), *step(record_of, 20.0, 4.0)], name)[1:] == ("5.00 ×", "met")
    assert judged([header_of(), *step(record_of, 20.0, 8.0)], name)[1:] == ("2.50 ×", "missed in 1 of 1")


def test_nothing_is_claimed_without_a_measurement(header_of, record_of):
    cpu, smoke, reference = header_of(), header_of(scale="smoke"), header_of(backend="reference")
    cpu["facts"]["kind"] = "cpu"
    for header in (cpu, smoke, reference):
        found = [goals.line(goal, values) for goal, values in goals.verdicts([header, *step(record_of, 20.0, 1.0)])]
        assert {verdict for _, _, verdict in found} == {"not measured"}
    assert {goals.line(*pair)[2] for pair in goals.verdicts([header_of()])} == {"not measured"}


def test_ratios_are_formed_within_one_run_only(header_of, record_of):
    eager, ours = step(record_of, 20.0, 4.0)
    other = header_of(run="two")
    entries = [header_of(), other, eager, {**ours, "run": "two"}]
    assert judged(entries, "ResNet-18 masked training step over eager bf16, batch 128")[2] == "not measured"


def test_goals_at_most_and_in_several_places(header_of, record_of):
    der = [record_of("step.der", "ours", ms, {"t": t, "batch": 128}) for t, ms in ((1, 4.0), (10, 6.0))]
    assert judged([header_of(), *der], "full DER step at t = 10, pruned, over the same at t = 1")[1:] == ("1.50 ×", "missed in 1 of 1")
    shares = [record_of("masked_bn.forward", "ours", 1.0, {"stage": s, "batch": 512}, share_of_copy=v) for s, v in ((1, 0.9), (2, 0.8))]
    assert judged([header_of(), *shares], "masked_bn: share")[1:] == ("80 to 90 %", "missed in 1 of 2")


def test_tables_and_pictures(header_of, record_of, tmp_path):
    broken = {**record_of("conv.forward", "ours", 0.0, {"batch": 1}), "status": "failed", "reason": "wrong result: far off"}
    entries = [header_of(), *step(record_of, 20.0, 4.0, images_per_s=1000.0, gb_per_s=2000.0, share_of_copy=0.5), broken]
    table = gpu_table.full_table(entries)
    assert "| step.train: batch 128 | ours | 4 (3.6–4.4) | 5.00 × | 2000 (50 %) |  | 1000 | 10 |" in table
    assert "* conv.forward ({'batch': 1}) ours: wrong result: far off" in table
    (path,) = plots.plot(entries, tmp_path)
    assert path.name == "step.png" and path.read_bytes().startswith(b"\x89PNG")


def test_rates_come_from_stated_work(doubling):
    import torch

    from bench.harness.registry import Variant

    variant = Variant("ours", torch.bfloat16, lambda tensors: lambda: {})
    case = doubling(variant, work=lambda dtype: Work(bytes=6e6, flops=2e9, images=10))
    found = runner.rates(case, variant, summary([2.0], "graph"), Ceilings(6.0, {"bf16": 2.0}))
    assert found["gb_per_s"] == pytest.approx(3.0) and found["share_of_copy"] == pytest.approx(0.5)
    assert found["tflop_per_s"] == pytest.approx(1.0) and found["share_of_matmul"] == pytest.approx(0.5)
    assert found["images_per_s"] == pytest.approx(5000)


def test_median_and_percentiles():
    found = summary([5.0, 1.0, 2.0, 4.0, 3.0, 6.0], "launch")
    assert (found.median, found.p20, found.p80, found.samples) == (3.5, 2.0, 5.0, 6)
