"""A learner on disk.

    DIR/extractors/NN-<checksum>.safetensors        compact extractor of step NN: an arena
    DIR/steps/NN/model-<checksum>.safetensors       classifier, readout and the newest extractor's dense weights after step NN
    DIR/steps/NN/memory-<checksum>.safetensors      the rehearsal memory: labels with pixels, or with paths, sizes and checksums
    DIR/steps/NN/learner.json                       the manifest, written last: everything else, and every file's name and checksum
    DIR/learned/NN-<checksum>.safetensors           the images that step NN learned and held out (see `provenance`)
    DIR/steps/NN/*.safetensors                      what the method keeps for the report: for DER the mask trajectory

File names hold the checksum of their contents, so no file is overwritten with other contents: until a new manifest is written, the
previous state stays readable. The last two steps can be loaded, so a damaged file costs one step and not the run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from der_fast.compaction.arena import Arena
from der_fast.compaction.bank import FrozenBank
from der_fast.compaction.bank.extractor import CompactExtractor
from der_fast.config import schema
from der_fast.config.tree import from_dict, to_dict
from der_fast.data.read.library import read_settings
from der_fast.data.source import ImageSource
from der_fast.data.storage import from_record, record_of
from der_fast.errors import CheckpointError, Spelling, UserError
from der_fast.files import write_bytes
from der_fast.kernels import choices
from der_fast.model.architecture import Architecture, build_architecture
from der_fast.model.readout import Readout, linear_readout
from der_fast.training.events import REFRESHED
from der_fast.training.model import Model, Network
from der_fast.training.progress import EpochRecord
from der_fast.training.results import StepResult
from der_fast.training.state import StepFile
from der_fast.training.storage.named_files import (
    load_manifest,
    load_tensors,
    save_manifest,
    save_named_bytes,
    save_named_tensors,
    save_tensors,
)

FORMAT = 3
# Format 2, of version 0.1, had no readout: a linear classifier with a temperature.
READ_FORMATS = (2, FORMAT)
KEPT_STEPS = 2
MANIFEST = "learner.json"


def step_folder(run: Path, step: int) -> Path:
    """The folder of the state after a step."""
    return run / "steps" / f"{step:02d}"


def saved_steps(run: Path) -> list[int]:
    """The steps whose state exists, in order."""
    return sorted(int(path.parent.name) for path in run.glob(f"steps/*/{MANIFEST}") if path.parent.name.isdigit())


def save_model(run: Path, model: Model, config: schema.Config, stem: str, facts: dict[str, Any]) -> None:
    """Write a model after its last step; if that fails, raises StorageError and leaves the previous state unchanged.

    Afterwards the folder holds this model and the step before it; another learner's files there are deleted.

    Args:
        run: the folder; created if it does not exist.
        model: with at least one step learned.
        config: the model's configuration.
        stem: the resolved stem of the backbone, 'small' or 'imagenet'.
        facts: everything else that belongs to it, as plain JSON values.
    """
    network, readout = model.network, model.ready
    assert network.head is not None and network.dense is not None
    step = len(model.class_sets)
    folder = step_folder(run, step)
    tensors = {f"dense.{name}": value for name, value in network.dense.items()}
    tensors.update({f"head.{name}": value for name, value in network.head.state_dict().items()})
    rule = {"normalise": readout.normalise, "proxies": readout.proxies, "temperature": readout.temperature}
    linear = _is_linear(readout, network.head)
    if not linear:
        tensors.update({"readout.weight": readout.weight, "readout.bias": readout.bias})
    manifest = {
        "format": FORMAT,
        "step": step,
        "class_sets": [list(names) for names in model.class_sets],
        "readout": {**rule, "tensors": "head" if linear else "readout"},
        "stem": stem,
        "config": to_dict(config),
        "extractors": _save_extractors(run, step, network.bank),
        "model": {**save_named_tensors(folder, "model", tensors), "head": [network.head.in_features, network.head.out_features]},
        "memory": _save_memory(folder, model.memory),
        "strategies": choices.shared().record(),
        **facts,
    }
    save_manifest(folder / MANIFEST, manifest)
    _forget_others(run, manifest)


def _is_linear(readout: Readout, head: nn.Linear) -> bool:
    """Whether the readout is the trained classifier itself, which need not be saved twice."""
    return torch.equal(readout.weight, head.weight) and torch.equal(readout.bias, head.bias)


def _save_extractors(run: Path, step: int, bank: FrozenBank) -> list[dict[str, Any]]:
    rows = []
    for number, extractor in enumerate(bank.extractors, step - len(bank) + 1):
        assert isinstance(extractor, CompactExtractor)
        rows.append(save_named_bytes(run / "extractors", f"{number:02d}", extractor.arena.to_bytes()))
    return rows


def _save_memory(folder: Path, memory: ImageSource | None) -> dict[str, Any] | None:
    if memory is None:
        return None
    tensors, facts = record_of(memory)
    return {**save_named_tensors(folder, "memory", tensors), **facts}


def _forget_others(run: Path, newest: dict[str, Any]) -> None:
    """Delete every state but the newest and the one before it, and every file that neither of them names."""
    kept = {newest["step"]: newest, **_state_before(run, newest)}
    named = {
        row["file"]
        for manifest in kept.values()
        for row in [*manifest["extractors"], *manifest.get("learned", ()), manifest["model"], manifest["memory"]]
        if row
    }
    for folder in run.glob("steps/*"):
        if not folder.name.isdigit():
            continue
        if int(folder.name) not in kept:
            (folder / MANIFEST).unlink(missing_ok=True)
        if int(folder.name) > newest["step"]:
            for path in _step_files(run, int(folder.name)):
                path.unlink(missing_ok=True)
    for pattern in ("extractors/*.safetensors", "learned/*.safetensors", "steps/*/model-*.safetensors", "steps/*/memory-*.safetensors"):
        for path in run.glob(pattern):
            if path.name not in named:
                path.unlink(missing_ok=True)


def _state_before(run: Path, newest: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """The state that the newest one was learned from, by its step; empty if it is missing, damaged or another learner's."""
    step = newest["step"] - KEPT_STEPS + 1
    try:
        manifest = load_manifest(step_folder(run, step) / MANIFEST)
    except CheckpointError:
        return {}
    return {step: manifest} if manifest["class_sets"] == newest["class_sets"][:step] else {}


def load_model(run: Path, warn: Callable[[str], None]) -> tuple[Model, schema.Config, dict[str, Any]]:
    """Read the newest state that verifies.

    Args:
        run: the folder.
        warn: called for every state that had to be skipped.

    Returns:
        The model (on the CPU), its configuration, and the manifest.

    Raises:
        CheckpointError: nothing there can be read.
    """
    problems: list[str] = []
    for step in reversed(saved_steps(run)):
        try:
            return _load_step(run, step)
        except (UserError, KeyError, RuntimeError, TypeError, ValueError) as error:
            problems.append(f"the state after step {step} cannot be used: {error}")
            warn(f"{problems[-1]}; going back to the one before")
    if problems:
        raise CheckpointError(f"{run}: no saved step is complete; restore the folder from a copy, or train again. " + "; ".join(problems))
    wrote = Spelling("--out named", "out or Learner.save() named")
    raise CheckpointError(f"{run} holds no saved learner (no steps/NN/{MANIFEST}); give the folder that ", wrote)


def _load_step(run: Path, step: int) -> tuple[Model, schema.Config, dict[str, Any]]:
    folder = step_folder(run, step)
    manifest = load_manifest(folder / MANIFEST)
    if manifest["format"] not in READ_FORMATS:
        formats = " and ".join(map(str, READ_FORMATS))
        raise CheckpointError(f"{folder / MANIFEST} has format {manifest['format']}; this version reads formats {formats}")
    config = from_dict(manifest["config"])
    architecture = build_architecture(config.model.backbone, width=config.model.width, stem=manifest["stem"])
    choices.shared().pin(manifest["strategies"])
    tensors = load_tensors(folder / manifest["model"]["file"], manifest["model"]["sha256"])
    head = nn.Linear(*manifest["model"]["head"])
    head.load_state_dict({name[5:]: value for name, value in tensors.items() if name.startswith("head.")})
    memory = None if manifest["memory"] is None else _load_memory(folder, manifest["memory"], config)
    network = Network(
        architecture,
        FrozenBank([_load_extractor(run, architecture, row, config) for row in manifest["extractors"]]),
        head,
        {name[6:]: value for name, value in tensors.items() if name.startswith("dense.")},
    )
    model = Model(network, _load_readout(manifest, tensors, head), memory, [tuple(names) for names in manifest["class_sets"]])
    return model, config, manifest


def _load_readout(manifest: dict[str, Any], tensors: Mapping[str, torch.Tensor], head: nn.Linear) -> Readout:
    rule = dict(manifest.get("readout") or {"tensors": "head", "temperature": manifest["temperature"]})
    if rule.pop("tensors") == "head":
        return replace(linear_readout(head), **rule)
    return Readout(tensors["readout.weight"], tensors["readout.bias"], **rule)


def rename_before(run: Path, step: int, names: Mapping[str, str]) -> None:
    """Rename classes in the state from which the state after `step` was learned; raises StorageError.

    A missing or damaged state is left alone.
    """
    path = step_folder(run, step - KEPT_STEPS + 1) / MANIFEST
    try:
        manifest = load_manifest(path)
    except CheckpointError:
        return
    rows = [*manifest["class_sets"], *(result["class_names"] for result in manifest["results"])]
    rows += [event["class_names"] for event in manifest.get("events", []) if event["kind"] == REFRESHED]
    if manifest["memory"] is not None:
        rows.append(manifest["memory"].get("files", manifest["memory"])["class_names"])
    for row in rows:
        row[:] = [names.get(name, name) for name in row]
    save_manifest(path, manifest)


def _load_memory(folder: Path, row: dict[str, Any], config: schema.Config) -> ImageSource:
    return from_record(load_tensors(folder / row["file"], row["sha256"]), row, read_settings(config.data))


def _load_extractor(run: Path, architecture: Architecture, row: dict[str, Any], config: schema.Config) -> CompactExtractor:
    arena = Arena.load(run / "extractors" / row["file"], row["sha256"], architecture)
    return CompactExtractor(arena, torch.bfloat16 if config.runtime.precision == "bf16" else torch.float32)


def save_step_files(run: Path, step: int, files: Mapping[str, StepFile]) -> None:
    """Write what a step keeps for the report, and delete everything else of that kind; raises StorageError."""
    for name, (tensors, texts) in files.items():
        save_tensors(step_folder(run, step) / name, tensors, texts)
    for path in _step_files(run, step):
        if path.name not in files:
            path.unlink(missing_ok=True)


def copy_step_files(source: Path, run: Path, step: int) -> None:
    """Copy what a step keeps for the report from another folder; files missing there are missing afterwards."""
    there = {path.name for path in _step_files(source, step)}
    for name in there | {path.name for path in _step_files(run, step)}:
        path = step_folder(run, step) / name
        try:
            write_bytes(path, (step_folder(source, step) / name).read_bytes())
        except OSError:
            path.unlink(missing_ok=True)


def _step_files(run: Path, step: int) -> list[Path]:
    """The files that a step keeps for the report; unlike these, the state's own have a checksum in their names."""
    return [path for path in step_folder(run, step).glob("*.safetensors") if not path.name.startswith(("model-", "memory-"))]


def results_to_json(results: list[StepResult], records: list[EpochRecord]) -> dict[str, Any]:
    """Turn results and epoch records into plain JSON values."""
    return {"results": [result.to_json() for result in results], "records": [asdict(record) for record in records]}


def results_from_json(facts: dict[str, Any]) -> tuple[list[StepResult], list[EpochRecord]]:
    """The inverse of `results_to_json`."""
    return [StepResult.from_json(row) for row in facts["results"]], [EpochRecord(**row) for row in facts["records"]]
