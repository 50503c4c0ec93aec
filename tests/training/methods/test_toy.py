"""A method that is not ours: registered by its name, it trains two steps, resumes, predicts, is saved and exported."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import der_fast
from der_fast.config import methods
from der_fast.config.check import check
from der_fast.config.schema import Config
from der_fast.data import MemorySource
from der_fast.data.source import ImageSource
from der_fast.deployment.exporter import export
from der_fast.errors import ConfigError, DerFastError
from der_fast.model.readout import Readout
from der_fast.training.batch_step import TrainedFeatures
from der_fast.training.context import Context
from der_fast.training.evaluation import features_by_class, logits_of
from der_fast.training.learner import Learner
from der_fast.training.method import Split
from der_fast.training.methods import METHODS, check_complete, register
from der_fast.training.methods.replay import Replay
from der_fast.training.model import Model
from der_fast.training.packing import schedule_of
from der_fast.training.progress import Observer
from der_fast.training.run import run_protocol
from der_fast.training.stage import Stage
from der_fast.training.state import REPRESENTATION, StepState
from der_fast.training.storage.checkpoint import Checkpoints

Tiny = Callable[..., Config]
Images = Callable[..., MemorySource]
TUNING = "tuning"


class Toy(Replay):
    """Two stages before the network is final; the first keeps the classifier's weights positive. Nearest class means at test time.

    One image of every new class is held out, and measured once the memory is refilled.
    """

    figures: Mapping[str, tuple[str, str]] = {"held_out_top1": ("percent", "of held-out images")}

    def __init__(self) -> None:
        self.held_out: dict[int, tuple[int, float]] = {}

    def split(self, context: Context, model: Model, train: ImageSource) -> Split:
        last = torch.tensor([int((train.labels == label).nonzero()[-1]) for label in range(len(train.class_names))])
        rest = torch.ones(len(train), dtype=torch.bool)
        rest[last] = False
        return train.subset(rest.nonzero().flatten()), train.subset(last)

    def train(self, context: Context, model: Model, state: StepState, source: ImageSource) -> None:
        features = TrainedFeatures(context, state.extractor)

        def loss(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            logits = state.head(features(images))
            return F.cross_entropy(logits, labels), logits

        @torch.no_grad()
        def constrain() -> None:
            state.head.weight.clamp_(min=0)

        schedule = schedule_of(context, state.step)
        if state.stage == REPRESENTATION:
            Stage(context, state, source, schedule, loss, constrain=constrain).run()
            assert float(state.head.weight.detach().min()) == 0.0
            state.enter(TUNING)
            context.save(state)
        if state.stage == TUNING:
            Stage(context, state, source, schedule, loss, parts={"head": state.head}).run()

    def finish(self, context: Context, model: Model, state: StepState, source: ImageSource, held: ImageSource | None) -> None:
        assert held is not None and model.memory is not None
        trained = {image.numpy().tobytes() for each in (source, model.memory) for image in each.pixels(torch.arange(len(each)))}
        assert not trained & {image.numpy().tobytes() for image in held.pixels(torch.arange(len(held)))}
        assert set(model.memory.labels.tolist()) == set(range(len(model.class_names)))
        logits, _ = logits_of(context, model.network.bank, self.readout(context, model, state), held)
        right = logits.argmax(1) == held.relabelled(model.class_names).labels
        self.held_out[state.step] = (len(held), 100 * float(right.double().mean()))

    def readout(self, context: Context, model: Model, state: StepState) -> Readout:
        assert model.memory is not None
        rows = [F.normalize(features, dim=1).mean(0) for _, _, features in features_by_class(context, model.network.bank, model.memory)]
        means = F.normalize(torch.stack(rows), dim=1).to(context.device)
        return Readout(means, means.new_zeros(len(means)), normalise=True, temperature=0.5)

    def facts(self, context: Context, state: StepState, packed: Any) -> dict[str, Any]:
        return {"held_out_top1": self.held_out[state.step][1]}

    def label(self, config: Config) -> str:
        return "a toy"


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    register("toy", Toy())
    yield
    del METHODS["toy"]
    del methods.METHODS["toy"]


class Stop(Observer):
    """Stops the run in the second step's second stage."""

    def batch_ends(self, step: int, stage: str, epoch: int, epochs: int, batch: int, batches: int, images: int) -> None:
        if (step, stage, epoch, batch) == (2, TUNING, 2, 1):
            raise RuntimeError("stopped here")


def test_two_steps_resumed_predicted_saved_and_exported(tiny: Tiny, synthetic: Images, tmp_path: Path) -> None:
    config = tiny({"method.name": "toy", "protocol.name": "B0-2"})
    images = synthetic("abcd"), synthetic("abcd", 3, 8, 1)
    straight = run_protocol(config, *images, tmp_path / "straight")
    with pytest.raises(RuntimeError, match="stopped here"):
        run_protocol(config, *images, tmp_path / "run", observer=Stop())
    # Any number of stages; their checkpoints sort in the order in which they were written.
    assert [stem.name for stem in Checkpoints(tmp_path / "run", 2).stems()] == ["002-2-tuning-0000", "002-2-tuning-0001"]
    resumed = run_protocol(config, *images, tmp_path / "run", resume=True)
    stages = [(record.step, record.stage) for record in resumed.records]
    assert stages == [(step, stage) for step in (1, 2) for stage in (REPRESENTATION, TUNING) for _ in range(2)]
    wanted = straight.predict(images[1].images, top=4)
    assert resumed.predict(images[1].images, top=4) == wanted
    loaded = Learner.load(tmp_path / "run", device="cpu")
    assert loaded.predict(images[1].images, top=4) == wanted
    assert loaded.model.ready.normalise and loaded.model.ready.temperature == 0.5
    toy = METHODS["toy"]
    assert isinstance(toy, Toy) and [count for count, _ in toy.held_out.values()] == [2, 2]
    shown = [share for _, share in toy.held_out.values()]
    assert loaded.metrics()["name"] == "a toy" and loaded.metrics()["held_out_top1"] == shown
    row = json.loads((tmp_path / "run" / "steps" / "02" / "learner.json").read_text())["results"][1]
    assert row["held_out_top1"] == shown[1] and "facts" not in row
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["held_out_top1"] == shown
    assert not list((tmp_path / "run").rglob("mask_logits*"))
    done = export(loaded, tmp_path / "model.onnx", images=images[1].images)
    assert done.difference < 1e-5
    found = der_fast.load(tmp_path / "model.onnx").predict(images[1].images, top=4)
    for one, other in zip(found, wanted, strict=True):
        assert dict(one.top) == pytest.approx(dict(other.top), abs=1e-5)


def test_a_name_is_given_once_and_an_unknown_one_is_refused(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match="there is already a method 'toy'"):
        register("toy", Toy())

    class Taking(Toy):
        figures: Mapping[str, tuple[str, str]] = {"bwt": ("", "a run's"), "kept": ("", "a step's"), "own": ("", "")}

    with pytest.raises(ConfigError, match="'taking' declares figures bwt, kept, but every run has figures"):
        register("taking", Taking())
    assert "taking" not in METHODS and "taking" not in methods.METHODS
    with pytest.raises(ConfigError, match=r"method.name takes one of der, replay, bound, .*not 'wa'"):
        check(tiny({"method.name": "wa"}))


def test_facts_that_are_not_declared_are_refused(tiny: Tiny, synthetic: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Toy, "figures", {"held_out_top5": ("percent", "of held-out images")})
    learner = Learner(tiny({"method.name": "toy", "protocol.name": "B0-2"}))
    with pytest.raises(DerFastError, match=r"declares, \['held_out_top5'\], not \['held_out_top1'\]"):
        learner.learn(synthetic("ab"))


def test_methods_that_are_declared_and_missing_or_the_other_way_round_are_refused() -> None:
    check_complete(METHODS)
    for changed in ({"der": METHODS["der"]}, {**METHODS, "other": Toy()}):
        with pytest.raises(RuntimeError, match="^(bound, replay, toy|other): "):
            check_complete(changed)
