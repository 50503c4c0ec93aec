"""A learner on disk.

    DIR/extractors/NN.safetensors     compact extractor of step NN; never changes
    DIR/steps/NN/model.*              classifier and the newest extractor's dense weights after step NN
    DIR/steps/NN/memory.safetensors   the rehearsal memory's pixels and labels
    DIR/steps/NN/learner.json         the manifest, written last: everything else, and the checksum of every file

The last two steps can be loaded, so that a damaged file costs one step and not the run.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from der_fast.config import schema
from der_fast.config.tree import from_dict, to_dict
from der_fast.data.source import ImageSource, MemorySource
from der_fast.errors import CheckpointError
from der_fast.files import sha256_of, write_atomically
from der_fast.model.architecture import Architecture, build_architecture
from der_fast.model.bank import FrozenBank
from der_fast.model.extractor import Extractor
from der_fast.training.progress import EpochRecord
from der_fast.training.results import StepResult
from der_fast.training.step import Model
from der_fast.training.store import load_manifest, load_record, load_tensors, save_manifest, save_record, save_tensors

FORMAT = 1
KEPT_STEPS = 2


def step_folder(run: Path, step: int) -> Path:
    """Where the state after a step lies."""
    return run / "steps" / f"{step:02d}"


def saved_steps(run: Path) -> list[int]:
    """The steps whose state is there, in order."""
    return sorted(int(path.parent.name) for path in run.glob("steps/*/learner.json") if path.parent.name.isdigit())


def save_model(run: Path, model: Model, config: schema.Config, stem: str, facts: dict[str, Any]) -> None:
    """Write a model as it is after its last step; raises StorageError and leaves what was saved before as it was.

    Args:
        run: the folder; made if it is not there.
        model: with at least one step learned.
        config: the configuration it was learned with.
        stem: the resolved stem of the backbone, 'small' or 'imagenet'.
        facts: whatever else belongs to it, as plain JSON values.
    """
    assert model.head is not None and model.dense is not None
    step = len(model.class_sets)
    folder = step_folder(run, step)
    extractors = [_save_extractor(run, step - len(model.bank) + 1 + i, e) for i, e in enumerate(model.bank.extractors)]  # type: ignore[arg-type]
    tensors = {f"dense.{name}": value for name, value in model.dense.items()}
    tensors.update({f"head.{name}": value for name, value in model.head.state_dict().items()})
    shape = [model.head.in_features, model.head.out_features]
    save_record(folder / "model", tensors, {"head": shape})
    memory = _save_memory(folder, model.memory)
    manifest = {
        "format": FORMAT,
        "step": step,
        "class_sets": [list(names) for names in model.class_sets],
        "temperature": model.temperature,
        "stem": stem,
        "config": to_dict(config),
        "extractors": extractors,
        "memory": memory,
        **facts,
    }
    save_manifest(folder / "learner.json", manifest)
    _forget_old(run, step)


def _save_extractor(run: Path, step: int, extractor: Extractor) -> dict[str, Any]:
    path = run / "extractors" / f"{step:02d}.safetensors"
    fresh = path.with_name(f"{step:02d}.new.safetensors")
    checksum = save_tensors(fresh, extractor.state_dict())
    if path.exists() and sha256_of(path) == checksum:
        fresh.unlink()
    else:
        fresh.replace(path)
    return {"file": f"extractors/{path.name}", "sha256": checksum, "widths": extractor.widths}


def _save_memory(folder: Path, memory: ImageSource | None) -> dict[str, Any] | None:
    if memory is None:
        return None
    if not isinstance(memory, MemorySource):
        raise CheckpointError(f"a memory of kind {type(memory).__name__} cannot be saved")
    checksum = save_tensors(folder / "memory.safetensors", {"images": memory.images, "labels": memory.labels})
    return {"sha256": checksum, "class_names": list(memory.class_names)}


def _forget_old(run: Path, step: int) -> None:
    """Delete what only steps further back than the last two need, and extractors that nothing names any more."""
    for old in saved_steps(run):
        if old <= step - KEPT_STEPS:
            for name in ("learner.json", "model.json", "model.safetensors", "memory.safetensors"):
                (step_folder(run, old) / name).unlink(missing_ok=True)
    named = set()
    for kept in saved_steps(run):
        try:
            named |= {row["file"] for row in load_manifest(step_folder(run, kept) / "learner.json")["extractors"]}
        except CheckpointError:
            return
    for path in (run / "extractors").glob("*.safetensors"):
        if f"extractors/{path.name}" not in named:
            path.unlink()


def load_model(run: Path, warn: Callable[[str], None]) -> tuple[Model, schema.Config, dict[str, Any]]:
    """Read the newest state that verifies.

    Args:
        run: the folder.
        warn: told about a state that had to be passed over.

    Returns:
        The model (on the CPU), its configuration, and the manifest.

    Raises:
        CheckpointError: nothing there can be read.
    """
    problems: list[str] = []
    for step in reversed(saved_steps(run)):
        try:
            return _load_step(run, step)
        except (CheckpointError, KeyError, RuntimeError, ValueError) as error:
            problems.append(f"the state after step {step} cannot be used: {error}")
            warn(f"{problems[-1]}; going back to the one before")
    if problems:
        raise CheckpointError(f"{run}: no saved step is whole. " + "; ".join(problems))
    raise CheckpointError(f"{run} holds no saved learner (no steps/NN/learner.json); give the folder that --out or save() wrote")


def _load_step(run: Path, step: int) -> tuple[Model, schema.Config, dict[str, Any]]:
    folder = step_folder(run, step)
    manifest = load_manifest(folder / "learner.json")
    if manifest["format"] != FORMAT:
        raise CheckpointError(f"{folder / 'learner.json'} has format {manifest['format']}; this version reads format {FORMAT}")
    config = from_dict(manifest["config"])
    architecture = build_architecture(config.model.backbone, width=config.model.width, stem=manifest["stem"])
    tensors, facts = load_record(folder / "model")
    head = nn.Linear(*facts["head"])
    head.load_state_dict({name[5:]: value for name, value in tensors.items() if name.startswith("head.")})
    memory = None
    if manifest["memory"] is not None:
        pixels = load_tensors(folder / "memory.safetensors", manifest["memory"]["sha256"])
        memory = MemorySource(pixels["images"], pixels["labels"], manifest["memory"]["class_names"])
    model = Model(
        architecture,
        FrozenBank([_load_extractor(run, architecture, row) for row in manifest["extractors"]]),
        head,
        {name[6:]: value for name, value in tensors.items() if name.startswith("dense.")},
        memory,
        [tuple(names) for names in manifest["class_sets"]],
        manifest["temperature"],
    )
    return model, config, manifest


def _load_extractor(run: Path, architecture: Architecture, row: dict[str, Any]) -> Extractor:
    extractor = Extractor(architecture, row["widths"])
    extractor.load_state_dict(load_tensors(run / row["file"], row["sha256"]))
    return extractor


def save_mask_log(run: Path, step: int, log: torch.Tensor, offsets: torch.Tensor, groups: list[str]) -> None:
    """Write a step's mask trajectory, (epochs + 1, channels), for the report."""
    from safetensors.torch import save_file

    path = step_folder(run, step) / "mask_logits.safetensors"
    tensors = {"logits": log.contiguous(), "offsets": offsets}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, {"groups": json.dumps(groups)}))


def results_to_json(results: list[StepResult], records: list[EpochRecord]) -> dict[str, Any]:
    """Turn results and epoch records into plain JSON values."""
    return {"results": [asdict(result) for result in results], "records": [asdict(record) for record in records]}


def results_from_json(facts: dict[str, Any]) -> tuple[list[StepResult], list[EpochRecord]]:
    """The inverse of `results_to_json`."""
    results = [StepResult(**{**row, "class_names": tuple(row["class_names"])}) for row in facts["results"]]
    return results, [EpochRecord(**row) for row in facts["records"]]
