"""Training on the kernels: the step function is the same eagerly and in a CUDA graph, asks the device for nothing, and does what the
reference does."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from der_fast.compaction.bank import FrozenBank
from der_fast.config.schema import Config
from der_fast.config.tree import replace_keys
from der_fast.data import MemorySource
from der_fast.errors import DivergenceError
from der_fast.kernels import triton_runtime
from der_fast.kernels.backend import Backend
from der_fast.model.architecture import build_architecture
from der_fast.model.extractor import Extractor
from der_fast.model.fused_training import FusedTraining
from der_fast.training import batch_step
from der_fast.training.batch_step import BatchStep
from der_fast.training.context import Context
from der_fast.training.graphed import GraphedStep
from der_fast.training.learner import Learner
from der_fast.training.methods.der.loss import DerLoss
from der_fast.training.methods.der.method import begin_step
from der_fast.training.methods.der.representation import RepresentationStage
from der_fast.training.methods.der.state import DerState
from der_fast.training.model import Model, Network
from der_fast.training.packing import schedule_of
from der_fast.training.progress import Observer
from der_fast.training.run import run_protocol

Tiny = Callable[..., Config]
Images = Callable[..., MemorySource]
Contexts = Callable[..., Context]

FUSED = Backend("fused", "a test asks for it")
# Powers of two are the same in every precision: the learning rate is a float32 on the device.
# Rounding grows about twofold per batch in so small a network, and less at a low rate.
EXACT_RATES = {"later.lr": 2.0**-7, "later.gamma": 0.5, "masks.lr": 0.5}


@pytest.fixture
def exact_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the engine compute in double precision on the kernels' references."""

    def make(extractor: Extractor, dtype: torch.dtype, path: str) -> FusedTraining:
        return FusedTraining(extractor, torch.float64, path=path, backend="reference")

    monkeypatch.setattr(batch_step, "FusedTraining", make)
    monkeypatch.setattr(Context, "features", lambda self, extractor, images, *masks: extractor(images.double(), *masks))


@pytest.fixture
def reference_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the engine compute on the kernels' references."""
    monkeypatch.setattr(batch_step, "FusedTraining", partial(FusedTraining, backend="reference"))


def second_step(context: Context, backbone: str = "resnet20") -> tuple[Model, DerState]:
    architecture = build_architecture(backbone, width=4)
    old = Extractor(architecture).initialise(torch.Generator().manual_seed(1))
    dense = {name: value.clone() for name, value in old.state_dict().items()}
    model = Model(Network(architecture, FrozenBank([old]), dense=dense), class_sets=[("a", "b")])
    return model, begin_step(context, model, 2)


def stage_of(context: Context, source: MemorySource, state: DerState, model: Model) -> RepresentationStage:
    return RepresentationStage(context, state, model.network.bank, source, 2, schedule_of(context, state.step))


def trained(context: Context, source: MemorySource, backbone: str) -> DerState:
    model, state = second_step(context, backbone)
    for module in (model.network.bank, *state.modules().values()):
        module.double()
    stage_of(context, source, state, model).run()
    return state


@pytest.mark.parametrize("backbone", ["resnet20", "resnet18", "preact_resnet18"])
def test_a_whole_stage_does_what_the_reference_does(
    backbone: str, tiny: Tiny, synthetic: Images, context_for: Contexts, exact_kernels: None
) -> None:
    """Four epochs of three full batches and an odd one, of which the last two on the compact network."""
    source = synthetic("abcd", per_class=7, side=16)
    changes = {**EXACT_RATES, "later.epochs": 4, "later.warmup_epochs": 1, "later.warmup_lr": 2.0**-8, "masks.target_params": 0.5}
    context = context_for(tiny(changes), source)
    wanted = trained(context, source, backbone)
    found = trained(replace(context, backend=FUSED), source, backbone)
    assert found.remainder is not None and wanted.remainder is not None
    assert found.remainder.plan.widths == wanted.remainder.plan.widths
    losses = [record.loss for record in wanted.records]
    assert [record.loss for record in found.records] == pytest.approx(losses, rel=1e-9)
    assert [record.accuracy for record in found.records] == [record.accuracy for record in wanted.records]
    assert [record.sparsity_weight for record in found.records] == pytest.approx([record.sparsity_weight for record in wanted.records])
    assert len(set(losses)) == len(losses)
    one, other = found.tensors(), wanted.tensors()
    for name, value in other.items():
        assert torch.allclose(one[name].double(), value.double(), rtol=1e-8, atol=1e-10), name
    # A parameter that no loss reached has no momentum in one form, and zeros in the other.
    assert all(not one[name].any() for name in set(one) - set(other))


@pytest.mark.parametrize("done", [1, 3])
def test_an_interrupted_stage_goes_on_bit_for_bit(
    done: int, tiny: Tiny, synthetic: Images, context_for: Contexts, reference_kernels: None
) -> None:
    changes = {"later.epochs": 4, "later.warmup_epochs": 2, "masks.settle": 0.5, "masks.target_params": 0.4, "masks.sparsity": 1e6}
    source = synthetic("abcd")
    written: list[tuple[dict[str, torch.Tensor], dict[str, Any]]] = []

    def note(state: DerState) -> None:
        written.append(({name: value.clone() for name, value in state.tensors().items()}, state.facts()))

    context = replace(context_for(tiny(changes), source, save=note), backend=FUSED)
    model, straight = second_step(context)
    stage_of(context, source, straight, model).run()
    model, resumed = second_step(context)
    resumed.restore(*written[done - 1])
    stage_of(context, source, resumed, model).run()
    one, other = written[3][0], written[-1][0]
    assert len(written) == 4 + (4 - done) and one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("done", [1, 2, 3, 5, 8, 10])
def test_a_stage_interrupted_in_the_middle_of_an_epoch_goes_on_bit_for_bit(
    done: int, tiny: Tiny, synthetic: Images, context_for: Contexts, reference_kernels: None
) -> None:
    """Two checkpoints within each of four epochs and one at its end."""
    changes = {"later.epochs": 4, "later.warmup_epochs": 2, "masks.settle": 0.5, "masks.target_params": 0.4, "masks.sparsity": 1e6}
    source = synthetic("abcd")
    written: list[tuple[dict[str, torch.Tensor], dict[str, Any]]] = []

    def note(state: DerState) -> None:
        written.append(({name: value.clone() for name, value in state.tensors().items()}, state.facts()))

    context = replace(context_for(tiny({**changes, "runtime.checkpoint_seconds": 1e-9}), source, save=note), backend=FUSED)
    model, straight = second_step(context)
    stage_of(context, source, straight, model).run()
    places = [facts["position"] and facts["position"]["batches"] for _, facts in written]
    assert places == [1, 2, None] * 4
    model, resumed = second_step(context)
    resumed.restore(*written[done - 1])
    stage_of(context, source, resumed, model).run()
    assert [facts["position"] and facts["position"]["batches"] for _, facts in written[12:]] == places[done:]
    one, other = written[11][0], written[-1][0]
    assert one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())
    assert [record.loss for record in resumed.records] == [record.loss for record in straight.records]


def test_a_checkpoint_of_one_backend_serves_the_other(
    tiny: Tiny, synthetic: Images, context_for: Contexts, reference_kernels: None
) -> None:
    source = synthetic("abcd")
    written: list[tuple[dict[str, torch.Tensor], dict[str, Any]]] = []

    def note(state: DerState) -> None:
        written.append(({name: value.clone() for name, value in state.tensors().items()}, state.facts()))

    context = context_for(tiny({"later.epochs": 3}), source, save=note)
    for first, second in ((context, replace(context, backend=FUSED)), (replace(context, backend=FUSED), context)):
        written.clear()
        model, state = second_step(first)
        stage_of(first, source, state, model).run()
        model, resumed = second_step(second)
        resumed.restore(*written[0])
        stage_of(second, source, resumed, model).run()
        assert [record.loss for record in resumed.records] == pytest.approx([record.loss for record in state.records], rel=1e-4)


class NoQuestions(TorchDispatchMode):
    """Refuses every operation that waits for the device, or whose result's size depends on what it finds."""

    REFUSED = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "unique", "bincount")

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.seen.add(name)
        assert name not in self.REFUSED, f"{name} asks the device for a number"
        # A choice by a mask counts what it chose, below where this looks.
        indices = (
            (args[1] or ()) if name.startswith(("index", "_index_put")) and len(args) > 1 and isinstance(args[1], (list, tuple)) else ()
        )
        assert all(index is None or index.dtype not in (torch.bool, torch.uint8) for index in indices), (
            f"{name} asks the device for a number"
        )
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("settled", [False, True])
def test_a_batch_asks_the_device_for_nothing(
    settled: bool, tiny: Tiny, synthetic: Images, context_for: Contexts, reference_kernels: None
) -> None:
    source = synthetic("abcd", per_class=4)
    context = replace(context_for(tiny({"masks.target_params": 0.4}), source), backend=FUSED)
    model, state = second_step(context)
    stage = stage_of(context, source, state, model)
    loss = DerLoss(context, state, model.network.bank, 2, stage.controller, settled)
    step = BatchStep(context, stage.optimizer, loss, loss.constrain, graphed=True)
    batch = next(iter(source.batches(None, 16, transform=context.test_transform)))
    loss.prepare(0.5, 0)
    step(batch.images, batch.labels)
    with NoQuestions() as mode:
        loss.prepare(0.75, 1)
        step(batch.images, batch.labels)
    assert "_fused_sgd_" in mode.seen and "convolution" in mode.seen
    with pytest.raises(AssertionError, match="asks the device"), NoQuestions():
        float(step.totals[0])
    with pytest.raises(AssertionError, match="asks the device"), NoQuestions():
        batch.images[batch.labels > 0]
    assert step.totals.tolist()[0] > 0


class Steps(Observer):
    """Notes which function trained each batch."""

    def __init__(self) -> None:
        self.stage: RepresentationStage | None = None
        self.seen: list[BatchStep] = []

    def batch_ends(self, *event: Any) -> None:
        assert self.stage is not None and self.stage.step is not None
        self.seen.append(self.stage.step)


@pytest.mark.parametrize(("changes", "made"), [({"masks.settle": 0.5}, 2), ({"masks.settle": 0.0}, 1), ({"masks.enabled": False}, 1)])
def test_a_new_function_is_made_when_the_masks_settle_and_at_no_other_batch(
    changes: dict[str, Any], made: int, tiny: Tiny, synthetic: Images, context_for: Contexts, reference_kernels: None
) -> None:
    source, observer = synthetic("abcd"), Steps()
    context = replace(context_for(tiny({**changes, "later.epochs": 4}), source, observer), backend=FUSED)
    model, state = second_step(context)
    observer.stage = stage_of(context, source, state, model)
    observer.stage.run()
    assert len(observer.seen) == 4 * 3
    assert len(dict.fromkeys(observer.seen)) == made
    assert all(len(set(observer.seen[start : start + 6])) == 1 for start in (0, 6))


def test_what_a_step_function_holds_is_gone_with_it(
    tiny: Tiny, synthetic: Images, context_for: Contexts, reference_kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without waiting for the garbage collector: a graph's memory is all of a step's activations, and the next graph needs as much."""
    source = synthetic("abcd")
    context = replace(context_for(tiny({"masks.settle": 0.5, "later.epochs": 4}), source), backend=FUSED)
    model, state = second_step(context)
    made: list[weakref.ref[GraphedStep]] = []
    original = GraphedStep.__init__

    def noting(self: GraphedStep, *arguments: Any) -> None:
        original(self, *arguments)
        assert all(reference() is None for reference in made)
        made.append(weakref.ref(self))

    monkeypatch.setattr(GraphedStep, "__init__", noting)
    stage = stage_of(context, source, state, model)
    gc.collect()
    gc.disable()
    try:
        stage.run()
        assert len(made) == 2 and made[-1]() is not None
        del stage
        assert made[-1]() is None
    finally:
        gc.enable()


def test_mask_logits_that_are_no_numbers_end_the_run_and_say_where(
    tiny: Tiny, synthetic: Images, context_for: Contexts, reference_kernels: None
) -> None:
    source = synthetic("abcd")
    context = replace(context_for(tiny(), source), backend=FUSED)
    model, state = second_step(context)
    assert state.masks is not None
    state.masks.logits.data[3] = torch.nan
    with pytest.raises(DivergenceError, match=r"the loss became nan in step 2, representation stage, epoch 1.*masks\.lr"):
        stage_of(context, source, state, model).run()


def test_the_backend_decides_about_the_path(tiny: Tiny, synthetic: Images, context_for: Contexts, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[torch.dtype, str]] = []

    def note(extractor: Extractor, dtype: torch.dtype, path: str) -> FusedTraining:
        made.append((dtype, path))
        return FusedTraining(extractor, dtype, path=path, backend="reference")

    monkeypatch.setattr(batch_step, "FusedTraining", note)
    source = synthetic("abcd")
    for measured, precision in ((True, "fp32"), (False, "bf16")):
        context = replace(
            context_for(tiny({"runtime.precision": precision}), source), backend=Backend("fused", "a test asks for it", measured)
        )
        model, state = second_step(context)
        stage = stage_of(context, source, state, model)
        DerLoss(context, state, model.network.bank, 2, stage.controller, settled=False)
    assert made == [(torch.float32, "auto"), (torch.bfloat16, "chain")]


def test_a_run_says_once_which_backend_it_takes_and_why(
    tiny: Tiny, synthetic: Images, reference_kernels: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = tiny({"protocol.name": "B0-2", "runtime.backend": "fused", "later.epochs": 1, "first.epochs": 1, "classifier.epochs": 1})
    monkeypatch.setattr(triton_runtime, "usable", lambda device: (True, "Triton for a test"))
    for run, reason in (
        (config, "asked for: Triton for a test"),
        (replace_keys(config, {"runtime.backend": "auto"}), "auto: no CUDA device"),
    ):
        said: list[str] = []
        observer = Observer()
        monkeypatch.setattr(observer, "message", said.append)
        learner = run_protocol(run, synthetic("abcd"), synthetic("abcd", 2, seed=1), tmp_path / run.runtime.backend, observer=observer)
        assert [text for text in said if text.startswith("backend ")] == [
            f"backend {learner.backend.name} ({learner.backend.reason}), device cpu"
        ]
        assert learner.backend.reason.startswith(reason)
        assert learner.metrics()["backend"] == f"{learner.backend.name} ({learner.backend.reason})"


def test_fused_falls_back_where_it_cannot_run(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(triton_runtime, "usable", lambda device: (False, "Triton is not installed"))
    assert Learner(tiny({"runtime.backend": "fused"})).backend == Backend("reference", "fused was asked for, but Triton is not installed")
    assert "the reference is used instead: Triton is not installed" in caplog.text
