"""A model that only predicts: opened from an exported file or a saved run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from der_fast.data import image_parts
from der_fast.deployment.facts import Facts, facts_of
from der_fast.deployment.network import Run, network_of, runner
from der_fast.deployment.onnx_file import read_onnx
from der_fast.deployment.safetensors_file import read_safetensors
from der_fast.errors import CheckpointError, DataError, ExportError, Spelling
from der_fast.home import expand
from der_fast.kernels.backend import resolve_device
from der_fast.kernels.forked import fit_to_compute
from der_fast.training.learner import Learner
from der_fast.training.prediction import Prediction, check_top, predictions_of
from der_fast.training.storage.saved import saved_steps

_BATCH = 64


class DeployedModel:
    """Names the classes of images; `load` opens one.

    Args:
        facts: class names, preprocessing, history.
        run: from uint8 images to logits and probabilities.
    """

    def __init__(self, facts: Facts, run: Run) -> None:
        self.facts, self._run = facts, run

    @property
    def class_names(self) -> tuple[str, ...]:
        """Every known class, in learning order."""
        return self.facts.class_names

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels to which images are resized."""
        return self.facts.preprocessing.resize

    def predict(self, images: Any, *, top: int = 5) -> list[Prediction]:
        """Name the class of every image; arguments, result and errors are those of `Learner.predict`."""
        top = check_top(top)
        fit_to_compute()
        rows: list[Prediction] = []
        for pixels in image_parts(images, self.image_size):
            rows += predictions_of(self.outputs(pixels)[1], self.class_names, top)
        return rows

    def outputs(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and probabilities, both (N, C) float32, for pixels as `der_fast.data.as_image_batch` returns them.

        Args:
            pixels: uint8, (N, *image_size, 3), N at least 1.

        Raises:
            DataError: another dtype or shape.
        """
        wanted = (*self.image_size, 3)
        if pixels.dtype != torch.uint8 or tuple(pixels.shape[1:]) != wanted or not len(pixels):
            raise DataError(
                f"outputs() needs uint8 pixels of shape (N, {wanted[0]}, {wanted[1]}, 3), not {pixels.dtype}, {tuple(pixels.shape)}; "
                "predict() accepts images of every form"
            )
        rows = [self._run(part) for part in torch.split(pixels, _BATCH)]
        return torch.cat([logits for logits, _ in rows]), torch.cat([probabilities for _, probabilities in rows])


def load(path: str | Path, *, device: str | None = None) -> DeployedModel:
    """Open an exported .onnx or .safetensors file, or the folder of a saved run, to predict with it.

    Args:
        path: the file or folder. An .onnx file runs in onnxruntime (``pip install 'der_fast[onnx]'``), the others in PyTorch.
        device: 'cpu', 'cuda', 'cuda:N' or 'auto'; default: 'auto', but the CPU for an .onnx file.

    Raises:
        ExportError: a file that der_fast did not export, that is damaged, or that needs a package that is not installed.
        CheckpointError: a folder that holds no finished step.
        BackendError: a device that does not exist.
    """
    fit_to_compute()
    path = expand(path)
    if path.is_dir():
        learner = load_run(path, device=device)
        network = network_of(learner.model)
        facts = facts_of(learner, network.checksum)
        return DeployedModel(facts, runner(network, facts.preprocessing.transform(), learner.device))
    if not path.exists():
        raise ExportError(f"there is no file or folder {path}; give an exported .onnx or .safetensors file, or a run's folder")
    suffix = path.suffix.lower()
    if suffix == ".onnx":
        return DeployedModel(*read_onnx(path, device))
    if suffix == ".safetensors":
        return DeployedModel(*read_safetensors(path, resolve_device(device or "auto")))
    if suffix == ".pt2":
        raise ExportError(
            f"{path}: .pt2 files are for PyTorch programs, which open them with torch.export.load or torch._inductor.aoti_load_package "
            "(they can hold code, so der_fast does not open them); give an .onnx or .safetensors file, or a run's folder"
        )
    raise ExportError(f"{path}: unknown kind of file; give an exported .onnx or .safetensors file, or a run's folder")


def load_run(run: Path, *, device: str | None = None) -> Learner:
    """Read a saved run's learner; raises CheckpointError, also if the run has no finished step yet."""
    if (run / "config.json").is_file() and not saved_steps(run):
        raise CheckpointError(
            f"the run in {run} has no finished step yet: let its training finish one, or continue it with ",
            Spelling(f"`der-fast train --out {run} --resume`", "train(…, resume=True)"),
        )
    return Learner.load(run, device=device)
