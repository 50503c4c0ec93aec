"""The figures of an index and of herding over a tree, on a small one. That they are found; nothing about speed."""

from __future__ import annotations

import json
import sys

import pytest

from bench.studies import index


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads peak memory from /proc")
def test_every_row_is_there(tmp_path, monkeypatch, capsys):
    sizes = ["--images", "61", "--classes", "6", "--memory", "12", "--features", "5"]
    for _ in range(2):
        # The second time the tree is there already.
        monkeypatch.setattr(sys, "argv", ["index.py", *sizes, "--tree", str(tmp_path / "tree"), "--json", str(tmp_path / "rows.json")])
        index.main()
        found = json.loads((tmp_path / "rows.json").read_text())
        assert (found["images"], found["classes"]) == (61, 6)
        rows = {row["what"]: row for row in found["rows"]}
        assert set(rows) == {"list the tree", "keep the index", "load the index", "open the data set", "list of a step", "herding"}
        assert all(row["seconds"] > 0 for row in rows.values()) and rows["list of a step"]["images"] == 10 + 12
        assert "MiB of features at a time" in rows["herding"]["says"] and rows["herding"]["all_features_mib"] == 61 * 5 * 4 / 2**20
    assert "limit 2.0 s" in capsys.readouterr().out
