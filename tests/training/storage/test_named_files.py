from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from der_fast.errors import CheckpointError
from der_fast.training.storage.named_files import (
    load_manifest,
    load_record,
    load_tensors,
    remove_record,
    save_manifest,
    save_named_tensors,
    save_record,
    save_tensors,
)

TENSORS = {"weight": torch.arange(12.0).reshape(3, 4).T, "empty": torch.zeros(0, 3), "labels": torch.tensor([1, 2])}
in_one_folder = settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_tensors_come_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.safetensors"
    checksum = save_tensors(path, TENSORS)
    assert equal(load_tensors(path, checksum), TENSORS)


def test_equal_tensors_make_equal_files_and_are_not_written_again(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    first = save_tensors(path, TENSORS)
    before = path.stat().st_ino
    assert save_tensors(path, dict(reversed(TENSORS.items()))) == first
    assert path.stat().st_ino == before
    assert save_tensors(path, {**TENSORS, "labels": torch.tensor([1, 3])}) != first
    assert path.stat().st_ino != before


def test_a_damaged_file_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    checksum = save_tensors(path, TENSORS)
    path.write_bytes(path.read_bytes()[:-1])
    save_tensors(path, TENSORS)
    assert equal(load_tensors(path, checksum), TENSORS)


def test_other_tensors_get_another_name(tmp_path: Path) -> None:
    first = save_named_tensors(tmp_path, "model", TENSORS)
    second = save_named_tensors(tmp_path, "model", {"weight": torch.zeros(1)})
    assert first["file"] != second["file"]
    assert equal(load_tensors(tmp_path / first["file"], first["sha256"]), TENSORS)
    assert save_named_tensors(tmp_path, "model", TENSORS) == first
    assert len(list(tmp_path.iterdir())) == 2


def test_what_was_loaded_does_not_change_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    loaded = load_tensors(path, save_tensors(path, TENSORS))
    with path.open("rb+") as handle:
        handle.write(b"\xff" * path.stat().st_size)
    assert equal(loaded, TENSORS)


@in_one_folder
@given(position=st.floats(0, 1), bit=st.integers(0, 7))
def test_a_flipped_bit_is_noticed(position: float, bit: int, tmp_path: Path) -> None:
    save_record(tmp_path / "r", TENSORS, {"epoch": 3, "name": "ä"})
    for path in (tmp_path / "r.safetensors", tmp_path / "r.json"):
        data = bytearray(path.read_bytes())
        where = min(int(position * len(data)), len(data) - 1)
        data[where] ^= 1 << bit
        whole = path.read_bytes()
        path.write_bytes(data)
        try:
            tensors, facts = load_record(tmp_path / "r")
        except CheckpointError as error:
            assert str(path) in str(error)
        else:
            # White space between two entries carries no meaning.
            assert path.suffix == ".json"
            assert facts == {"epoch": 3, "name": "ä"}
            assert equal(tensors, TENSORS)
        path.write_bytes(whole)


@in_one_folder
@given(share=st.floats(0, 0.999))
def test_a_file_that_was_cut_off_is_noticed(share: float, tmp_path: Path) -> None:
    save_record(tmp_path / "r", TENSORS, {"epoch": 3})
    for path in (tmp_path / "r.safetensors", tmp_path / "r.json"):
        whole = path.read_bytes()
        # The last byte of the JSON is only a line's end.
        path.write_bytes(whole[: int(share * (len(whole) - 2))])
        with pytest.raises(CheckpointError, match=path.name):
            load_record(tmp_path / "r")
        path.write_bytes(whole)


@pytest.mark.parametrize(
    "text", ["", "[]", "[1, 2]", "3", '"text"', "null", "{}", '{"epoch": 3}', '{"epoch": 3, "checksum": "00"}', "\ud800"]
)
def test_what_is_no_manifest(text: str, tmp_path: Path) -> None:
    path = tmp_path / "learner.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(CheckpointError, match=r"learner\.json"):
        load_manifest(path)


def test_a_manifest_comes_back(tmp_path: Path) -> None:
    facts = {"list": [1, 2.5, None, True, "ü"], "nested": {"a": {"b": []}}, "small": 1e-300, "third": 1 / 3}
    save_manifest(tmp_path / "m.json", facts)
    assert load_manifest(tmp_path / "m.json") == facts


def test_a_manifest_may_be_laid_out_anew_but_not_changed(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    save_manifest(path, {"lr": 0.1})
    path.write_text(json.dumps(json.loads(path.read_text())))
    assert load_manifest(path) == {"lr": 0.1}
    path.write_text(path.read_text().replace("0.1", "0.2"))
    with pytest.raises(CheckpointError, match="damaged"):
        load_manifest(path)


def test_a_record_without_one_of_its_files(tmp_path: Path) -> None:
    save_record(tmp_path / "r", TENSORS, {})
    (tmp_path / "r.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"r\.safetensors"):
        load_record(tmp_path / "r")
    remove_record(tmp_path / "r")
    remove_record(tmp_path / "r")
    assert list(tmp_path.iterdir()) == []
