"""The search for tiles: what it times, what it records, and that a default that fails is said."""

from __future__ import annotations

import json

import pytest
import torch

from bench.harness.registry import Setting
from bench.studies import tiles
from der_fast.errors import BackendError
from der_fast.kernels import triton_runtime

CPU = torch.device("cpu")
PROBLEMS = list(tiles.problems(Setting(CPU, "smoke", "fused")))


def test_every_direction_is_searched_plain_and_as_in_the_chain():
    assert {(problem.direction, problem.chained) for problem in PROBLEMS} == {
        (direction, chained) for direction in ("forward", "dgrad", "wgrad") for chained in (True, False)
    }
    full = list(tiles.problems(Setting(CPU, "full", "fused")))
    assert len({problem.name for problem in full}) == len(full)
    assert not any(problem.layer.name == "stem" and problem.direction == "dgrad" for problem in full)


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_the_default_is_timed_first_and_no_tiles_twice(problem):
    found = problem.tiles(CPU, quick=False)
    first = next(iter(found.values()))[0]
    assert first == tiles.candidates(problem.direction, problem.shape, transformed=problem.chained)[0]
    assert len(set(found.values())) == len(found) and set(problem.tiles(CPU, quick=True)) <= set(found)
    assert all((split is not None) == (problem.direction == "wgrad") for _, split in found.values())


@pytest.mark.parametrize("direction", ["forward", "dgrad", "wgrad"])
def test_whatever_tiles_compute_it_it_is_the_same(direction):
    problem = next(one for one in PROBLEMS if one.direction == direction and one.chained)
    results = [run() for run in tiles.runs(problem, CPU, True).values()]
    tensors = [result[0] if isinstance(result, tuple) else result for result in results]
    assert len(tensors) > 2
    for tensor in tensors[1:]:
        # Sums in another order, rounded to bfloat16 once.
        torch.testing.assert_close(tensor.float(), tensors[0].float(), rtol=2**-7, atol=2**-7 * float(tensors[0].abs().max()))


def test_a_search_is_recorded_line_by_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tiles, "problems", lambda setting: iter(PROBLEMS[:1]))
    path = tmp_path / "tiles.jsonl"
    assert tiles.main(["--device", "cpu", "--smoke", "--json", str(path), "--commit", "abc"]) == 0
    (record,) = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert record["facts"]["commit"] == "abc" and record["failed"] == []
    assert record["default"] in record["milliseconds"] and record["milliseconds"][record["best"]] == min(record["milliseconds"].values())
    assert "[1/1] forward stage1" in capsys.readouterr().out


def test_a_default_that_fails_is_said(monkeypatch):
    monkeypatch.setattr(tiles, "measure", lambda runs, device: dict.fromkeys(list(runs)[1:], 1.0))
    record = tiles.search(PROBLEMS[0], CPU, True)
    assert record["default_over_best"] is None and record["failed"] == [record["default"]]
    assert "the default fails, " in tiles.line(PROBLEMS[0], record) and tiles.line(PROBLEMS[0], record).endswith(", 1 failed")


def test_without_a_gpu_there_is_nothing_to_search(monkeypatch):
    monkeypatch.setattr(triton_runtime, "usable", lambda device: (False, "Triton kernels need a CUDA device"))
    with pytest.raises(BackendError, match="the search for tiles cannot run here: Triton kernels need a CUDA device"):
        tiles.main(["--device", "cpu"])
