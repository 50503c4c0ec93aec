"""The network as a .pt2 file: a program for torch.export.load, or compiled ahead of time with AOTInductor."""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from der_fast.deployment.facts import UINT8_INPUT, Facts, Preprocessing
from der_fast.deployment.network import FoldedExtractor, FoldedNetwork, Run
from der_fast.deployment.optional import cpp_compiler
from der_fast.errors import ExportError

# The name of the file within the archive that holds the facts (torch.export.load's `extra_files`).
EXTRA_FILE = "der_fast.json"
# torch.export would treat a batch of one as a constant.
_EXAMPLE_BATCH = 2


class DeployedNetwork(nn.Module):
    """Network and, for raw pixels, preprocessing as one module: images → (logits, probabilities), both (N, C) float32."""

    def __init__(self, network: FoldedNetwork, rule: Preprocessing) -> None:
        super().__init__()
        self._network, self._rule = network, rule
        for name, tensor in network.named_tensors():
            self.register_buffer(_buffer(name), tensor)
        if rule.input == UINT8_INPUT:
            mean, std = np.array(rule.mean), np.array(rule.std)
            self.register_buffer("scale", torch.tensor(1 / (255 * std), dtype=torch.float32))
            self.register_buffer("shift", torch.tensor(-mean / std, dtype=torch.float32))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and probabilities for images in the form that the preprocessing rule describes."""
        if self._rule.input == UINT8_INPUT:
            (top, left), (height, width) = self._rule.corner, self._rule.crop
            pixels = images[:, top : top + height, left : left + width].float()
            images = (pixels * self.get_buffer("scale") + self.get_buffer("shift")).permute(0, 3, 1, 2)
        return self._registered()(images)

    def _registered(self) -> FoldedNetwork:
        """The network with the module's buffers as its tensors, so that tracing or moving the module includes them."""
        names = iter([name for name, _ in self._network.named_tensors()])
        extractors = tuple(self._registered_extractor(extractor, names) for extractor in self._network.extractors)
        weight, bias = (self.get_buffer(_buffer(name)) for name in names)
        return replace(self._network, extractors=extractors, readout=replace(self._network.readout, weight=weight, bias=bias))

    def _registered_extractor(self, extractor: FoldedExtractor, names: Iterator[str]) -> FoldedExtractor:
        tensors = {name: self.get_buffer(_buffer(next(names))) for name in extractor.tensors}
        index = None if extractor.feature_index is None else self.get_buffer(_buffer(next(names)))
        return replace(extractor, tensors=tensors, feature_index=index)


def _buffer(name: str) -> str:
    return name.replace(".", "_")


def write_pt2(path: Path, network: FoldedNetwork, facts: Facts) -> None:
    """Write the program of torch.export; raises OSError if it cannot be written."""
    texts = json.dumps(facts.to_texts(), ensure_ascii=False)
    with path.open("wb") as handle:
        torch.export.save(_traced(network, facts), handle, extra_files={EXTRA_FILE: texts})


def write_aoti(path: Path, network: FoldedNetwork, facts: Facts) -> None:
    """Compile for this machine's processor with AOTInductor and write the package.

    Raises:
        ExportError: there is no C++ compiler, or it fails.
        OSError: the file cannot be written.
    """
    require_compiler()
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "model.pt2"
        settings: dict[str, Any] = {"aot_inductor.metadata": facts.to_texts()}
        try:
            with warnings.catch_warnings():
                # PyTorch warns about its own use of deprecated functions.
                warnings.filterwarnings("ignore", category=FutureWarning)
                torch._inductor.aoti_compile_and_package(_traced(network, facts), package_path=str(package), inductor_configs=settings)
        except (RuntimeError, OSError) as error:
            raise ExportError(f"AOTInductor could not compile the model with {cpp_compiler()}: {error}") from error
        shutil.copyfile(package, path)


def require_compiler() -> None:
    """Raise ExportError if there is no compiler."""
    if cpp_compiler() is None:
        raise ExportError(
            "AOTInductor needs a C++ compiler: install g++ (clang++ on macOS), or name yours in the variable CXX; without one, export a "
            ".pt2 file without AOTInductor"
        )


def _traced(network: FoldedNetwork, facts: Facts) -> torch.export.ExportedProgram:
    rule = facts.preprocessing
    kind = torch.uint8 if rule.input == UINT8_INPUT else torch.float32
    example = torch.zeros(_EXAMPLE_BATCH, *rule.input_shape, dtype=kind)
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad():
        return torch.export.export(DeployedNetwork(network, rule).eval(), (example,), dynamic_shapes={"images": {0: batch}})


def open_written(path: Path, facts: Facts, *, aoti: bool) -> Run:
    """Open a file that this process has just written, to check it.

    Other files are not opened: PyTorch may unpickle the contents of a .pt2 file, and it runs machine code from an AOTInductor package.
    """
    program: Callable[[Tensor], tuple[Tensor, Tensor]]
    with path.open("rb") as handle:
        if aoti:
            program = package = torch._inductor.aoti_load_package(handle)
            texts = package.get_metadata()
        else:
            extra = {EXTRA_FILE: ""}
            program = torch.export.load(handle, extra_files=extra).module()
            texts = json.loads(extra[EXTRA_FILE])
    if any(texts.get(key) != text for key, text in facts.to_texts().items()):
        raise ExportError(f"the metadata of {path} differ from what was written")
    transform = None if facts.preprocessing.input == UINT8_INPUT else facts.preprocessing.transform()

    def run(pixels: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            logits, probabilities = program(pixels if transform is None else transform(pixels, channels_last=False))
        return logits, probabilities

    return run
