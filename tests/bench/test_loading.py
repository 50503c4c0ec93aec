"""The measurement of reading photos: that every variant runs and what is written; no figure of it counts."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from bench.harness.facts import ROOT
from bench.reports.cpu_table import table
from der_fast.data.read.dali import is_installed


def loading(*arguments):
    # Of its own, because it takes cores away from the process.
    command = [sys.executable, "-m", "bench", "loading", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=ROOT, check=False)


@pytest.fixture
def photos(tmp_path):
    noise = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for number in range(4):
        pixels = noise.integers(0, 256, (40 + number, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.jpg")
    return tmp_path / "photos"


def test_every_variant_has_a_row_and_the_readme_can_show_them(photos, tmp_path):
    path = tmp_path / "loading.json"
    done = loading("--photos", photos, "--repeat", 9, "--batch", 2, "--threads", 1, "--rounds", 1, "--json", path)
    assert done.returncode == 0, done.stderr
    found = json.loads(path.read_text(encoding="utf-8"))
    wanted = ["dataloader_pillow", *(["dali_bare"] if is_installed() else []), "ours", "resident_cache"]
    assert [row["variant"] for row in found["rows"]] == wanted
    assert all(0 < row["low"] <= row["images_per_s"] <= row["high"] for row in found["rows"])
    (line,) = [line for line in table(tmp_path).splitlines() if "reading photos" in line]
    assert f"resident cache {found['rows'][-1]['images_per_s']:.0f} images/s" in line


def test_too_few_images_are_refused(photos):
    done = loading("--photos", photos, "--repeat", 1, "--batch", 8)
    assert done.returncode != 0 and "4 images are too few for batches of 8" in done.stderr


def test_no_photos_are_refused(tmp_path):
    done = loading("--photos", tmp_path)
    assert done.returncode != 0 and f"no JPEGs in {tmp_path}" in done.stderr
