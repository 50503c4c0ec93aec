"""The README's tables are what the results files say."""

from __future__ import annotations

import json

import pytest

from bench import __main__ as command
from bench.reports import cpu_table, gpu_table, readme


def test_the_readme_says_what_the_results_say():
    assert command.main(["readme", "--check"]) == 0


def test_another_result_changes_the_table(tmp_path):
    (tmp_path / "cifar10.jsonl").write_text(
        "".join(
            json.dumps(
                {"variant": "unpruned", "average_top1": top, "last_top1": 40.0, "params": [5], "params_unpruned": [5], "final_params": 2e6}
            )
            + "\n"
            for top in (50.0, 52.0)
        )
    )
    assert (
        "| the same, unpruned | 51.0 ± 1.4 % average, 40.0 ± 0.0 % last | 100 % (2.0 M after step 1) | the same command |"
        in cpu_table.table(tmp_path)
    )


def test_only_the_text_between_the_markers_is_replaced():
    begin, end = readme.markers("results")
    text = f"before\n{begin}\nold\n{end}\nafter\n"
    assert readme.replaced(text, "results", "new\n") == f"before\n{begin}\nnew\n{end}\nafter\n"


@pytest.mark.parametrize("text", ["none", "{begin}", "{end}\n{begin}", "{begin}\n{begin}\n{end}"])
def test_missing_markers_are_named(text):
    begin, end = readme.markers("results")
    with pytest.raises(readme.MarkerError, match="exactly once"):
        readme.replaced(text.format(begin=begin, end=end), "results", "new")


def test_a_stale_readme_is_told_and_rewritten(tmp_path, monkeypatch, capsys):
    stale = tmp_path / "README.md"
    stale.write_text(readme.README.read_text(encoding="utf-8").replace("% average", "% mean"), encoding="utf-8")
    monkeypatch.setattr(readme, "README", stale)
    assert command.main(["readme", "--check"]) == 1
    assert "run `python -m bench readme`" in capsys.readouterr().err
    assert command.main(["readme"]) == 0 and command.main(["readme", "--check"]) == 0


def test_without_a_gpu_file_the_readme_claims_nothing(tmp_path, header_of, record_of):
    assert gpu_table.table(tmp_path) == gpu_table.NOTHING
    cpu = header_of()
    cpu["facts"]["kind"] = "cpu"
    (tmp_path / "gpu.jsonl").write_text(json.dumps(cpu) + "\n")
    assert gpu_table.table(tmp_path) == gpu_table.NOTHING


def test_a_gpu_file_gives_goals_with_device_and_commit(tmp_path, header_of, record_of):
    entries = [
        header_of(),
        *(record_of("bank.whole", name, ms, {"t": 10}) for name, ms in (("eager", 9.0), ("branches", 4.0), ("ours", 2.0))),
    ]
    (tmp_path / "gpu.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    table = gpu_table.table(tmp_path)
    assert "One a GPU, driver 580.1, torch 2.11.0, triton 3.6.0, commit 0123456789ab. Measured ceilings: 3000 GB/s" in table
    assert "| frozen bank at t = 10 over the eager loop: at least 3 × | 4.50 × | met |" in table
    assert "| frozen bank at t = 10 over parallel cuDNN branches in one graph: at least 1.3 × | 2.00 × | met |" in table
    assert "| not measured |" in table
