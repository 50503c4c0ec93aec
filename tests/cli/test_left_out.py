"""`cd photos; der-fast train .`: what is left out is said wherever a person looks, and the run in there is no class."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from der_fast.cli.main import app

TINY = "--width 4 --epochs 1 --memory 4 --set classifier.epochs=1 --set runtime.threads=1 --set masks.enabled=false".split()  # noqa: SIM905


def command(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two classes with images below, an image without suffix, two kinds that cannot be read, and this folder as the current one."""
    folder = tmp_path / "photos"
    for name, value in (("cat", 20), ("dog", 220)):
        (folder / name / "2019").mkdir(parents=True)
        for index in range(4):
            Image.new("RGB", (8, 8), (value, index, 0)).save(folder / name / f"{index}.png")
        Image.new("RGB", (8, 8), (value, 9, 0)).save(folder / name / "2019" / "plain", format="PNG")
        (folder / name / "a.jxl").write_bytes(b"\xff\x0a" + bytes(30))
    (folder / "cat" / "film.mov").write_bytes(b"\0\0\0\x14ftypqt  ")
    (folder / "cat" / "labels.json").write_text("{}")
    monkeypatch.chdir(folder)
    return folder


def test_a_run_inside_the_data(photos: Path) -> None:
    ended = command("train", ".", "--protocol", "B0-2", *TINY)
    assert ended.exit_code == 0, ended.output
    line = "left out: 3 files that cannot be read as images: 2 JPEG XL (cat 1, dog 1); 1 .mov (cat 1)"
    assert line in ended.stderr and "labels.json" not in ended.output
    (run,) = (photos / "runs").iterdir()
    before = json.loads((run / "metrics.json").read_text())
    assert line in before["notes"] and sorted(name for names in before["steps"] for name in names) == ["cat", "dog"]
    assert "2 images of 2 class(es) are in folders below the class folder and count as its own" in before["notes"]
    assert line in (run / "report.html").read_text(encoding="utf-8")

    again = command("train", "--out", run, "--resume")
    assert again.exit_code == 0, again.output
    assert json.loads((run / "metrics.json").read_text())["top1"] == before["top1"]
    second = command("train", ".", "--protocol", "B0-2", *TINY, "--quiet")
    assert second.exit_code == 0, second.output
    other = json.loads((photos / "runs" / f"{run.name}-2" / "config.json").read_text())
    assert other["train"] == json.loads((run / "config.json").read_text())["train"]

    named = command("predict", run, ".", "--json")
    assert named.exit_code == 0, named.output
    assert sorted(row["path"] for row in json.loads(named.stdout)) == sorted(
        [f"{name}/{file}" for name in ("cat", "dog") for file in ("0.png", "1.png", "2.png", "3.png", "2019/plain")]
    )
    assert "left out: 3 files that cannot be read as images: 2 JPEG XL (cat 1, dog 1); 1 .mov (cat 1)" in named.stderr
