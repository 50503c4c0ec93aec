"""`der-fast doctor`: everything is named, and what does not work says why."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import Result

from der_fast.cli import doctor
from der_fast.home import cache_folder
from der_fast.kernels import choices

Run = Callable[..., Result]


def test_json(run: Run) -> None:
    ended = run("doctor", "--json")
    assert ended.exit_code == 0
    found = json.loads(ended.stdout)
    assert set(found) == {"versions", "processor", "cuda", "backends", "measured choices", "optional parts", "files"}
    assert found["versions"]["torch"] == torch.__version__
    assert found["backends"]["reference"]["works"] is True
    assert set(found["optional parts"]) == {"tensorboard", "onnx", "onnxruntime", "AOTInductor"}
    assert all(set(part) == {"works", "reason"} for part in found["optional parts"].values())
    assert found["optional parts"]["onnxruntime"]["works"] is True
    assert f"{torch.get_num_threads()} " in found["processor"]["threads"]


def test_table(run: Run) -> None:
    shown = run("doctor").stdout
    for word in ("versions", "torch", "cores", "reference", "yes: eager PyTorch", "allocator tuning", "cifar10"):
        assert word in shown


def test_measured_choices_of_this_machine_are_shown(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "choices.json"
    entry = {"chosen": "chain", "milliseconds": {"cudnn": 0.5, "chain": 0.25}}
    path.write_text(
        json.dumps({"version": choices.VERSION, "choices": {f"{choices.machine()}|a block": entry, "elsewhere|a block": entry}})
    )
    store = choices.Choices(path)
    monkeypatch.setattr(choices, "shared", lambda: store)
    found = json.loads(run("doctor", "--json").stdout)["measured choices"]
    assert found == {"file": str(path), "a block": "chain (cudnn 0.5 ms, chain 0.25 ms)"}


def test_what_is_missing_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    found = doctor.examine()
    assert found["versions"]["triton"] == "not installed"
    assert found["optional parts"]["tensorboard"] == {"works": False, "reason": "not installed; pip install 'der_fast[tensorboard]'"}


def test_cuda_without_a_device_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert doctor._cuda()["devices"] == {"works": False, "reason": "PyTorch is built for CUDA 13.0, but finds no driver or no device"}
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in doctor._cuda()["devices"]["reason"]


def test_data_sets_are_found_where_they_lie(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    home = tmp_path
    monkeypatch.setattr(Path, "home", lambda: home)
    cache = home / ".cache" / "der_fast"
    cache.mkdir(parents=True)
    (cache / "cifar-10-python.tar.gz").write_bytes(b"")
    found = doctor._files()
    assert found["cifar10"] == {"works": True, "reason": f"official archive {cache / 'cifar-10-python.tar.gz'}"}
    assert found["cifar100"] == {"works": False, "reason": f"not in {cache_folder()}; --download, or data.root"}
    own = cache_folder()
    (own / "cifar100" / "train" / "apple").mkdir(parents=True)
    assert doctor._files()["cifar100"] == {"works": True, "reason": f"images {own / 'cifar100'}"}
