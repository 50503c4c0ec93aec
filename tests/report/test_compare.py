"""Several runs in one picture."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from der_fast.errors import CheckpointError, ConfigError
from der_fast.report import compare_runs

CLASSES = [["a", "b"], ["c", "d"]]


def test_page_lists_every_run(tmp_path, make_run, read_page):
    make_run(tmp_path / "one", CLASSES, name="pruned", average_top1=71.25)
    make_run(tmp_path / "two", CLASSES[:1], name="pruned", seed=1, bwt=None)
    make_run(tmp_path / "three", CLASSES, name="<b>unpruned</b>", seed=2)
    page = read_page(compare_runs([tmp_path / "one", tmp_path / "two", tmp_path / "three"], tmp_path / "out" / "compare.html"))
    rows = page.table("run", "data set", "protocol")
    # Where two runs share a name, their folders tell them apart.
    assert [row[0] for row in rows] == ["pruned (one)", "pruned (two)", "<b>unpruned</b>"]
    assert rows[0][4] == "71.25"
    assert [row[6] for row in rows] == ["−1.25", "–", "−1.25"]
    assert all(link.startswith(("data:", "#")) for link in page.links)
    assert "3 runs compared" in page.text


def test_png_alone(tmp_path, make_run):
    make_run(tmp_path / "one", CLASSES)
    out = compare_runs([tmp_path / "one"], tmp_path / "compare.png")
    image = Image.open(io.BytesIO(out.read_bytes())).convert("RGB")
    assert image.width > 1000 and len(image.getcolors(1 << 20) or []) > 20


@pytest.mark.parametrize(
    ("runs", "out", "complaint"), [([], "x.html", "no runs to compare"), (["one"], "x.pdf", r"x\.pdf should end in \.html")]
)
def test_nothing_to_do(tmp_path, runs, out, complaint):
    with pytest.raises(ConfigError, match=complaint):
        compare_runs([tmp_path / run for run in runs], tmp_path / out)


def test_a_run_that_cannot_be_read_is_named(tmp_path, make_run):
    make_run(tmp_path / "one", CLASSES)
    with pytest.raises(CheckpointError, match="two"):
        compare_runs([tmp_path / "one", tmp_path / "two"], tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()
