"""A learner that is saved, loaded, damaged or replaced."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from der_fast.config.schema import Config
from der_fast.data import MemorySource
from der_fast.errors import CheckpointError
from der_fast.training.learner import Learner
from der_fast.training.storage.named_files import load_manifest, save_manifest

Tiny = Callable[..., Config]
Images = Callable[..., MemorySource]


def test_loaded_learners_predict_the_same(learned: tuple[Learner, Path], synthetic: Images) -> None:
    learner, folder = learned
    images = synthetic("abcdef", 4, seed=9).images
    again = Learner.load(folder, device="cpu")
    assert again.class_names == tuple("abcdef")
    assert again.predict(images, top=6) == learner.predict(images, top=6)
    assert again.metrics() == learner.metrics()
    assert again.model.memory.fingerprint() == learner.model.memory.fingerprint()
    assert again.records == learner.records


def test_a_loaded_learner_learns_what_the_first_one_would_have(
    learned: tuple[Learner, Path], copy: Path, tiny: Tiny, synthetic: Images
) -> None:
    straight = Learner(tiny())
    for names in ("ab", "cd", "ef", "gh"):
        straight.learn(synthetic(names))
    loaded = Learner.load(copy)
    loaded.learn(synthetic("gh"))
    arenas = zip(straight.model.network.bank.extractors, loaded.model.network.bank.extractors, strict=True)
    assert all(torch.equal(one.arena.storage, other.arena.storage) for one, other in arenas)
    head = loaded.model.network.head.state_dict()
    assert all(torch.equal(value, head[name]) for name, value in straight.model.network.head.state_dict().items())
    assert straight.model.memory.fingerprint() == loaded.model.memory.fingerprint()


def test_a_saved_learner_in_another_folder_has_everything(learned: tuple[Learner, Path], synthetic: Images, tmp_path: Path) -> None:
    _, folder = learned
    loaded = Learner.load(folder)
    loaded.save(tmp_path / "other")
    for step in (1, 2, 3):
        name = f"steps/{step:02d}/mask_logits.safetensors"
        assert (tmp_path / "other" / name).read_bytes() == (folder / name).read_bytes()
    images = synthetic("abc").images
    assert Learner.load(tmp_path / "other").predict(images) == loaded.predict(images)
    assert json.loads((tmp_path / "other" / "history.json").read_text()) == json.loads((folder / "history.json").read_text())


def test_saving_again_writes_no_weights_again(copy: Path) -> None:
    before = {path: path.stat().st_ino for path in copy.rglob("*.safetensors")}
    Learner.load(copy).save(copy)
    assert {path: path.stat().st_ino for path in copy.rglob("*.safetensors")} == before


def test_saving_in_the_folder_of_another_learner(copy: Path, tiny: Tiny, synthetic: Images) -> None:
    other = Learner(tiny({"runtime.seed": 99, "masks.enabled": False}))
    other.learn(synthetic("xy"))
    other.save(copy)
    again = Learner.load(copy)
    assert again.class_names == ("x", "y")
    assert again.predict(synthetic("xy").images) == other.predict(synthetic("xy").images)
    assert len(list(copy.glob("extractors/*"))) == 1
    assert [path.parent.name for path in copy.glob("steps/*/learner.json")] == ["01"]
    assert not list(copy.glob("steps/0[23]/*.safetensors"))


def test_another_learners_state_is_nothing_to_fall_back_on(copy: Path, tiny: Tiny, synthetic: Images) -> None:
    other = Learner(tiny({"masks.enabled": False}))
    for names in ("uv", "wx", "yz"):
        other.learn(synthetic(names))
    other.save(copy)
    assert [path.parent.name for path in copy.glob("steps/*/learner.json")] == ["03"]
    next(copy.glob("steps/03/model-*")).unlink()
    with pytest.raises(CheckpointError, match="no saved step is complete"):
        Learner.load(copy)


def test_only_the_last_two_states_stay(learned: tuple[Learner, Path]) -> None:
    _, folder = learned
    assert sorted(path.parent.name for path in folder.glob("steps/*/learner.json")) == ["02", "03"]
    assert sorted(path.name.split("-")[0] for path in folder.glob("extractors/*")) == ["01", "02", "03"]
    assert [path.name for path in (folder / "steps" / "01").iterdir()] == ["mask_logits.safetensors"]
    assert not list(folder.rglob("*.tmp"))


def test_a_damaged_state_costs_one_step(copy: Path, synthetic: Images, watcher: Any) -> None:
    model = next((copy / "steps" / "03").glob("model-*"))
    model.write_bytes(model.read_bytes()[:-1])
    loaded = Learner.load(copy, observer=watcher)
    assert loaded.class_names == tuple("abcd")
    assert any("the state after step 3 cannot be used" in text and model.name in text for text in watcher.messages)
    loaded.learn(synthetic("xy"))
    loaded.save(copy)
    assert Learner.load(copy).class_names == tuple("abcdxy")


@pytest.mark.parametrize("name", ["extractors/01-*", "steps/03/memory-*", "steps/03/learner.json"])
def test_every_file_is_checked(name: str, copy: Path, watcher: Any) -> None:
    path = next(copy.glob(name))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    if name.startswith("extractors"):
        # Both states need the first extractor.
        with pytest.raises(CheckpointError, match=str(path)):
            Learner.load(copy, observer=watcher)
    else:
        assert Learner.load(copy, observer=watcher).class_names == tuple("abcd")
        assert str(path) in watcher.messages[0]


def test_a_folder_without_a_learner(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(CheckpointError, match="holds no saved learner"):
            Learner.load(folder)
    assert list(tmp_path.iterdir()) == []


def test_a_newer_format_is_not_guessed_at(copy: Path) -> None:
    for path in copy.glob("steps/*/learner.json"):
        save_manifest(path, {**load_manifest(path), "format": 99})
    with pytest.raises(CheckpointError, match="has format 99; this version reads formats 2 and 3"):
        Learner.load(copy)
