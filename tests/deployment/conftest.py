"""One tiny saved run on real images, and networks of every shape with random weights."""

from __future__ import annotations

import runpy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from der_fast.api import train
from der_fast.compaction import pack, plan
from der_fast.compaction.bank import FrozenBank
from der_fast.compaction.bank.extractor import CompactExtractor
from der_fast.deployment.network import FoldedNetwork, extractor_of, network_of
from der_fast.model.architecture import Architecture
from der_fast.model.classifier import new_classifier
from der_fast.model.extractor import Extractor, MaskedBatchNorm
from der_fast.model.layout import MaskLayout
from der_fast.model.readout import linear_readout
from der_fast.training import latency
from der_fast.training.learner import Learner
from der_fast.training.model import Model, Network
from der_fast.training.prediction import Prediction

TINY: dict[str, Any] = {
    "model.backbone": "resnet20", "model.width": 2, "data.train_per_class": 8, "data.test_per_class": 2, "memory.total": 20,
    "masks.bn_images": 16, "masks.floor": 0.5, "runtime.threads": 1, "runtime.device": "cpu", "classifier.temperature": 3.0,
    **{f"{stage}.{key}": value for stage in ("first", "later", "classifier")
       for key, value in {"epochs": 1, "milestones": (), "warmup_epochs": 0, "batch_size": 16, "lr": 0.05}.items()},
}  # fmt: skip

Masked = Callable[[Tensor], Tensor]

write_every_kind = runpy.run_path(str(Path(__file__).with_name("kinds.py")))["write_every_kind"]


@pytest.fixture(scope="session", autouse=True)
def _quick() -> Iterator[None]:
    """One thread and one call per timing."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "REPEATS", 1)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_settings() -> dict[str, Any]:
    return dict(TINY)


@pytest.fixture(scope="session")
def same() -> Callable[[list[Prediction], list[Prediction]], bool]:
    return same_predictions


def same_predictions(found: list[Prediction], wanted: list[Prediction]) -> bool:
    """Whether predictions agree but for rounding; classes of nearly the same probability may change places."""
    for mine, other in zip(found, wanted, strict=True):
        for name, probability in mine.top:
            assert probability == pytest.approx(dict(other.top)[name], abs=1e-5)
        assert mine.probability == pytest.approx(other.probability, abs=1e-5)
    return len(found) > 0


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of five handwritten digits."""
    out = tmp_path_factory.mktemp("deployment") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("der_fast.runs.write_report", lambda run: None)
        train("digits", "B0-2", out=out, settings=TINY)
    return out


@pytest.fixture
def learner(run_folder: Path) -> Learner:
    return Learner.load(run_folder, device="cpu")


@pytest.fixture(scope="session")
def digits() -> Tensor:
    """Real images, uint8, 70 × 8 × 8 × 3."""
    from der_fast.config.schema import DataConfig
    from der_fast.data import load_dataset

    return load_dataset(DataConfig(name="digits"))[1].images[:70]


@pytest.fixture(scope="session")
def every_kind(digits: Tensor, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Digits in every kind of file that the engine reads."""
    written: list[Path] = write_every_kind(tmp_path_factory.mktemp("kinds"), [np.asarray(pixels) for pixels in digits])
    return written


@pytest.fixture(scope="session")
def random_network() -> Callable[..., tuple[FoldedNetwork, Masked]]:
    return build_network


def build_network(architecture: Architecture, keeps: list[Tensor], *, classes: int = 4, align: int = 1) -> tuple[FoldedNetwork, Masked]:
    """Return a network of one extractor per mask, and the function images → logits that its dense, masked extractors compute.

    Args:
        architecture: of all extractors.
        keeps: boolean (C,), the binary masks of each extractor.
        classes: number of classes.
        align: stored widths are multiples of it.
    """
    layout = MaskLayout(architecture)
    dense, compacts, plans = [], [], []
    for number, keep in enumerate(keeps):
        dense.append(_random_extractor(architecture, number))
        plans.append(plan(layout, keep))
        compacts.append(CompactExtractor(pack(dense[-1], plans[-1])))
    head = new_classifier(sum(extractor.features for extractor in compacts), classes, torch.Generator().manual_seed(9))
    model = Model(Network(architecture, FrozenBank(compacts), head), readout=linear_readout(head, 2.0))

    @torch.no_grad()
    def masked(images: Tensor) -> Tensor:
        rows = [images.new_zeros(len(images), 0).double()]
        for extractor, made in zip(dense, plans, strict=True):
            features = extractor.double()(images.double(), made.masks.double())
            rows.append(features[:, made.features])
        return (torch.cat(rows, 1) @ head.weight.double().T + head.bias.double()).float()

    if align == 1:
        return network_of(model), masked
    parts = tuple(extractor_of(pack(extractor, made, align=align)) for extractor, made in zip(dense, plans, strict=True))
    return replace(network_of(model), extractors=parts), masked


def _random_extractor(architecture: Architecture, seed: int) -> Extractor:
    noise = torch.Generator().manual_seed(seed)
    extractor = Extractor(architecture).initialise(noise).eval()
    with torch.no_grad():
        for module in extractor.modules():
            if isinstance(module, MaskedBatchNorm):
                for tensor, low, high in ((module.weight, 0.5, 1.5), (module.bias, -1, 1), (module.running_mean, -1, 1)):
                    tensor.copy_(torch.rand(tensor.shape, generator=noise) * (high - low) + low)
                module.running_var.copy_(torch.rand(module.running_var.shape, generator=noise) + 0.5)
    return extractor
