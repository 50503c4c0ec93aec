from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from der_fast.config.schema import Config
from der_fast.data import MemorySource
from der_fast.model.architecture import build_architecture
from der_fast.model.extractor import Extractor, MaskedBatchNorm
from der_fast.model.layout import MaskLayout
from der_fast.training.context import Context
from der_fast.training.methods.der.batch_norm import reestimate_batch_norm
from der_fast.training.progress import Observer

LAYOUT = MaskLayout(build_architecture("resnet20", width=2))


class Telling(Observer):
    def __init__(self, told: list[tuple[str, int, int]]) -> None:
        self.told = told

    def images_pass(self, work: str, done: int, images: int) -> None:
        self.told.append((work, done, images))


class Statistics:
    """Mean and unbiased variance of what every batch-norm was given, batch by batch."""

    def __init__(self, extractor: Extractor) -> None:
        self.norms = [module for module in extractor.modules() if isinstance(module, MaskedBatchNorm)]
        self.seen: dict[MaskedBatchNorm, list[tuple[Tensor, Tensor]]] = {norm: [] for norm in self.norms}
        for norm in self.norms:
            norm.register_forward_pre_hook(self._note)

    def _note(self, norm: MaskedBatchNorm, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].double()
        self.seen[norm].append((x.mean((0, 2, 3)), x.var((0, 2, 3))))


@pytest.mark.parametrize("images", [4, 10, 100])
def test_batch_norm_is_the_mean_of_the_batches_statistics(
    images: int, tiny: Callable[..., Config], synthetic: Callable[..., MemorySource], context_for: Callable[..., Context]
) -> None:
    source = synthetic("abc", 4)
    context = context_for(tiny({"masks.bn_images": images}), source)
    told: list[tuple[str, int, int]] = []
    context = replace(context, observer=Telling(told))
    extractor = Extractor(LAYOUT.architecture).initialise(torch.Generator().manual_seed(0))
    for norm in extractor.modules():
        if isinstance(norm, MaskedBatchNorm):
            norm.running_mean.fill_(5.0)
    masks = (torch.rand(LAYOUT.channels, generator=torch.Generator().manual_seed(3)) < 0.6).float()
    statistics = Statistics(extractor)
    reestimate_batch_norm(context, extractor, masks, source, torch.Generator().manual_seed(1), batch_size=4)
    count = min(images, 12)
    assert (len(told), told[0]) == (round(count / 4), ("batch-norm statistics", 0, count))
    for norm, seen in statistics.seen.items():
        assert len(seen) == round(count / 4)
        means, variances = (torch.stack(part) for part in zip(*seen, strict=True))
        assert torch.allclose(norm.running_mean.double(), means.mean(0), atol=1e-5)
        assert torch.allclose(norm.running_var.double(), variances.mean(0), rtol=1e-4, atol=1e-5)
        assert norm.momentum == 0.1
    assert not extractor.training


def test_batch_norm_can_be_left_alone(
    tiny: Callable[..., Config], synthetic: Callable[..., MemorySource], context_for: Callable[..., Context]
) -> None:
    source = synthetic("abc", 4)
    extractor = Extractor(LAYOUT.architecture).initialise(torch.Generator().manual_seed(0)).train()
    before = {name: value.clone() for name, value in extractor.state_dict().items()}
    reestimate_batch_norm(context_for(tiny({"masks.bn_images": 0}), source), extractor, None, source, torch.Generator())
    assert all(torch.equal(value, before[name]) for name, value in extractor.state_dict().items())
    assert not extractor.training
