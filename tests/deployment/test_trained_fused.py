"""What was trained on the kernels is exported as anything else: every format predicts what the learner predicts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import der_fast
from der_fast.config.resolve import resolve_config
from der_fast.config.schema import DataConfig
from der_fast.data import load_dataset
from der_fast.deployment.exporter import export
from der_fast.model.architecture import Architecture, Block, Conv
from der_fast.training.learner import Learner

NETWORK = Architecture(
    "a block with a projection",
    {"stem": 3, "inner": 3, "out": 4},
    Conv("stem", (), ("stem",), 3),
    False,
    (
        Block(
            "block",
            (Conv("conv1", ("stem",), ("inner",), 3, 2), Conv("conv2", ("inner",), ("out",), 3)),
            Conv("projection", ("stem",), ("out",), 1, 2),
        ),
    ),
)


@pytest.fixture(scope="module")
def learner(tiny_settings: dict[str, object]) -> Iterator[Learner]:
    """Two steps, a batch each, of a small network: without a GPU in the interpreter, where every layer takes a tenth of a second."""
    settings = {**tiny_settings, "runtime.backend": "fused", "runtime.device": "auto", "masks.settle": 0.0, "memory.total": 10}
    config = resolve_config("digits", "B0-2", changes=settings)
    train, test = load_dataset(DataConfig(name="digits", train_per_class=2, test_per_class=2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "_architecture", lambda self, size: NETWORK)
        learner = Learner(config)
        for names in (train.class_names[:5], train.class_names[5:]):
            learner.learn(train.of_classes(names), test.of_classes([*learner.class_names, *names]))
        yield learner


def test_onnx(learner: Learner, digits: Tensor, same: Callable[..., bool], tmp_path: Path) -> None:
    assert learner.backend.name == "fused"
    done = export(learner, tmp_path / "model.onnx")
    assert 0 < done.difference < 1e-5
    assert same(der_fast.load(done.path).predict(digits, top=10), learner.predict(digits, top=10))


def test_pt2(learner: Learner, digits: Tensor, tmp_path: Path) -> None:
    done = export(learner, tmp_path / "model.pt2", raw_uint8=True)
    assert 0 < done.difference < 1e-5
    _, probabilities = torch.export.load(done.path).module()(digits)
    for row, prediction in zip(probabilities.tolist(), learner.predict(digits, top=10), strict=True):
        assert row == pytest.approx([dict(prediction.top)[name] for name in learner.class_names], abs=1e-5)
