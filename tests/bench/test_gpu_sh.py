"""The script for the GPU machine: what it says without one, and that a failing section stops neither the others nor the report."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tarfile
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from bench import commands
from bench.__main__ import STUDIES
from bench.harness.facts import ROOT
from bench.harness.registry import Setting
from bench.studies import needed, sanitize
from der_fast.kernels import capture
from der_fast.training.graphed import WARM_UP

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
SCRIPT = ROOT / "bench" / "gpu.sh"
SECTIONS = ROOT / "bench" / "gpu_sections.sh"


def script(*arguments, python=sys.executable, **environment):
    command = ["bash", str(SCRIPT), *arguments]
    return subprocess.run(
        command, env={"PATH": "/usr/bin:/bin", "PYTHON": str(python), **environment}, capture_output=True, text=True, timeout=120
    )


def test_it_is_valid_bash():
    for path in (SCRIPT, SECTIONS):
        subprocess.run(["bash", "-n", str(path)], check=True)


def test_help_names_every_section():
    text = script("--help").stdout
    known = next(line for line in SCRIPT.read_text(encoding="utf-8").splitlines() if line.startswith("known="))
    for name in known.removeprefix("known=").strip("' ").split():
        assert f"\n  {name} " in text, name
    assert "--wheels FOLDER" in text and "set -u" not in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nonsense"], "unknown section nonsense"),
        (["--nonsense"], "unknown option"),
        (["--out"], "--out needs a value"),
        (["--wheels", "nowhere"], "there is no folder nowhere"),
    ],
)
def test_mistakes_are_named(arguments, said):
    done = script(*arguments)
    assert done.returncode == 2 and said in done.stderr


def test_every_section_is_reported_whatever_fails(tmp_path):
    # Stands in for Python: says what it was asked for and fails where told.
    fake = tmp_path / "python"
    fake.write_text('#!/bin/bash\necho "ran $*"\n[[ $* == *agreement* ]] && exit 7\n[[ $* == *schedule* ]] && sleep 30\nexit 0\n')
    fake.chmod(0o755)
    out = tmp_path / "out"
    done = script("--out", str(out), "--limit", "28", "--commit", "abc", "test", "agree", "schedule", "bench-bank", python=fake)
    lines = done.stdout.splitlines()
    report = lines[lines.index("== sections") + 1 :]
    assert [line.rsplit(", ", 1)[0] for line in report[:-1]] == [
        "ready: exit status 0",
        "test: exit status 0",
        "agree: exit status 7",
        "schedule: exit status 124",
        "bench-bank: exit status 124",
    ]
    assert done.returncode == 1
    assert "no time is left" in done.stdout and "ran -m bench schedule --device cuda" in done.stdout and "--commit abc" in done.stdout
    assert "agree: exit status 7" in (out / "log.txt").read_text(encoding="utf-8")


def test_a_build_comes_first_where_there_is_none(tmp_path):
    fake = tmp_path / "python"
    fake.write_text('#!/bin/bash\n[[ $1 == -c ]] && exit 1\necho "ran $*, CUDA $DER_FAST_CUDA"\n')
    fake.chmod(0o755)
    done = script("--out", str(tmp_path / "out"), "bench-step", python=fake)
    assert "ran -m pip install --no-deps --no-build-isolation -e ., CUDA ON" in done.stdout
    assert done.stdout.index("== build") < done.stdout.index("== bench-step") and done.returncode == 0
    assert "--groups step" in done.stdout and "step.*batch=128*" in done.stdout


@pytest.fixture
def fake(tmp_path):
    """Stands in for Python: says what it was asked for."""
    path = tmp_path / "python"
    path.write_text('#!/bin/bash\necho "ran $*"\n')
    path.chmod(0o755)
    return path


def test_first_runs_its_sections_in_order_each_within_a_limit_of_its_own(tmp_path, fake):
    done = script("--out", str(tmp_path / "out"), "--rehearse", "first", python=fake)
    lines = done.stdout.splitlines()
    ran = [line.split(":")[0] for line in lines[lines.index("== sections") + 1 : -1]]
    families = [name for name in ran if name.startswith("checks, ")]
    assert len(families) == 11 and {"checks, masked_bn", "checks, replay", "checks, agreement"} <= set(families)
    timed = ["time-step", "time-bank", "time-masked-bn", "time-conv", "time-augment", "time-epoch", "time-compile"]
    assert ran == ["facts", "ready", *families, *timed] and done.returncode == 0
    text = SCRIPT.read_text(encoding="utf-8")
    words = re.search("^first='(.*)'$", text, re.MULTILINE)[1].split()
    # Building is not expected: then the rest fits, and tables take the last seconds.
    assert sum(int(word.partition("=")[2]) for word in words if not word.startswith("ready=")) <= 420 and "limit:-415" in text


def test_a_section_stops_at_its_own_limit_and_the_next_one_runs(tmp_path, fake):
    fake.write_text('#!/bin/bash\n[[ $* == *agreement* ]] && sleep 60\necho "ran $*"\n')
    done = script("--out", str(tmp_path / "out"), "--rehearse", "agree=5", "bench-bank", python=fake)
    assert re.search(r"agree: exit status 124, [56] s\nbench-bank: exit status 0", done.stdout) and done.returncode == 1


def test_a_signal_ends_it_with_its_tables(tmp_path, fake):
    fake.write_text('#!/bin/bash\n[[ $* == *agreement* ]] && { echo begun; sleep 60; }\necho "ran $*"\n')
    command = ["bash", str(SCRIPT), "--out", str(tmp_path / "out"), "--rehearse", "bench-bank", "agree"]
    with subprocess.Popen(command, env={"PATH": "/usr/bin:/bin", "PYTHON": str(fake)}, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line == "begun\n":
                process.terminate()
                break
        rest = process.stdout.read()
        assert process.wait(30) == 1
    assert "stopped\n" in rest and "bench-bank: exit status 0" in rest


@pytest.mark.parametrize("name", re.findall(r"^        (time-[\w-]+)\)", SECTIONS.read_text(encoding="utf-8"), re.MULTILINE))
def test_what_is_timed_exists_on_a_gpu(name):
    text = f'source {SECTIONS}; small="" fewer=--quick big=512; timing {name}; printf "%s\n" "${{case[@]}}"'
    words = subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=True).stdout.split("\n")
    args = commands.parser([]).parse_args(["run", *filter(None, words)])
    setting = Setting(torch.device("cuda"), "quick" if args.quick else "full", "fused")
    cases = commands.chosen_cases(args, setting)
    commands.check_variants([*(args.variants or ()), *(args.without if name != "time-conv" else ())], cases)
    wanted = {"time-step": 2, "time-bank": 1, "time-masked-bn": 9, "time-conv": 12, "time-augment": 1, "time-epoch": 2, "time-compile": 1}
    assert len(cases) == wanted[name]


def test_what_is_checked_exists():
    lines = re.findall(r'^    "(\w+) (tests/.*)"$', SECTIONS.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(lines) == 11
    for name, rest in lines:
        files = rest.split(" -k ")[0].split()
        assert all("pytest.mark.gpu" in (ROOT / file).read_text(encoding="utf-8") for file in files), name
    replay = (ROOT / "tests/training/test_engine_gpu.py").read_text(encoding="utf-8")
    assert "def test_replays_do_what_launches_do(" in replay and '"resnet18"' in replay and '"bf16"' in replay


def test_data_may_come_in_two_calls(tmp_path, fake):
    options = ["--out", str(tmp_path / "out"), "--store", str(tmp_path / "store"), "--rehearse"]
    for number in (1, 2):
        part = tmp_path / f"part{number}" / f"cifar100_strips_{number}.tar"
        part.parent.mkdir()
        part.write_text(str(number))
    assert script(*options, "--data", str(tmp_path / "part1"), "ready", python=fake).returncode == 0
    done = script(*options, "second", str(tmp_path / "part2"), python=fake)
    assert f"ran -m bench paper {tmp_path / 'store'} --seconds " in done.stdout and done.returncode == 0
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == ["cifar100_strips_1.tar", "cifar100_strips_2.tar"]
    assert script("second", str(tmp_path / "nowhere"), python=fake).returncode == 2


def test_a_wheel_of_other_sources_is_not_used(tmp_path, fake):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "sources").write_text("0123456789abcdef\n")
    for name in ("der_fast-0.1.0-cp312-cp312-linux_x86_64.whl", "small-1-py3-none-any.whl"):
        (wheels / name).write_text(name)
    options = ["--out", str(tmp_path / "out"), "--wheels", str(wheels), "--rehearse", "ready"]
    done = script(*options, python=fake, TMPDIR=str(tmp_path))
    assert "holds a wheel of other sources, which is not used" in done.stdout
    fake.write_text(f'#!/bin/bash\necho "$*" >> {tmp_path / "asked"}\n')
    script(*options, python=fake, TMPDIR=str(tmp_path))
    asked = (tmp_path / "asked").read_text(encoding="utf-8")
    assert "small-1-py3-none-any.whl" in asked and "der_fast-0.1.0" not in asked


def test_a_rehearsal_goes_from_data_to_table(tmp_path):
    """With the real Python, on the CPU: CIFAR-100's form, ten classes of one colour each."""
    with tarfile.open(tmp_path / "cifar100_strips_1.tar", "w") as tar:
        for number in range(10):
            for part, count in (("train", 500), ("test", 100)):
                path = tmp_path / "strip.webp"
                Image.new("RGB", (32, 32 * count), (25 * number, 128, 255 - 25 * number)).save(path, lossless=True)
                tar.add(path, f"cifar100/{part}/class{number}.webp")
    options = ["--out", str(tmp_path / "out"), "--store", str(tmp_path / "store"), "--commit", "abc", "--rehearse", "--limit", "100"]
    done = script(*options, "--data", str(tmp_path / "cifar100_strips_1.tar"), "time-augment", "paper", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "| augment.batch: batch 3 | ours |" in done.stdout and "No goals are judged" in done.stdout
    assert "B0-5 on 10 classes, a part of CIFAR-100's, width 4, 20 images per class" in done.stdout
    rows = [json.loads(line) for line in (tmp_path / "out" / "paper.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["classes"] for row in rows] == [2, 4, 6, 8, 10] and all(1 <= row["epochs"] <= 2 for row in rows)
    assert "nothing of the paper stands beside it" in (tmp_path / "out" / "log.txt").read_text(encoding="utf-8")


def test_the_commands_of_the_page_exist():
    text = (ROOT / "bench" / "GPU_TODO.md").read_text(encoding="utf-8")
    known = re.search("^known='(.*)'$", SCRIPT.read_text(encoding="utf-8"), re.MULTILINE)[1].split()
    lines = [line.partition("#")[0] for line in text.splitlines()]
    asked = [line.split("bench/gpu.sh", 1)[1].split() for line in lines if line.lstrip().startswith(("bash bench/gpu.sh", "PYTHON="))]
    assert [words[-1] for words in asked[:2]] == ["wheel", "first"] and asked[2][-2:] == ["second", "$DATA"]
    for words in asked:
        sections = [word for number, word in enumerate(words) if word[0] not in "-$" and words[number - 1] not in ("--cifar10", "--data")]
        assert sections and set(sections) <= set(known), words
    called = re.findall(r"python -m bench ([\w-]+)", text)
    assert called and set(called) <= {*STUDIES, "readme", "compare", "table", "plot"}
    # The table has the limits of the script, which come to 20 seconds for what it has in one line with the wheel.
    limits = dict(re.findall(r"([\w-]+)=(\d+)", re.search("^first='(.*)'$", SCRIPT.read_text(encoding="utf-8"), re.MULTILINE)[1]))
    for row, seconds in re.findall(r"^\| (`[^|]*`) \| (\d+) s", text, re.MULTILINE):
        names = [name for name in re.findall(r"`([\w-]+)`", row) if name != "ready"]
        assert sum(int(limits[name]) for name in names) == int(seconds), row


def test_missing_packages_are_named_with_a_way_to_carry_them(monkeypatch, capsys):
    monkeypatch.setattr(needed.metadata, "version", lambda name: (_ for _ in ()).throw(needed.metadata.PackageNotFoundError(name)))
    assert needed.main([]) == 1
    said = capsys.readouterr().out
    assert "safetensors>=0.4.3" in said and "pytest-benchmark" in said and "--wheels FOLDER" in said
    assert "mypy" not in said


def test_versions_are_compared_as_numbers(monkeypatch):
    monkeypatch.setattr(needed.metadata, "version", lambda name: "2.9.1+cu130")
    assert needed.state("torch>=2.11,<2.14") == ("torch>=2.11,<2.14", "2.9.1+cu130, too old", True)
    assert needed.state("torch>=2.9") == ("torch>=2.9", "2.9.1+cu130", False)


def test_the_program_for_the_sanitizer_trains_past_the_first_capture_and_captures_nothing(monkeypatch, capsys):
    for name, value in (("is_available", True), ("current_device", 0), ("synchronize", None)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(sanitize, "cases_of", lambda setting, groups: [])
    monkeypatch.setattr(sanitize, "seeded", lambda device, seed: None)
    monkeypatch.setattr(sanitize, "Task", lambda networks, t, batch, batches: SimpleNamespace(batches=batches, inputs=lambda draw: {}))

    def ours(task, *_, **__):
        assert task.batches > WARM_UP + 1
        with pytest.raises(RuntimeError, match="compute-sanitizer watches"):
            capture.record(lambda: pytest.fail("captured"), None, SimpleNamespace(device="cuda"))
        return lambda: {"loss": 1.5}

    monkeypatch.setattr(sanitize, "ours", ours)
    assert sanitize.main([]) == 0 and "6 fused training steps, loss 1.5000" in capsys.readouterr().out
