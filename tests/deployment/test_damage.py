"""Exported files that are damaged, changed, or somebody else's are refused with a message that names them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import der_fast
from der_fast.deployment.exporter import export
from der_fast.errors import BackendError, ConfigError, ExportError


@pytest.fixture(scope="module")
def files(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole")
    return {name: export(run_folder, folder / name).path.read_bytes() for name in ("model.onnx", "model.safetensors")}


def refusal(path: Path) -> str:
    with pytest.raises(ExportError) as error:
        der_fast.load(path)
    assert str(path) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ["model.onnx", "model.safetensors"])
def test_every_damaged_byte_is_found(name: str, files: dict[str, bytes], tmp_path: Path) -> None:
    whole, path = files[name], tmp_path / name
    for position in torch.linspace(0, len(whole) - 1, 40).long().tolist():
        damaged = bytearray(whole)
        damaged[position] ^= 0x10
        path.write_bytes(bytes(damaged))
        assert refusal(path)


@pytest.mark.parametrize(
    "text",
    ["der_fast 0.1", '[\\\\\\"', "resize_rule", "take the upper 8", "value_range", "top1", "NCHW", "metadata_sha256", "params_added"],
)
def test_every_damaged_word_of_the_metadata_is_found(text: str, files: dict[str, bytes], tmp_path: Path) -> None:
    whole = files["model.safetensors"]
    start = whole.index(text.encode())
    for position in range(start, start + len(text) + 1):
        damaged = bytearray(whole)
        damaged[position] ^= 0x01
        (tmp_path / "model.safetensors").write_bytes(bytes(damaged))
        assert refusal(tmp_path / "model.safetensors")


def test_files_of_before_have_no_checksum_of_their_metadata(files: dict[str, bytes], tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(files[path.name])
    with safe_open(path, framework="pt") as file:
        texts = json.loads(file.metadata()["der_fast"])
    del texts["metadata_sha256"]
    save_file(load_file(path), path, {"der_fast": json.dumps(texts)})
    assert der_fast.load(path).class_names


@pytest.mark.parametrize("name", ["model.onnx", "model.safetensors"])
def test_files_that_are_cut_off(name: str, files: dict[str, bytes], tmp_path: Path) -> None:
    for share in (0.0, 0.5, 0.999):
        (tmp_path / name).write_bytes(files[name][: int(share * len(files[name]))])
        assert refusal(tmp_path / name)


def test_text_that_is_called_onnx(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_text("this is no model")
    assert "not an ONNX file that onnxruntime can run" in refusal(tmp_path / "model.onnx")


def test_somebody_elses_onnx(tmp_path: Path) -> None:
    value = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 3]) for name in ("x", "y")]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "other", value[:1], value[1:])
    onnx.save(onnx.helper.make_model(graph, ir_version=8, opset_imports=[onnx.helper.make_opsetid("", 17)]), tmp_path / "other.onnx")
    assert "was not exported by der_fast" in refusal(tmp_path / "other.onnx")


def test_somebody_elses_safetensors(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    assert "was not exported by der_fast" in refusal(tmp_path / "other.safetensors")


def change_onnx(content: bytes, change: Callable[[Any], None]) -> bytes:
    model = onnx.load_from_string(content)
    change(model)
    return bytes(model.SerializeToString())


def without_checksum(model: Any) -> None:
    assert model.metadata_props[-1].key == "file_sha256"
    del model.metadata_props[-1]


def test_a_file_that_was_changed_on_purpose(files: dict[str, bytes], tmp_path: Path) -> None:
    """Whoever takes the checksum out says that the change is wanted."""
    path = tmp_path / "model.onnx"

    def rename(model: Any) -> None:
        model.graph.name = "another name"

    path.write_bytes(change_onnx(files["model.onnx"], rename))
    assert "checksum does not match" in refusal(path)
    path.write_bytes(change_onnx(path.read_bytes(), without_checksum))
    assert len(der_fast.load(path).class_names) == 10


def test_inputs_that_the_metadata_do_not_tell_of(files: dict[str, bytes], tmp_path: Path) -> None:
    def other_classes(model: Any) -> None:
        without_checksum(model)
        for entry in model.metadata_props:
            if entry.key == "class_names":
                entry.value = '["cat", "dog"]'

    (tmp_path / "model.onnx").write_bytes(change_onnx(files["model.onnx"], other_classes))
    assert "inputs and outputs" in refusal(tmp_path / "model.onnx")


def rewritten(source: bytes, path: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> Path:
    """Write a .safetensors file with other tensors or another description of the network."""
    path.write_bytes(source)
    with safe_open(path, framework="pt") as file:
        texts = json.loads(file.metadata()["der_fast"])
    tensors, network = load_file(path), json.loads(texts["network"])
    change(tensors, network)
    save_file(tensors, path, {"der_fast": json.dumps({**texts, "network": json.dumps(network)})})
    return path


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors, network: tensors["head.bias"].add_(1e-6), "checksum of its weights"),
        (lambda tensors, network: tensors.pop("head.bias"), "head.bias"),
        (lambda tensors, network: tensors.pop("extractor.1.stem.weight"), "extractor.1.stem.weight"),
        (lambda tensors, network: tensors.update({"extractor.1.stem.bias": torch.zeros(1, 1)}), "extractor.1.stem.bias is"),
        (lambda tensors, network: network.update(backbone="vgg"), "unknown backbone 'vgg'"),
        (lambda tensors, network: network.pop("extractors"), "extractors"),
        (lambda tensors, network: network["extractors"][0].pop("stage1"), "widths that do not fit"),
        (lambda tensors, network: network["extractors"][0].update(stage1=-1), "widths that do not fit"),
        (lambda tensors, network: network["extractors"].pop(), "features and 10 classes"),
        (lambda tensors, network: tensors.update({"extractor.1.feature_index": torch.tensor([99])}), "does not name features"),
    ],
)
def test_tensors_and_networks_that_do_not_fit(change: Any, words: str, files: dict[str, bytes], tmp_path: Path) -> None:
    assert words in refusal(rewritten(files["model.safetensors"], tmp_path / "model.safetensors", change))


def test_the_files_of_these_tests_are_whole(files: dict[str, bytes], tmp_path: Path) -> None:
    path = rewritten(files["model.safetensors"], tmp_path / "model.safetensors", lambda tensors, network: None)
    assert len(der_fast.load(path).class_names) == 10


def test_what_is_no_model(tmp_path: Path) -> None:
    assert "there is no file or folder" in refusal(tmp_path / "none.onnx")
    for name, words in (("model.pt2", "torch.export.load"), ("model.h5", "unknown kind of file")):
        (tmp_path / name).write_bytes(b"x")
        assert words in refusal(tmp_path / name)


def test_devices(files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(files["model.onnx"])
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    assert len(der_fast.load(path, device="auto").class_names) == 10
    for device, words in (("cuda:0", "has no CUDA"), ("tpu", "unknown device 'tpu'"), ("cuda:x", "unknown device")):
        with pytest.raises(BackendError, match=words):
            der_fast.load(path, device=device)
    with pytest.raises(ConfigError, match="top takes a whole number of at least 1"):
        der_fast.load(path).predict([], top=0)
