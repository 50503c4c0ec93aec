"""Exporting a real run: every format predicts what the learner predicts, and a file that would not is never left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor

import der_fast
from der_fast.compaction import Arena, pack
from der_fast.compaction.bank import FrozenBank
from der_fast.compaction.bank.extractor import CompactExtractor
from der_fast.deployment import exporter, optional, pt2_file
from der_fast.deployment.exporter import export
from der_fast.deployment.network import FoldedNetwork
from der_fast.deployment.pt2_file import EXTRA_FILE, open_written
from der_fast.errors import CheckpointError, DataError, ExportError, StorageError
from der_fast.model.architecture import Architecture, Block, Conv
from der_fast.model.extractor import Extractor
from der_fast.model.readout import Readout
from der_fast.training.learner import Learner
from der_fast.training.prediction import Prediction

ONE_BLOCK = Architecture(
    "one block",
    {"stage1": 3, "stage1.0": 2},
    Conv("stem", (), ("stage1",), 3),
    False,
    (Block("stage1.0", (Conv("conv1", ("stage1",), ("stage1.0",), 3), Conv("conv2", ("stage1.0",), ("stage1",), 3))),),
)
Build = Callable[..., tuple[FoldedNetwork, Callable[[Tensor], Tensor]]]
Same = Callable[[list[Prediction], list[Prediction]], bool]


def small_learner(learner: Learner, random_network: Build, monkeypatch: pytest.MonkeyPatch) -> tuple[Learner, Callable[[Tensor], Tensor]]:
    """The learner, with a network of one block, which compilers are done with in a moment."""
    keep = torch.tensor([True, False, True, True, True])
    network, masked = random_network(ONE_BLOCK, [keep, ~keep | (torch.arange(5) < 1)], classes=10)
    monkeypatch.setattr(exporter, "network_of", lambda model: network)
    monkeypatch.setattr(exporter, "_float32_bank", lambda model: network_features(network))
    learner.model.readout = network.readout
    return learner, masked


def wrong(network: FoldedNetwork, **changes: Any) -> FoldedNetwork:
    return replace(network, readout=replace(network.readout, **changes))


def network_features(network: FoldedNetwork) -> Callable[[Tensor], Tensor]:
    size = network.readout.features
    eye = replace(network, readout=Readout(torch.eye(size), torch.zeros(size)))
    return lambda images: eye(images)[0]


@pytest.mark.parametrize(("name", "options"), [("model.onnx", {}), ("raw.ONNX", {"raw_uint8": True}), ("model.safetensors", {})])
def test_files_that_der_fast_opens_again(
    name: str, options: dict[str, Any], run_folder: Path, learner: Learner, digits: Tensor, same: Same, tmp_path: Path
) -> None:
    done = export(str(run_folder), str(tmp_path / "new" / name), **options)
    assert done.path == tmp_path / "new" / name
    assert [path.name for path in done.path.parent.iterdir()] == [name]
    assert done.nbytes == done.path.stat().st_size > 10_000
    assert (done.class_names, done.images) == (learner.class_names, 20)
    assert done.parameters == learner.results[-1].params
    assert 0 < done.difference < 1e-5
    model = der_fast.load(done.path)
    assert (model.class_names, model.image_size) == (learner.class_names, (8, 8))
    assert same(model.predict(digits, top=10), learner.predict(digits, top=10))
    assert len(model.predict(digits[:1], top=3)[0].top) == 3
    assert model.predict([]) == []
    assert model.facts.weights_sha256 == done.weights_sha256
    assert [step["params"] for step in model.facts.steps] == [result.params for result in learner.results]


def test_a_learner_and_its_run_give_the_same_file(run_folder: Path, learner: Learner, tmp_path: Path) -> None:
    for number, source in enumerate((learner, run_folder)):
        export(source, tmp_path / f"{number}.safetensors")
    assert (tmp_path / "0.safetensors").read_bytes() == (tmp_path / "1.safetensors").read_bytes()


def test_a_run_folder_is_opened_too(run_folder: Path, learner: Learner, digits: Tensor, same: Same) -> None:
    model = der_fast.load(run_folder, device="cpu")
    assert same(model.predict(digits[:5], top=10), learner.predict(digits[:5], top=10))


def test_metadata_for_other_programs(run_folder: Path, learner: Learner, tmp_path: Path) -> None:
    export(run_folder, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    found = {key: json.loads(text) for key, text in session.get_modelmeta().custom_metadata_map.items()}
    assert found["class_names"] == list(learner.class_names)
    assert found["preprocessing"]["input"] == {"dtype": "float32", "layout": "NCHW", "shape": ["batch", 3, 8, 8]}
    assert found["preprocessing"]["mean"] == list(learner.config.data.mean)
    assert [step["step"] for step in found["steps"]] == [1, 2]
    assert len(found["weights_sha256"]) == len(found["file_sha256"]) == 64
    assert found["der_fast_format"] == 1


@pytest.mark.parametrize("raw", [False, True])
def test_pt2(raw: bool, learner: Learner, random_network: Build, digits: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learner, masked = small_learner(learner, random_network, monkeypatch)
    done = export(learner, tmp_path / "model.pt2", raw_uint8=raw)
    assert 0 < done.difference < 1e-5
    extra = {EXTRA_FILE: ""}
    program = torch.export.load(tmp_path / "model.pt2", extra_files=extra).module()
    facts = json.loads(extra[EXTRA_FILE])
    assert json.loads(facts["class_names"]) == list(learner.class_names)
    assert json.loads(facts["preprocessing"])["input"]["dtype"] == ("uint8" if raw else "float32")
    normalised = (digits.float() / 255 - torch.tensor(learner.config.data.mean)) / torch.tensor(learner.config.data.std)
    images = digits if raw else normalised.permute(0, 3, 1, 2)
    for count in (1, 7):
        logits, probabilities = program(images[:count])
        torch.testing.assert_close(logits, masked(normalised[:count].permute(0, 3, 1, 2)), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(probabilities, torch.softmax(logits / 2, 1))


@pytest.mark.skipif(optional.cpp_compiler() is None, reason="AOTInductor needs a C++ compiler")
@pytest.mark.timeout(900)
def test_aoti(learner: Learner, random_network: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling takes most of a minute on two cores, whatever the size of the network."""
    # The compiler's cache is one folder for all processes of a user; what others do to it should not matter here.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    learner, _ = small_learner(learner, random_network, monkeypatch)
    done = export(learner, tmp_path / "out" / "model.pt2", aoti=True)
    assert 0 < done.difference < 1e-5
    assert [path.name for path in done.path.parent.iterdir()] == ["model.pt2"]
    compiled = torch._inductor.aoti_load_package(str(done.path))
    assert json.loads(compiled.get_metadata()["class_names"]) == list(learner.class_names)
    logits, probabilities = compiled(torch.zeros(3, 3, 8, 8))
    assert logits.shape == probabilities.shape == (3, 10)


def nothing_in(folder: Path) -> bool:
    return not folder.exists() or list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "factor"), [("model.onnx", 1.001), ("model.onnx", float("nan")), ("model.safetensors", 1.001), ("model.pt2", 1.001)]
)
def test_a_file_that_computes_something_else_is_not_written(
    name: str, factor: float, learner: Learner, random_network: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name.endswith("pt2"):
        learner, _ = small_learner(learner, random_network, monkeypatch)
    right = exporter.network_of
    monkeypatch.setattr(exporter, "network_of", lambda model: wrong(right(model), weight=right(model).readout.weight * factor))
    with pytest.raises(ExportError, match="differ from the learner's"):
        export(learner, tmp_path / "new" / name)
    assert nothing_in(tmp_path / "new")


def test_a_wrong_temperature_is_found(learner: Learner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = exporter.network_of
    monkeypatch.setattr(exporter, "network_of", lambda model: wrong(right(model), temperature=3.1))
    with pytest.raises(ExportError, match="probabilities by"):
        export(learner, tmp_path / "model.onnx")
    assert nothing_in(tmp_path)


def test_what_stood_there_before_is_unharmed_by_a_failure(learner: Learner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.onnx").write_text("old")
    monkeypatch.setattr(exporter, "TOLERANCE", -1.0)
    with pytest.raises(ExportError):
        export(learner, tmp_path / "model.onnx")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("model.onnx", "old")]


def test_a_full_disk(learner: Learner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, *rest: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporter, "write_onnx", full)
    with pytest.raises(StorageError, match="No space left on device") as error:
        export(learner, tmp_path / "model.onnx")
    assert "--resume" not in str(error.value)
    assert nothing_in(tmp_path)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("model.pkl", {}, "unknown format .pkl; the name must end in .onnx, .pt2, .safetensors"),
        ("model", {}, r"unknown format \(no suffix\)"),
        ("model.onnx", {"aoti": True}, "AOTInductor writes .pt2 files, not .onnx"),
        ("model.safetensors", {"raw_uint8": True}, "raw uint8 input is for .onnx and .pt2"),
    ],
)
def test_formats_and_options_that_do_not_exist(name: str, options: dict[str, Any], words: str, tmp_path: Path) -> None:
    """They are refused before the run is looked at."""
    with pytest.raises(ExportError, match=words):
        export(tmp_path / "no run", tmp_path / "out" / name, **options)
    assert nothing_in(tmp_path / "out")


def test_places_that_cannot_be_written(run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match=r"folder.onnx is a folder; give the name of a file in it"):
        export(run_folder, tmp_path / "folder.onnx")
    with pytest.raises(StorageError, match="file is a file, not a folder"):
        export(run_folder, tmp_path / "file" / "below" / "model.onnx")
    # Whoever runs tests as root may write everywhere.
    monkeypatch.setattr(exporter.os, "access", lambda path, mode: False)
    with pytest.raises(StorageError, match="no permission to write into"):
        export(run_folder, tmp_path / "new" / "model.onnx")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder.onnx"]


def test_runs_that_cannot_be_exported(run_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="there is no run folder"):
        export(tmp_path / "none", tmp_path / "model.onnx")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no saved learner"):
        export(tmp_path / "empty", tmp_path / "model.onnx")
    begun = tmp_path / "begun"
    begun.mkdir()
    shutil.copy(run_folder / "config.json", begun)
    for use in (lambda: export(begun, tmp_path / "model.onnx"), lambda: der_fast.load(begun)):
        with pytest.raises(CheckpointError, match="no finished step yet: .*resume=True"):
            use()
    with pytest.raises(ExportError, match="has not learned anything yet"):
        export(Learner(), tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.parametrize("missing", ["onnx", "onnxruntime"])
def test_packages_that_are_not_installed(missing: str, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(run_folder, tmp_path / "there.onnx")
    monkeypatch.setitem(__import__("sys").modules, missing, None)
    monkeypatch.setattr(optional, "_version", lambda name: None)
    with pytest.raises(ExportError, match=rf"needs {missing}, which is not installed: pip install 'der_fast\[onnx\]'"):
        export(run_folder, tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()
    assert optional.availability()[missing] == (False, "not installed; pip install 'der_fast[onnx]'")
    if missing == "onnxruntime":
        with pytest.raises(ExportError, match="running .onnx files needs onnxruntime"):
            der_fast.load(tmp_path / "there.onnx")
    else:
        assert der_fast.load(tmp_path / "there.onnx").class_names
    # The other formats need neither.
    export(run_folder, tmp_path / "model.safetensors")


def test_a_package_that_is_installed_but_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(ExportError, match="installed but cannot be imported"):
        export(tmp_path, tmp_path / "model.onnx")


def test_no_compiler(run_folder: Path, random_network: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ExportError, match="needs a C.. compiler: install"):
        export(run_folder, tmp_path / "model.pt2", aoti=True)
    assert nothing_in(tmp_path)
    works, reason = optional.availability()["AOTInductor"]
    assert not works
    assert "CXX" in reason


def test_a_compiler_that_fails(learner: Learner, random_network: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any, **options: Any) -> str:
        raise RuntimeError("C++ compile error")

    learner, _ = small_learner(learner, random_network, monkeypatch)
    monkeypatch.setattr(pt2_file, "require_compiler", lambda: None)
    monkeypatch.setattr(exporter, "require_compiler", lambda: None)
    monkeypatch.setattr("torch._inductor.aoti_compile_and_package", broken)
    with pytest.raises(ExportError, match="AOTInductor could not compile the model"):
        export(learner, tmp_path / "model.pt2", aoti=True)
    assert nothing_in(tmp_path)


def test_images_to_compare_on(run_folder: Path, learner: Learner, digits: Tensor, tmp_path: Path) -> None:
    out = tmp_path / "model.safetensors"
    assert export(learner, out, images=digits[:3]).images == 3
    assert export(learner, out, images=digits).images == 64
    learner.model.memory = None
    assert export(learner, out).images == 20  # two test images of each class
    learner.config = replace(learner.config, data=replace(learner.config.data, name="given as datasets"))
    out.unlink()
    with pytest.raises(ExportError, match=r"no rehearsal memory, and its data set 'given as datasets' cannot be read here"):
        export(learner, out)
    with pytest.raises(ExportError, match="no images to compare"):
        export(learner, out, images=[])
    with pytest.raises(DataError, match="missing.png"):
        export(learner, out, images=[tmp_path / "missing.png"])
    assert nothing_in(tmp_path)


@pytest.mark.parametrize("strategy", ["plain", "fused", "lanes"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_learner_in_low_precision_is_compared_in_float32(strategy: str, dtype: torch.dtype, learner: Learner, tmp_path: Path) -> None:
    """With the weights as a CPU keeps them (float32, computed with in bfloat16) and as a GPU does."""
    learner.config = replace(learner.config, runtime=replace(learner.config.runtime, precision="bf16"))
    arenas = [pack_again(member.arena, dtype) for member in learner.model.network.bank.extractors]
    bank = FrozenBank([CompactExtractor(arena, torch.bfloat16) for arena in arenas], strategy=strategy)
    learner.model.network.bank = bank
    assert export(learner, tmp_path / "model.safetensors").difference < 1e-5


def pack_again(arena: Arena, dtype: torch.dtype) -> Arena:
    """The same extractor with its weights rounded to another dtype."""
    if arena.dtype == dtype:
        return arena
    dense = Extractor(arena.architecture, arena.widths).initialise(torch.Generator().manual_seed(0)).eval()
    return pack(dense, dtype=dtype, align=8)


def test_large_models_do_not_fit_into_onnx(learner: Learner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("der_fast.deployment.onnx_file.LARGEST", 1000)
    with pytest.raises(ExportError, match="at most 2 GiB; export to .safetensors or .pt2"):
        export(learner, tmp_path / "model.onnx")
    assert nothing_in(tmp_path)


def test_other_metadata_than_written_is_found(
    learner: Learner, random_network: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner, _ = small_learner(learner, random_network, monkeypatch)
    export(learner, tmp_path / "model.pt2")
    facts = exporter.facts_of(learner, "another checksum")
    with pytest.raises(ExportError, match="metadata"):
        open_written(tmp_path / "model.pt2", facts, aoti=False)


def test_the_face_is_a_function_whatever_is_imported() -> None:
    import der_fast.deployment.exporter

    assert callable(der_fast.export)
    assert callable(der_fast.load)
