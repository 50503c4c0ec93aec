"""The study of the machine code: what it prints and when it refuses; what it finds is tested in tests/kernels/test_machine_code.py."""

from __future__ import annotations

from bench.studies import machine_code
from der_fast.errors import BackendError
from der_fast.kernels.compile_case import CompileCase

ROW = {
    "name": "conv.forward.bf16.64x64",
    "capability": 90,
    "registers": 96,
    "shared": 1024,
    "stack": 0,
    "blocks": 5,
    "loads": {},
    "copies": {16: 3},
    "stores": {16: 4, 4: 3},
    "products": {},
    "multiply_adds": 2048,
    "lacks": {"resident blocks": "its registers leave room for one block"},
    "faults": ["has not 'tensor cores'"],
}


def test_a_line_says_what_is_missing_and_what_is_wrong():
    lines = machine_code.line_of(ROW).splitlines()
    assert "loads -, copies 16×3, stores 16×4 4×3, FFMA×2048" in lines[0] and "1.0 KiB" in lines[0] and "5 blocks" in lines[0]
    assert [line.strip() for line in lines[1:]] == [
        "lacks resident blocks: its registers leave room for one block",
        "FAULT: has not 'tensor cores'",
    ]


def test_interpreted_kernels_are_refused(monkeypatch, capsys):
    def refuse():
        raise BackendError("what is interpreted is not compiled")

    monkeypatch.setattr(machine_code.ahead_of_time, "cases", refuse)
    machine_code.cases_by_name.cache_clear()
    assert machine_code.main([]) == 2
    assert "what is interpreted is not compiled" in capsys.readouterr().err


def test_a_name_that_nothing_has_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(machine_code, "cases_by_name", lambda: {"conv.forward.bf16.64x64": None})
    assert machine_code.main(["covn*"]) == 2
    assert "no case fits covn*: names begin with conv" in capsys.readouterr().err


def test_a_fault_is_the_exit_code_and_rows_are_written(monkeypatch, tmp_path, capsys):
    cases = [CompileCase(ROW["name"], None, {}), CompileCase("conv.descriptor", None, {}, capabilities=())]
    monkeypatch.setattr(machine_code, "cases_by_name", lambda: {case.name: case for case in cases})
    for faults, code in ((ROW["faults"], 1), ([], 0)):
        monkeypatch.setattr(
            machine_code, "row_of", lambda name, capability, faults=faults: {**ROW, "capability": capability, "faults": faults}
        )
        assert machine_code.main(["--jobs", "1", "--arch", "90", "80", "--json", str(tmp_path / "rows.jsonl")]) == code
        assert [line.count('"conv.forward') for line in (tmp_path / "rows.jsonl").read_text().splitlines()] == [1, 1]
    assert "2 kernels, 2 lack something and say so, 0 are not what they declare" in capsys.readouterr().out
