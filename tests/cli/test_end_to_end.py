"""One tiny real run through every command: train, resume, eval, predict, learn, report."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from sklearn.datasets import load_digits
from typer.testing import CliRunner, Result

from der_fast.cli.main import app
from der_fast.report import style

TINY = ["--train-per-class", "24", "--test-per-class", "8", "--width", "4", "--epochs", "2,1", "--memory", "40"]
TINY += ["--set", "classifier.epochs=1", "--set", "runtime.threads=1", "--set", "masks.bn_images=32"]
Run = Callable[..., Result]


def command(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("end_to_end") / "run"
    ended = command("train", "digits", "--protocol", "B0-2", *TINY, "--out", out)
    assert ended.exit_code == 0, ended.output
    return out


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of digits as PNG files, a text file and two broken images."""
    folder = tmp_path_factory.mktemp("pictures")
    for index, image in enumerate(load_digits().images[:6]):
        Image.fromarray((image * 15).astype("uint8")).save(folder / f"{index}.png")
    (folder / "readme.txt").write_text("no image")
    (folder / "empty.png").write_bytes(b"")
    (folder / "sub").mkdir()
    (folder / "sub" / "broken.jpg").write_bytes(b"\xff\xd8\xff broken")
    return folder


@pytest.fixture(scope="module")
def new_classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of plain colours, as a folder of class folders."""
    folder = tmp_path_factory.mktemp("new")
    for name, colour in (("green", (20, 200, 30)), ("red", (200, 30, 20))):
        (folder / name).mkdir()
        for index in range(12):
            Image.new("RGB", (10, 9), tuple(part + index for part in colour)).save(folder / name / f"{index:02}.png")
    return folder


def test_the_run_holds_what_was_asked_for(trained: Path) -> None:
    metrics = json.loads((trained / "metrics.json").read_text())
    assert metrics["protocol"] == "B0-2"
    assert [len(names) for names in metrics["steps"]] == [5, 5]
    assert sorted(metrics["class_names"]) == list("0123456789")
    assert metrics["config"]["model"]["width"] == 4
    assert metrics["config"]["first"]["epochs"] == 2
    assert metrics["config"]["later"]["epochs"] == 1
    assert metrics["memory_per_class"][-1] == 4
    assert len(metrics["confusion"]) == 10
    assert sum(map(sum, metrics["confusion"])) == 80
    assert (trained / "report.html").stat().st_size > 10_000


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than these runs; `trained` and `test_report_…` draw real ones."""
    monkeypatch.setattr("der_fast.runs.write_report", lambda run: run)


@pytest.mark.usefixtures("no_report")
def test_a_finished_run_is_resumed_without_change(copy: Path) -> None:
    before = json.loads((copy / "metrics.json").read_text())
    ended = command("train", "--out", copy, "--resume")
    assert ended.exit_code == 0, ended.output
    assert json.loads((copy / "metrics.json").read_text())["top1"] == before["top1"]


def test_resume_with_another_configuration(copy: Path) -> None:
    ended = command("train", "--out", copy, "--resume", "--lr", "0.01")
    assert ended.exit_code == 2
    assert "first.lr was" in ended.stderr


def test_eval_agrees_with_the_run(trained: Path) -> None:
    metrics = json.loads((trained / "metrics.json").read_text())
    ended = command("eval", trained, "--json")
    assert ended.exit_code == 0, ended.output
    found = json.loads(ended.stdout)
    assert found["top1"] == pytest.approx(metrics["last_top1"])
    assert found["confusion"] == metrics["confusion"]
    shown = command("eval", trained)
    assert f"top-1 {metrics['last_top1']:.2f} %" in shown.stdout
    assert "mistaken for" in shown.stdout


def test_eval_on_classes_that_were_never_learned(trained: Path, new_classes: Path) -> None:
    ended = command("eval", trained, new_classes)
    assert ended.exit_code == 2
    assert "never learned" in ended.stderr


def test_predict_as_json(trained: Path, pictures: Path) -> None:
    ended = command("predict", trained, pictures, "--json", "--top", "4")
    assert ended.exit_code == 0, ended.output
    rows = json.loads(ended.stdout)
    assert [Path(row["path"]).name for row in rows] == [f"{index}.png" for index in range(6)]
    for row in rows:
        assert row["class_name"] in "0123456789"
        assert row["top"][0] == {"class_name": row["class_name"], "probability": row["probability"]}
        probabilities = [entry["probability"] for entry in row["top"]]
        assert len(probabilities) == 4
        assert probabilities == sorted(probabilities, reverse=True)
        assert 0 < sum(probabilities) <= 1.0001
    assert "empty.png" in ended.stderr
    assert "broken.jpg" in ended.stderr
    assert "readme.txt" not in ended.stderr


def test_predict_as_table_in_parts(trained: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from der_fast.data.decode import parts

    whole = json.loads(command("predict", trained, pictures, "--json").stdout)
    # Three digits of 8 × 8 pixels.
    monkeypatch.setattr(parts, "PART_BYTES", 3 * 8 * 8 * 3)
    cut = json.loads(command("predict", trained, pictures, "--json").stdout)
    assert [row["path"] for row in cut] == [row["path"] for row in whole]
    assert [row["class_name"] for row in cut] == [row["class_name"] for row in whole]
    shown = command("predict", trained, pictures / "0.png", pictures / "1.png", "--top", "2")
    assert shown.exit_code == 0
    assert f"{100 * whole[1]['probability']:.1f} %" in shown.stdout


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["empty.png", "sub/broken.jpg"], "none of the 2 file(s) could be read"),
        (["0.png", "missing.png"], "there is no file or folder"),
        (["nothing"], "no image files in"),
    ],
)
def test_predict_ends_with_2_where_there_is_nothing_to_see(trained: Path, pictures: Path, names: list[str], words: str) -> None:
    (pictures / "nothing").mkdir(exist_ok=True)
    ended = command("predict", trained, *[pictures / name for name in names])
    assert ended.exit_code == 2
    assert words in ended.stderr


def test_predict_without_a_run(tmp_path: Path, pictures: Path) -> None:
    ended = command("predict", tmp_path, pictures)
    assert ended.exit_code == 2
    assert str(tmp_path) in ended.stderr


@pytest.mark.usefixtures("no_report")
def test_learn_adds_classes_and_predicts_them(copy: Path, new_classes: Path) -> None:
    ended = command("learn", copy, new_classes, "--epochs", "2", "--quiet")
    assert ended.exit_code == 0, ended.output
    metrics = json.loads((copy / "metrics.json").read_text())
    assert metrics["class_names"][-2:] == ["green", "red"]
    assert len(metrics["top1"]) == 3
    rows = json.loads(command("predict", copy, new_classes / "red", "--json").stdout)
    assert len(rows) == 12
    assert all(row["class_name"] in metrics["class_names"] for row in rows)
    again = command("learn", copy, new_classes)
    assert again.exit_code == 2
    assert "already known" in again.stderr


def test_report_is_written_anew_and_compared(copy: Path, trained: Path, tmp_path: Path) -> None:
    (copy / "report.html").unlink()
    ended = command("report", copy)
    assert (ended.exit_code, (copy / "report.html").is_file()) == (0, True)
    metrics = json.loads((copy / "metrics.json").read_text())
    for heading in ("parameters added", "latency added ms", "file size", "training time saved"):
        assert set(heading.split()) <= set(ended.stdout.split())
    rows = [line for line in ended.stdout.splitlines() if line.startswith("│")]
    assert len(rows) == len(metrics["params"])
    assert style.count(metrics["params"][-1]) in rows[-1] and style.size(metrics["bytes"][-1]) in rows[-1]
    together = tmp_path / "both.html"
    assert command("report", copy, trained, "--compare", together).exit_code == 0
    assert "<html" in together.read_text()


def test_report_of_a_run_in_the_middle_of_a_step(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("der_fast.report.page.write_report", lambda run: Path(run) / "report.html")
    rows = json.loads((copy / "history.json").read_text())["epochs"]
    rows.append({**rows[0], "step": 3})
    (copy / "history.json").write_text(json.dumps({"epochs": rows}))
    ended = command("report", copy)
    assert ended.exit_code == 0, ended.output
    assert "note: Step 3 is not finished: its last finished epoch is 1 of 2 of the representation stage" in ended.stderr


def test_a_process_ends_with_the_right_code(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "der_fast.cli.main", "train", "digits", "--protocol", "B0-3"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr
    assert "B0-3" in ended.stderr


@pytest.mark.skipif(os.name != "posix", reason="sends an interrupt signal")
def test_interrupted(tmp_path: Path) -> None:
    out = tmp_path / "run"
    long = ["train", "digits", "--protocol", "B0-2", *TINY, "--epochs", "500", "--out", str(out)]
    # A test run in the background of a shell has interrupts switched off, and children inherit that.
    start = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from der_fast.cli.main import main; main()"
    process = subprocess.Popen([sys.executable, "-c", start, *long], stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not list(out.glob("checkpoints/*")) and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert f"continue with: der-fast train --out {out} --resume" in errors
    assert list(out.glob("checkpoints/*"))


def test_eval_names_classes_without_images_and_leaves_out_what_was_trained_on(copy: Path, new_classes: Path) -> None:
    assert command("learn", copy, new_classes, "--epochs", "1").exit_code == 0
    metrics = json.loads((copy / "metrics.json").read_text())
    own = json.loads(command("eval", copy, "--json").stdout)
    assert (own["confusion"], own["without_images"], own["left_out"]) == (metrics["confusion"], [], 0)
    ended = command("eval", copy, new_classes)
    assert "no test images of 10 of 12 known classes: " in ended.stdout
    assert "are left out because the run was trained on them" in ended.stderr
    found = json.loads(command("eval", copy, new_classes, "--json").stdout)
    assert sorted(found["without_images"]) == list("0123456789")
    assert found["left_out"] > 0 and len(found["notes"]) == 1
    assert found["images"] + found["left_out"] == len(list(new_classes.rglob("*.png")))
