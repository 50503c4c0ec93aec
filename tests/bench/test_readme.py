"""The README's tables are what the results files say."""

from __future__ import annotations

import json
import re

import pytest

from bench import __main__ as command
from bench.reports import cpu_table, gpu_table, headline, picture, readme


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


def test_a_stale_page_is_told_and_rewritten(tmp_path, monkeypatch, capsys):
    for page in readme.PAGES:
        (tmp_path / page).parent.mkdir(exist_ok=True)
        text = (readme.PLACE / page).read_text(encoding="utf-8")
        (tmp_path / page).write_text(text.replace("the same command", "by hand"), encoding="utf-8")
    monkeypatch.setattr(readme, "PLACE", tmp_path)
    assert command.main(["readme", "--check"]) == 1
    assert capsys.readouterr().err.count("run `python -m bench readme`") == 2
    assert command.main(["readme"]) == 0 and command.main(["readme", "--check"]) == 0
    assert {path.name for path in (tmp_path / picture.FOLDER).iterdir()} == {"steps-light.svg", "steps-dark.svg"}


def test_links_lead_somewhere():
    for page in readme.PAGES:
        text = (readme.PLACE / page).read_text(encoding="utf-8")
        for target in re.findall(r'(?:\]\(|src="|srcset=")([^)"#:]+)', text):
            assert ((readme.PLACE / page).parent / target).exists(), f"{page} links to {target}"


def test_the_picture_is_the_same_for_the_same_rows():
    rows = [{"variant": "pruned", "top1": [90.0, top], "params": [1e6, 2e6]} for top in (70.0, 80.0)]
    first, again = (picture.svg(rows, picture.THEMES["light"]) for _ in range(2))
    assert first == again and "<svg" in first
    assert picture.curves(rows, "top1") == {"pruned": [[90.0, 90.0], [70.0, 80.0]]}
    assert picture.svg(rows, picture.THEMES["dark"]) != first


def test_the_demo_row_has_the_spread_over_seeds_and_threads(tmp_path):
    common = {"last_top1": 95.0, "final_params": 24, "final_params_unpruned": 100, "seconds": 60.0}
    rows = [{"seed": seed, "threads": threads, "average_top1": 96.0 + threads, **common} for seed in (1, 2) for threads in (1, 2)]
    (tmp_path / "demo.json").write_text(json.dumps(rows))
    row = headline.table(tmp_path).splitlines()[-1]
    assert "97.5 ± 0.6 % on average over the steps, 95.0 ± 0.0 % after the last; 24.0 % of the unpruned parameters; 60 s" in row
    assert "--seeds 1 2 --thread-counts 1 2`: 2 seeds × 2 thread counts" in row


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
