"""The script for the GPU machine: what it says without one, and that a failing section stops neither the others nor the report."""

from __future__ import annotations

import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from bench.harness.facts import ROOT
from bench.studies import needed, sanitize
from der_fast.kernels import capture
from der_fast.training.graphed import WARM_UP

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
SCRIPT = ROOT / "bench" / "gpu.sh"


def script(*arguments, python=sys.executable, **environment):
    command = ["bash", str(SCRIPT), *arguments]
    return subprocess.run(
        command, env={"PATH": "/usr/bin:/bin", "PYTHON": str(python), **environment}, capture_output=True, text=True, timeout=120
    )


def test_it_is_valid_bash():
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


def test_help_names_every_section():
    text = script("--help").stdout
    known = next(line for line in SCRIPT.read_text(encoding="utf-8").splitlines() if line.startswith("known="))
    for name in known.removeprefix("known=").strip("' ").split():
        assert f"\n  {name} " in text, name
    assert "--wheels FOLDER" in text and "set -u" not in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["nonsense"], "unknown section nonsense"), (["--nonsense"], "unknown option"), (["--out"], "--out needs a value")],
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
    done = script("--out", str(out), "--limit", "31", "--commit", "abc", "test", "agree", "schedule", "bench-bank", python=fake)
    lines = done.stdout.splitlines()
    report = lines[lines.index("== sections") + 1 :]
    assert [line.rsplit(", ", 1)[0] for line in report] == [
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
