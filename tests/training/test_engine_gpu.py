"""On a GPU: a replayed CUDA graph trains as its launches one by one do, and nothing waits for the device within an epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from der_fast.compaction.bank import FrozenBank
from der_fast.config.schema import Config
from der_fast.data import MemorySource
from der_fast.kernels.backend import Backend
from der_fast.model.architecture import build_architecture
from der_fast.model.extractor import Extractor
from der_fast.training import graphed
from der_fast.training.batch_step import BatchStep
from der_fast.training.classifier_stage import classifier_stage
from der_fast.training.context import Context
from der_fast.training.feed import ResidentFeed
from der_fast.training.graphed import WARM_UP
from der_fast.training.methods.der.method import begin_step
from der_fast.training.methods.der.representation import RepresentationStage
from der_fast.training.methods.der.state import DerState
from der_fast.training.model import Model, Network
from der_fast.training.progress import Observer
from der_fast.training.stage import Stage
from der_fast.training.state import CLASSIFIER, StepState

Tiny = Callable[..., Config]
Images = Callable[..., MemorySource]
Contexts = Callable[..., Context]

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

# Nine batches an epoch, of which the last is odd; the learning rate changes twice, and the masks settle in the last two epochs.
CHANGES: dict[str, Any] = {
    "later.epochs": 5, "later.batch_size": 16, "later.milestones": [1, 4], "later.warmup_epochs": 1, "masks.settle": 0.4,
    "masks.target_params": 0.5,
}  # fmt: skip


class Watching(Observer):
    def __init__(self) -> None:
        self.stage: Stage | None = None
        self.captured: list[int] = []
        self.messages: list[str] = []

    def batch_ends(self, *event: Any) -> None:
        assert self.stage is not None and self.stage.step is not None
        graphed = self.stage.step._graphed
        self.captured.append(0 if graphed is None else graphed.captured)

    def message(self, text: str) -> None:
        self.messages.append(text)


@pytest.fixture(autouse=True)
def _repeatable() -> Iterator[None]:
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, benchmark=False, allow_tf32=False):
        yield


def trained(context: Context, source: MemorySource, backbone: str = "resnet18") -> tuple[DerState, Watching]:
    """The second step's representation stage on the GPU."""
    watching = Watching()
    context = replace(context, device=torch.device("cuda"), observer=watching, backend=Backend("fused", "a test asks for it"))
    architecture = build_architecture(backbone, width=8)
    old = Extractor(architecture).initialise(torch.Generator().manual_seed(1))
    dense = {name: value.clone() for name, value in old.state_dict().items()}
    model = Model(Network(architecture, FrozenBank([old]).to("cuda"), dense=dense), class_sets=[("a", "b")])
    state = begin_step(context, model, 2)
    watching.stage = RepresentationStage(context, state, model.network.bank, source, 2, context.config.later)
    watching.stage.run()
    return state, watching


def same(one: DerState, other: DerState) -> None:
    tensors = one.tensors()
    assert tensors.keys() == other.tensors().keys()
    for name, value in other.tensors().items():
        assert torch.equal(tensors[name], value), name
    assert [record.loss for record in one.records] == [record.loss for record in other.records]


@pytest.mark.parametrize("backbone", ["resnet18", "resnet20", "preact_resnet18"])
@pytest.mark.parametrize(("precision", "warm_up"), [("fp32", WARM_UP), ("bf16", WARM_UP), ("bf16", 1)])
def test_replays_do_what_launches_do(
    backbone: str, precision: str, warm_up: int, tiny: Tiny, synthetic: Images, context_for: Contexts, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = synthetic("abcd", per_class=34, side=32)
    context = context_for(tiny({**CHANGES, "runtime.precision": precision}), source)
    monkeypatch.setattr(graphed, "WARM_UP", warm_up)
    state, watching = trained(context, source, backbone)
    # Eight full batches and an odd one per epoch; new graphs where the compact network begins, after three epochs.
    full = [number % 9 != 8 for number in range(45)]
    counted, expected = {True: 0, False: 0}, []
    for number in range(45):
        counted = {True: 0, False: 0} if number == 27 else counted
        counted[full[number]] += 1
        expected.append(sum(count > warm_up for count in counted.values()))
    assert watching.captured == expected and watching.messages == []
    monkeypatch.setattr(graphed, "WARM_UP", 10**9)
    eager, watching = trained(context, source, backbone)
    assert not any(watching.captured)
    same(state, eager)


def test_where_no_graph_can_be_captured_training_goes_on_with_one_line(
    tiny: Tiny, synthetic: Images, context_for: Contexts, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = synthetic("abcd", per_class=34, side=32)
    context = context_for(tiny({**CHANGES, "masks.settle": 0.0}), source)
    state, _ = trained(context, source)
    original = BatchStep.body

    # A real refusal by the driver would leave marks on the process and on the tests behind this one.
    def refusing(self: BatchStep, *tensors: torch.Tensor) -> None:
        original(self, *tensors)
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("no graphs today")

    monkeypatch.setattr(BatchStep, "body", refusing)
    eager, watching = trained(context, source)
    assert len(watching.messages) == 1 and "no CUDA graph could be captured: no graphs today" in watching.messages[0]
    assert not any(watching.captured)
    same(state, eager)


def test_nothing_waits_for_the_device_within_an_epoch(
    tiny: Tiny, synthetic: Images, context_for: Contexts, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = synthetic("abcd", per_class=34, side=32)
    context = context_for(tiny(CHANGES), source)
    original = BatchStep.__call__
    calls: list[tuple[int, int]] = []

    def watched(self: BatchStep, *tensors: torch.Tensor) -> None:
        calls.append((id(self), len(tensors[0])))
        # Ways are chosen, kernels compiled and the graph captured in the first batches of a shape.
        strict = calls.count(calls[-1]) > WARM_UP + 1
        torch.cuda.set_sync_debug_mode("error" if strict else "default")
        try:
            original(self, *tensors)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(BatchStep, "__call__", watched)
    trained(context, source)
    assert len(calls) == 45


def test_one_step_is_a_handful_of_launches_from_the_host(tiny: Tiny, synthetic: Images, context_for: Contexts) -> None:
    source = synthetic("abcd", per_class=34, side=32)
    context = context_for(tiny({**CHANGES, "masks.settle": 0.0}), source)
    _, watching = trained(context, source)
    assert watching.stage is not None and watching.stage.step is not None
    step = watching.stage.step
    assert isinstance(watching.stage.feed, ResidentFeed)
    positions = torch.arange(16, device="cuda")
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        watching.stage.before_batch(1)
        step(positions)
    names = [event.key for event in profile.key_averages() if event.key.startswith("cuda")]
    assert "cudaGraphLaunch" in names
    launches = sum(
        event.count for event in profile.key_averages() if event.key in ("cudaLaunchKernel", "cudaMemcpyAsync", "cuLaunchKernel")
    )
    assert launches <= 6


@pytest.mark.parametrize("views", [0, 2])
def test_the_classifier_stage_replays_what_it_launches(
    views: int, tiny: Tiny, synthetic: Images, context_for: Contexts, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = synthetic("abcd", per_class=34, side=32)
    keys = {"classifier.epochs": 6, "classifier.batch_size": 16, "classifier.views": views}
    watching = Watching()
    context = replace(context_for(tiny(keys), source), device=torch.device("cuda"), observer=watching, backend=Backend("fused", "a test"))
    architecture = build_architecture("resnet18", width=8)
    bank = FrozenBank([Extractor(architecture).initialise(torch.Generator().manual_seed(seed)) for seed in (1, 2)]).to("cuda")

    def head() -> torch.Tensor:
        state = StepState(2, {"head": torch.nn.Linear(bank.features, 4, device="cuda")}, stage=CLASSIFIER, stages=1)
        watching.stage = classifier_stage(context, state, bank, source)
        watching.stage.run()
        return state.head.weight.detach()

    replayed = head()
    assert watching.captured[-1] == 2
    monkeypatch.setattr(graphed, "WARM_UP", 10**9)
    assert torch.equal(head(), replayed) and watching.captured[-1] == 0
    assert watching.messages == []


def test_kept_features_train_what_the_bank_in_every_batch_trains(tiny: Tiny, synthetic: Images, context_for: Contexts) -> None:
    source = synthetic("abcd", per_class=34, side=32)
    states = [trained(context_for(tiny({**CHANGES, "later.views": 2, "runtime.features_gib": gib}), source))[0] for gib in (1.0, 0.0)]
    same(*states)
