from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from der_fast.compaction.bank import FrozenBank
from der_fast.config.schema import Config
from der_fast.data import MemorySource
from der_fast.model.architecture import build_architecture
from der_fast.model.classifier import initialise_classifier
from der_fast.model.extractor import Extractor
from der_fast.seeds import generator
from der_fast.training.classifier_stage import train_classifier
from der_fast.training.context import Context
from der_fast.training.memory import balanced_subset
from der_fast.training.state import CLASSIFIER, StepState

Tiny = Callable[..., Config]
Images = Callable[..., MemorySource]
Contexts = Callable[..., Context]

PLAIN = {
    "data.crop_padding": 0, "data.flip": False, "data.brightness": 0.0,
    "classifier.momentum": 0.0, "classifier.weight_decay": 0.0, "classifier.epochs": 1, "classifier.batch_size": 64,
}  # fmt: skip


def setting() -> tuple[StepState, FrozenBank]:
    """Step 2 in its classifier stage, over two extractors."""
    architecture = build_architecture("resnet20", width=2)
    extractors = [Extractor(architecture).initialise(torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    state = StepState(2, {"extractor": extractors[1], "head": torch.nn.Linear(16, 3)}, stage=CLASSIFIER, stages=1)
    return state, FrozenBank(extractors)


def unbalanced(synthetic: Images) -> MemorySource:
    """Six images of class a, four of b, two of c."""
    return synthetic("abc", 6).subset(torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13]))


@pytest.mark.parametrize("temperature", [1.0, 5.0])
def test_one_step_of_gradient_descent_written_out(temperature: float, tiny: Tiny, synthetic: Images, context_for: Contexts) -> None:
    source = unbalanced(synthetic)
    context = context_for(tiny({**PLAIN, "classifier.lr": 0.5, "classifier.temperature": temperature}), source)
    state, bank = setting()
    train_classifier(context, state, bank, source)

    layer = torch.nn.Linear(16, 3)
    initialise_classifier(layer, generator(7, "classifier", 2, "start"))
    chosen = balanced_subset(source.labels, generator(7, "classifier", 2, "subset"))
    assert source.labels[chosen].bincount().tolist() == [2, 2, 2]
    features = bank(context.test_transform(source.images[chosen]))
    loss = F.cross_entropy(layer(features) / temperature, source.labels[chosen])
    weight, bias = torch.autograd.grad(loss, [layer.weight, layer.bias])
    assert torch.allclose(state.head.weight, layer.weight - 0.5 * weight, atol=1e-6)
    assert torch.allclose(state.head.bias, layer.bias - 0.5 * bias, atol=1e-6)
    assert weight.abs().max() > 1e-3
    assert state.records[-1].loss == pytest.approx(float(loss.detach()), rel=1e-4)


def test_nothing_but_the_classifier_is_trained(tiny: Tiny, synthetic: Images, context_for: Contexts) -> None:
    source = unbalanced(synthetic)
    state, bank = setting()
    before = {name: value.clone() for name, value in bank.state_dict().items()}
    head = state.head.weight.detach().clone()
    saved: list[tuple[str, int]] = []
    context = context_for(tiny({"classifier.epochs": 3}), source, save=lambda state: saved.append((state.stage, state.epoch)))
    train_classifier(context, state, bank, source)
    assert all(torch.equal(value, before[name]) for name, value in bank.state_dict().items())
    assert all(parameter.grad is None for parameter in bank.parameters())
    assert not torch.equal(state.head.weight, head)
    assert saved == [(CLASSIFIER, 1), (CLASSIFIER, 2), (CLASSIFIER, 3)]
    assert [(record.stage, record.epoch, record.epochs) for record in state.records] == [(CLASSIFIER, n, 3) for n in (1, 2, 3)]


@pytest.mark.parametrize("done", [1, 2])
def test_an_interrupted_stage_goes_on_as_if_nothing_had_happened(done: int, tiny: Tiny, synthetic: Images, context_for: Contexts) -> None:
    source = unbalanced(synthetic)
    written = []
    context = context_for(
        tiny({"classifier.epochs": 3}),
        source,
        save=lambda state: written.append(({name: value.clone() for name, value in state.tensors().items()}, state.facts())),
    )
    straight, bank = setting()
    train_classifier(context, straight, bank, source)
    resumed, bank = setting()
    resumed.restore(*written[done - 1])
    train_classifier(context, resumed, bank, source)
    assert torch.equal(straight.head.weight, resumed.head.weight)
    assert torch.equal(straight.head.bias, resumed.head.bias)


def test_the_seed_decides_the_start(tiny: Tiny, synthetic: Images, context_for: Contexts) -> None:
    source = unbalanced(synthetic)
    heads = []
    for seed in (7, 7, 8):
        state, bank = setting()
        train_classifier(context_for(tiny({"runtime.seed": seed}), source), state, bank, source)
        heads.append(state.head.weight.detach())
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
