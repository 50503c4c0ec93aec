"""Writing the finished model in a format that other programs run, and checking that it computes what the learner computes."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from der_fast.compaction.bank import FrozenBank
from der_fast.compaction.bank.extractor import CompactExtractor
from der_fast.data import as_image_batch, load_dataset, transforms_for
from der_fast.data.source import ImageSource
from der_fast.deployment.deployed import DeployedModel, load_run
from der_fast.deployment.facts import UINT8_INPUT, Facts, facts_of
from der_fast.deployment.network import FoldedNetwork, Run, network_of
from der_fast.deployment.onnx_file import read_onnx, write_onnx
from der_fast.deployment.optional import optional
from der_fast.deployment.pt2_file import open_written, require_compiler, write_aoti, write_pt2
from der_fast.deployment.safetensors_file import read_safetensors, write_safetensors
from der_fast.errors import ExportError, Spelling, StorageError, UserError
from der_fast.files import write_atomically
from der_fast.home import expand
from der_fast.kernels.forked import fit_to_compute
from der_fast.training.learner import Learner
from der_fast.training.model import Model

SUFFIXES = (".onnx", ".pt2", ".safetensors")
# Largest difference of a logit, as a share of the learner's largest one on the same images; and largest difference of a probability.
TOLERANCE = 1e-4
CHECK_IMAGES = 64
_IMAGES = Spelling("--check", "images=…")


@dataclass(frozen=True)
class Exported:
    """An exported file.

    Attributes:
        path: where it is.
        nbytes: its size.
        class_names: in the order of the logits.
        parameters: of the network as the report counts them.
        images: number of real images that the file and the learner were compared on.
        difference: max |logit − the learner's| / max |the learner's logit| over these images.
        weights_sha256: checksum of the weights, the same in every format.
    """

    path: Path
    nbytes: int
    class_names: tuple[str, ...]
    parameters: int
    images: int
    difference: float
    weights_sha256: str


def export(run: Learner | str | Path, path: str | Path, *, raw_uint8: bool = False, aoti: bool = False, images: Any = None) -> Exported:
    """Write a model to a file that does not need the run, after comparing it with the learner on real images.

    Args:
        run: a learner, or the folder of a saved run.
        path: its suffix selects the format: .onnx (any ONNX runtime), .pt2 (torch.export) or .safetensors (`der_fast.load`). Missing
            parent folders are created; an existing file is replaced once the new one has passed the comparison.
        raw_uint8: for .onnx and .pt2: the file takes resized uint8 images N × H × W × 3 and does crop, normalisation and transposition
            itself, instead of float32 N × 3 × H × W.
        aoti: for .pt2: compile ahead of time for this kind of processor with AOTInductor; needs a C++ compiler.
        images: what to compare on, in any form that `Learner.predict` accepts; default: exemplars of the rehearsal memory or, if there
            are none, the data set's test images.

    Raises:
        ExportError: an unknown format, an option that the format lacks, a missing package, no images to compare on, or a file that does
            not compute what the learner computes.
        CheckpointError: a run that cannot be read or has no finished step.
        StorageError: the file cannot be written. In each case `path` does not change.
    """
    path = expand(path)
    write, read = _format(path, raw_uint8=raw_uint8, aoti=aoti)
    _check_place(path)
    learner = _learner(run)
    fit_to_compute(learner.device)
    pixels = _check_images(learner, images)
    network = network_of(learner.model)
    facts = facts_of(learner, network.checksum)
    facts = facts.taking(UINT8_INPUT) if raw_uint8 else facts
    differences: list[float] = []

    def write_and_check(temporary: Path) -> None:
        write(temporary, network, facts)
        differences.append(_difference(learner, read(temporary, facts), pixels, path))

    write_atomically(path, write_and_check, remedy="free some space or choose another place")
    return Exported(path, path.stat().st_size, facts.class_names, learner.latest.params, len(pixels), differences[0], facts.weights_sha256)


Write = Callable[[Path, FoldedNetwork, Facts], None]
Read = Callable[[Path, Facts], DeployedModel]


def _format(path: Path, *, raw_uint8: bool, aoti: bool) -> tuple[Write, Read]:
    """Return the functions that write and open a format; refuse before any work what cannot be done."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ExportError(f"{path}: unknown format {path.suffix or '(no suffix)'}; the name must end in {', '.join(SUFFIXES)}")
    if aoti and suffix != ".pt2":
        raise ExportError(f"AOTInductor writes .pt2 files, not {suffix}; name the file model.pt2, or leave out the option")
    if raw_uint8 and suffix == ".safetensors":
        raise ExportError("raw uint8 input is for .onnx and .pt2; for .safetensors, der_fast.load accepts images of any kind")
    if suffix == ".onnx":
        for name in ("onnx", "onnxruntime"):
            optional(name, "exporting to .onnx")
        return write_onnx, lambda file, facts: DeployedModel(*read_onnx(file))
    if suffix == ".safetensors":
        return write_safetensors, lambda file, facts: DeployedModel(*read_safetensors(file, torch.device("cpu")))
    if aoti:
        require_compiler()
    return write_aoti if aoti else write_pt2, lambda file, facts: DeployedModel(facts, _opened(file, facts, aoti))


def _opened(path: Path, facts: Facts, aoti: bool) -> Run:
    return open_written(path, facts, aoti=aoti)


def _check_place(path: Path) -> None:
    """Refuse a place where nothing can be written."""
    if path.is_dir():
        raise StorageError(f"{path} is a folder; give the name of a file in it, e.g. {path / 'model.onnx'}")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise StorageError(f"cannot write {path}: {folder} is a file, not a folder; choose another place")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise StorageError(f"cannot write {path}: no permission to write into {folder}; choose another place")


def _learner(run: Learner | str | Path) -> Learner:
    if isinstance(run, Learner):
        if not run.results:
            raise ExportError("the learner has not learned anything yet: call learn() before export()")
        return run
    run = expand(run)
    if not run.is_dir():
        wrote = Spelling("`der-fast train --out`", "train(out=…) or Learner.save()")
        raise ExportError(f"there is no run folder {run}; give the folder that ", wrote, " wrote")
    return load_run(run)


def _check_images(learner: Learner, given: Any) -> Tensor:
    """Return up to `CHECK_IMAGES` real images, uint8, evenly spread over those available."""
    assert learner.image_size is not None
    if given is not None:
        # Of ten thousand paths, only those used are decoded.
        given = [given[index] for index in _spread(len(given)).tolist()] if isinstance(given, (list, tuple)) else given
        pixels = as_image_batch(given, learner.image_size)
        pixels = pixels[_spread(len(pixels))]
    else:
        memory = learner.model.memory
        source = memory if memory is not None and len(memory) else _test_images(learner)
        pixels = source.pixels(_spread(len(source)))
    if not len(pixels):
        raise ExportError("there are no images to compare the export on; give some with ", _IMAGES)
    return pixels


def _spread(count: int) -> Tensor:
    return torch.linspace(0, count - 1, min(CHECK_IMAGES, count)).long()


def _test_images(learner: Learner) -> ImageSource:
    name = learner.config.data.name
    try:
        _, test = load_dataset(learner.config.data)
    except UserError as error:
        raise ExportError(
            f"there are no images to compare the export on: the model has no rehearsal memory, and its data set {name!r} cannot be read "
            "here (",
            *error.args,
            "). Give some images with ",
            _IMAGES,
        ) from error
    return test


def _float32_bank(model: Model) -> FrozenBank:
    """The model's extractors, computing in float32; the model's own bank may compute in bfloat16."""
    return FrozenBank([CompactExtractor(cast(CompactExtractor, member).arena, torch.float32) for member in model.network.bank.extractors])


@torch.no_grad()
def _expected(learner: Learner, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """The learner's outputs for images, in float32 for any training precision."""
    model, assert_size = learner.model, learner.image_size
    assert assert_size is not None
    _, transform = transforms_for(learner.config.data, assert_size)
    # TensorFloat-32 would differ from float32 by more than the tolerance.
    exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False) if learner.device.type == "cuda" else nullcontext()
    with exact:
        images = transform(pixels, device=learner.device, channels_last=learner.config.runtime.channels_last)
        logits = model.ready(_float32_bank(model)(images)).cpu()
    return logits, model.ready.probabilities(logits)


def _difference(learner: Learner, deployed: DeployedModel, pixels: Tensor, path: Path) -> float:
    """Return the largest relative difference of the logits; raise ExportError if it, or that of the probabilities, is too large."""
    logits, probabilities = _expected(learner, pixels)
    found_logits, found_probabilities = deployed.outputs(pixels)
    # Batches of another size must give the same.
    first, _ = deployed.outputs(pixels[:1])
    scale = logits.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    difference = float(torch.cat([found_logits - logits, first - logits[:1]]).abs().max() / scale)
    change = float((found_probabilities - probabilities).abs().max())
    # Written so that NaN fails too.
    if not (difference <= TOLERANCE and change <= TOLERANCE):
        raise ExportError(
            f"{path} was not written: on {len(pixels)} real images its logits differ from the learner's by {difference:.2g} of the largest "
            f"one and its probabilities by {change:.2g}; {TOLERANCE:g} is allowed. Please report this, with `der-fast doctor --json`; "
            "another format may work"
        )
    return difference
