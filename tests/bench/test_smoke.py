"""Every case of the registry runs and passes its gate on tiny shapes. That it works; nothing about speed."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from bench import __main__ as command
from bench.harness import ceilings, runner
from bench.harness.facts import ROOT
from bench.harness.registry import GROUPS, OURS, Setting, cases_of, chosen

CPU = torch.device("cpu")
# Of every case there is; a group at a time would take a busy machine minutes.
NAMES = list(dict.fromkeys(case.name for case in cases_of(Setting(CPU, "smoke"))))
# One case of every kernel. Whole banks, chains backwards and steps are the same kernels many times over, and take the interpreter minutes.
INTERPRETED = (
    "masked_bn.forward[stage=1,batch=3,residual=yes]",
    "masked_bn.backward[stage=1,batch=3,residual=yes]",
    "masked_bn.eval[stage=1,batch=3,residual=yes]",
    "channel_masks.both[how=launch]",
    "conv.forward[layer=down2,batch=3]",
    "conv.dgrad[layer=short2,batch=3]",
    "conv.wgrad[layer=down2,batch=3]",
    "conv_chain.forward",
    "bank.layer",
    "augment.batch",
    "compact.pack[dtype=float32,align=1]",
)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run_all(setting, cases):
    found = runner.Runner(setting, ceilings.Ceilings(1.0, {"bf16": 1.0}), {"time": "now", "commit": "abc", "device": "a CPU"})
    return list(found.run(cases))


@pytest.mark.parametrize("name", NAMES)
def test_every_variant_of_every_case_is_right(name, setting):
    cases = chosen(cases_of(setting, [name.split(".")[0]]), [name])
    records = run_all(setting, cases)
    assert [record["reason"] for record in records if record["status"] == "failed"] == []
    assert len(records) == sum(len(case.variants) for case in cases) > 0
    assert all(record["ms"] > 0 for record in records if record["status"] == "ok")
    # A GPU's rivals are all that may be missing on a CPU.
    assert {record["reason"] for record in records if record["status"] == "unavailable"} <= {"needs a GPU"}


@pytest.mark.parametrize("backend", ["reference", "fused"])
def test_nothing_is_measured_that_the_smoke_run_leaves_out(backend):
    def variants(scale):
        found: dict[str, set[str]] = {}
        for case in cases_of(Setting(CPU, scale, backend)):
            found.setdefault(case.name, set()).update(variant.name for variant in case.variants)
        return found

    tiny = variants("smoke")
    assert list(tiny) == NAMES and {name.split(".")[0] for name in NAMES} == set(GROUPS)
    assert variants("full") == tiny
    assert all(names <= tiny[name] for name, names in variants("quick").items())


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, kernels are compiled for it and do not run on the CPU")
@pytest.mark.parametrize("pattern", INTERPRETED)
def test_the_kernels_pass_the_gate_in_the_interpreter(pattern):
    setting = Setting(CPU, "smoke", "fused", interpreted=True)
    records = run_all(setting, chosen(cases_of(setting, [pattern.split(".")[0]]), [pattern]))
    own = [record for record in records if record["variant"].startswith(OURS)]
    assert own and {record["status"] for record in own} == {"ok"}, [record.get("reason") for record in own]
    assert {record["backend"] for record in own} == {"fused, interpreted"}


@pytest.mark.parametrize("scale", ["full", "quick", "smoke"])
def test_cases_have_names_of_their_own_and_something_of_ours(scale):
    cases = cases_of(Setting(CPU, scale))
    assert len({case.id for case in cases}) == len(cases)
    for case in cases:
        names = [variant.name for variant in case.variants]
        assert len(set(names)) == len(names), case.id
        assert case.name == "augment.loader" or OURS in names, case.id
        assert case.group in GROUPS and case.timing in ("graph", "launch", "once")


def test_the_goals_name_cases_and_variants_that_exist(monkeypatch):
    from bench.reports import goals

    asked: list[tuple[str, str, dict]] = []
    monkeypatch.setattr(goals, "_value", lambda records, case, variant, key="ms", **params: asked.append((case, variant, params)) or [])
    for goal in goals.GOALS:
        goal.measure([])
    cases = cases_of(Setting(CPU, "full"))
    assert len(asked) >= len(goals.GOALS)
    for name, variant, params in asked:
        fitting = [case for case in cases if case.name == name and all(case.params[key] == value for key, value in params.items())]
        assert fitting and all(variant in [one.name for one in case.variants] for case in fitting), (name, variant, params)


def test_choosing_cases(setting):
    cases = cases_of(setting, ["conv"])
    assert {case.name for case in chosen(cases, ["conv.dgrad"])} == {"conv.dgrad"}
    assert [case.id for case in chosen(cases, ["conv.wgrad[layer=down2,*"])] == ["conv.wgrad[layer=down2,batch=3]"]
    assert chosen(cases, ["conv"]) == chosen(cases, []) == cases and chosen(cases, ["other"]) == []


def test_the_command_writes_records_that_compare_reads(tmp_path, capsys):
    path = tmp_path / "r.jsonl"
    options = ["masked_bn.eval", "--groups", "masked_bn", "--device", "cpu", "--backend", "reference", "--smoke", "--json", str(path)]
    assert command.main(["run", *options, "--variants", "eager_bf16", "ours"]) == 0
    header, *records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert header["kind"] == "run" and header["scale"] == "smoke" and header["ceilings"]["gb_per_s"] > 0
    assert {"torch", "triton", "python"} <= set(header["facts"]["versions"]) and header["facts"]["commit"]
    assert {record["variant"] for record in records} == {"eager_bf16", "ours"}
    assert all(record["run"] == header["run"] and record["device"] == header["facts"]["device"] for record in records)
    assert command.main(["compare", str(path), str(path)]) == 0
    said = capsys.readouterr().out
    assert "it says nothing about speed on a GPU" in said and "1.000" in said and "smoke runs are not measurements" in said
    assert command.main(["table", str(path)]) == 0
    assert "No goals are judged" in capsys.readouterr().out


def test_list_and_mistakes(capsys):
    assert command.main(["list", "masked_bn.*", "--device", "cpu", "--smoke"]) == 0
    assert "masked_bn.forward[stage=1,batch=3,residual=no]: eager_fp32, eager_bf16" in capsys.readouterr().out
    for verb in ("list", "run"):
        assert command.main([verb, "no_such_case", "--device", "cpu", "--smoke"]) == 2
        assert "no case matches; `python -m bench list` shows them" in capsys.readouterr().err
    assert command.main(["run", "--device", "cuda:99"]) == 2
    assert command.main(["compare", "no_such_file", "no_such_file"]) == 2
    assert "error: cannot read no_such_file" in capsys.readouterr().err


def test_what_would_be_lost_is_refused_before_anything_is_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ceilings, "measured", lambda setting: pytest.fail("measured"))
    options = ["run", "masked_bn.eval", "--groups", "masked_bn", "--device", "cpu", "--smoke"]
    assert command.main([*options, "--variants", "ours", "mine"]) == 2
    assert "no case here has a variant 'mine': choose from compile, eager_bf16" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert command.main([*options, "--json", str(tmp_path / "file" / "r.jsonl")]) == 2
    assert "error: cannot write" in capsys.readouterr().err
    (tmp_path / "empty.jsonl").write_text("")
    assert command.main(["plot", str(tmp_path / "empty.jsonl"), "--out", str(tmp_path)]) == 2
    assert "nothing to draw" in capsys.readouterr().err


def test_the_micro_cases_run_under_pytest_benchmark(tmp_path):
    report = tmp_path / "report.json"
    command_line = [sys.executable, "-m", "pytest", "bench", "--benchmark-only", "-q", "-k", "eval"]
    # In a process of pytest-xdist nothing is timed.
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    command_line.append(f"--benchmark-json={report}")
    done = subprocess.run(command_line, cwd=ROOT, env=alone, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout[-3000:]
    assert len(json.loads(report.read_text(encoding="utf-8"))["benchmarks"]) >= 12
