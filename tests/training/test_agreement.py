"""Fifty batches from one seed: the loss curve of the kernels stays as close to the exact one as the reference's does."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from der_fast.compaction.bank import FrozenBank
from der_fast.config.schema import Config
from der_fast.data import MemorySource
from der_fast.kernels import triton_runtime
from der_fast.kernels.backend import Backend
from der_fast.model.architecture import Architecture, Block, Conv, build_architecture
from der_fast.model.extractor import Extractor
from der_fast.training.batch_step import BatchStep
from der_fast.training.context import Context
from der_fast.training.methods.der.method import begin_step
from der_fast.training.methods.der.representation import RepresentationStage
from der_fast.training.model import Model, Network

Tiny = Callable[..., Config]
Images = Callable[..., MemorySource]
Contexts = Callable[..., Context]

BATCHES = 50
FUSED = Backend("fused", "a test asks for it")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Both curves leave the exact one by rounding, which grows with the network's own exponent: after t batches by c·ε·λ^t, with the same ε and
# λ for both, and c depending on which sums are taken in which order. So the largest of the reference's deviations so far, times what two
# draws of c may differ by, bounds the kernels'. A wrong term deviates by a share of the loss, and then by λ^t times as much.
FACTOR = 8
# The reference's deviation may be zero by chance: what rounding the loss alone amounts to, relative to it.
FLOOR = {torch.float32: 4 * torch.finfo(torch.float32).eps, torch.bfloat16: torch.finfo(torch.bfloat16).eps}


def tiny_architecture() -> Architecture:
    """A stem and a block of 3×3 convolutions that halves the picture, with a projection: every kernel and epilogue of a ResNet-18."""
    groups = {"stem": 3, "inner": 3, "out": 4}
    convs = (Conv("conv1", ("stem",), ("inner",), 3, 2), Conv("conv2", ("inner",), ("out",), 3))
    block = Block("block", convs, Conv("projection", ("stem",), ("out",), 1, 2))
    return Architecture("tiny", groups, Conv("stem", (), ("stem",), 3), False, (block,))


def curve(context: Context, source: MemorySource, architecture: Architecture, monkeypatch: pytest.MonkeyPatch, exact: bool) -> list[float]:
    """Losses of every batch of the second step's representation stage."""
    old = Extractor(architecture).initialise(torch.Generator().manual_seed(1))
    dense = {name: value.clone() for name, value in old.state_dict().items()}
    model = Model(Network(architecture, FrozenBank([old]).to(context.device), dense=dense), class_sets=[("a", "b")])
    state = begin_step(context, model, 2)
    losses: list[torch.Tensor] = []
    original = BatchStep.__call__

    # From outside, for inside of a CUDA graph nothing of Python runs.
    def noting(self: BatchStep, images: torch.Tensor, labels: torch.Tensor) -> None:
        before = self.totals[0].clone()
        original(self, images, labels)
        losses.append((self.totals[0] - before) / len(labels))

    with monkeypatch.context() as patch:
        patch.setattr(BatchStep, "__call__", noting)
        if exact:
            for module in (model.network.bank, *state.modules().values()):
                module.double()
            patch.setattr(Context, "features", lambda self, extractor, images, *masks: extractor(images.double(), *masks))
        RepresentationStage(context, state, model.network.bank, source, 2, context.config.later).run()
    return [float(loss) for loss in losses]


def bounded(found: list[float], usual: list[float], exact: list[float], floor: float) -> None:
    assert len(found) == len(usual) == len(exact) == BATCHES
    worst = 0.0
    for one, other, truth in zip(found, usual, exact, strict=True):
        worst = max(worst, abs(other - truth), floor * abs(truth))
        assert abs(one - truth) <= FACTOR * worst


@pytest.fixture
def quick_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter checks every sum and product of integers for overflow: a third of its time. The kernels' own tests keep that."""
    if triton_runtime.interpreting():
        builder = importlib.import_module("triton.runtime.interpreter").interpreter_builder
        monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))


def test_a_tiny_network(
    tiny: Tiny, synthetic: Images, context_for: Contexts, monkeypatch: pytest.MonkeyPatch, quick_interpreter: None
) -> None:
    source = synthetic("abcd", per_class=5, side=4)
    changes: dict[str, Any] = {
        "later.epochs": 10,
        "later.batch_size": 4,
        "later.lr": 2.0**-4,
        "masks.settle": 0.2,
        "masks.target_params": 0.6,
    }
    context = replace(context_for(tiny(changes), source), device=DEVICE)
    architecture = tiny_architecture()
    exact = curve(context, source, architecture, monkeypatch, exact=True)
    usual = curve(context, source, architecture, monkeypatch, exact=False)
    found = curve(replace(context, backend=FUSED), source, architecture, monkeypatch, exact=False)
    bounded(found, usual, exact, FLOOR[torch.float32])
    # The curve goes somewhere, and the bound would see a difference in the fourth digit.
    assert sum(exact[-5:]) < 0.95 * sum(exact[:5])
    with pytest.raises(AssertionError):
        bounded([*found[:-1], found[-1] * (1 + 1e-4)], usual, exact, FLOOR[torch.float32])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("measured", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resnet18_on_a_gpu(
    precision: str, measured: bool, tiny: Tiny, synthetic: Images, context_for: Contexts, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = synthetic("abcd", per_class=40, side=32)
    changes: dict[str, Any] = {
        "runtime.precision": precision, "later.epochs": 10, "later.batch_size": 32, "later.lr": 2.0**-6, "masks.settle": 0.2,
        "masks.target_params": 0.5,
    }  # fmt: skip
    context = replace(context_for(tiny(changes), source), device=DEVICE)
    architecture = build_architecture("resnet18", width=32)
    # TensorFloat-32 would be the reference's own error, and cuDNN may choose it for the kernels' rivals as well.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        exact = curve(context, source, architecture, monkeypatch, exact=True)
        usual = curve(context, source, architecture, monkeypatch, exact=False)
        found = curve(
            replace(context, backend=Backend("fused", "a test asks for it", measured)), source, architecture, monkeypatch, exact=False
        )
    bounded(found, usual, exact, FLOOR[context.dtype])
