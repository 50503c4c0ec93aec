"""Dead channels, with which the settled network's widths are padded, are exact zeros and change nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from der_fast.config.schema import Config, ScheduleConfig
from der_fast.data import MemorySource
from der_fast.model.architecture import Architecture, Block, Conv, build_architecture
from der_fast.model.classifier import new_classifier
from der_fast.model.extractor import Extractor
from der_fast.model.fused_training import FusedTraining
from der_fast.model.layout import MaskLayout
from der_fast.model.paths import CHAIN, CUDNN
from der_fast.training.methods.der import settled
from der_fast.training.methods.der.settled import narrowed, settled_padding, widened
from der_fast.training.methods.der.state import DerState
from der_fast.training.optimizer import NamedSGD
from der_fast.training.progress import Observer
from der_fast.training.run import run_protocol
from der_fast.training.storage.checkpoint import Checkpoints
from der_fast.training.storage.named_files import load_record

Tiny = Callable[..., Config]
Images = Callable[..., MemorySource]
Facts = Callable[[Path], dict[str, Any]]
Forward = Callable[[Extractor], Callable[[Tensor], Tensor]]

OLD = 3
SCHEDULE = ScheduleConfig(lr=0.05, momentum=0.9, weight_decay=0.01)
# What a batch leaves: new features, loss, and by name gradients, weights, statistics and momentum.
Trace = list[dict[str, Tensor]]


def seeded(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def pad_to(multiple: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settled, "settled_padding", lambda device: multiple)


def odd_keep(architecture: Architecture) -> Tensor:
    """Odd numbers of every group's channels, not its first ones; one inner group keeps nothing, and one keeps a single channel."""
    layout = MaskLayout(architecture)
    keep = torch.zeros(layout.channels, dtype=torch.bool)
    parts = layout.by_group(keep)
    for number, name in enumerate(layout.names):
        width = len(parts[name])
        count = max(width - 1 - 2 * (number % 2), 1) // 2 * 2 + 1
        parts[name][torch.randperm(width, generator=seeded(number))[: min(count, width)]] = True
    inner = [name for name in layout.names if name not in layout.stream_groups()]
    parts[inner[-1]][:] = False
    parts[inner[0]][:] = False
    parts[inner[0]][1] = True
    return keep


def settled_state(architecture: Architecture, multiple: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> DerState:
    """A step whose masks have just settled, with momentum."""
    extractor = Extractor(architecture).initialise(seeded(0))
    state = DerState(2, {"extractor": extractor})
    state.parts["head"] = new_classifier(OLD + extractor.features, 5, seeded(1))
    state.parts["auxiliary"] = new_classifier(extractor.features, 3, seeded(2))
    for part, module in state.modules().items():
        for name, parameter in module.to(dtype).named_parameters():
            state.momentum[f"{part}.{name}"] = 0.01 * torch.randn(parameter.shape, generator=seeded(3), dtype=dtype)
            if "norm" in name:
                parameter.data += 0.3 * torch.rand(parameter.shape, generator=seeded(4), dtype=dtype)
    pad_to(multiple, monkeypatch)
    assert state.compact(odd_keep(architecture))
    return state


def plainly(extractor: Extractor) -> Callable[[Tensor], Tensor]:
    return extractor


def chained(extractor: Extractor) -> Callable[[Tensor], Tensor]:
    return FusedTraining(extractor, extractor.stem.weight.dtype, path=CHAIN, backend="reference")


def on_kernels(path: str) -> Forward:
    return lambda extractor: FusedTraining(extractor, torch.float32, path=path)


def check_dead(state: DerState, named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the live part of tensors named like momentum; the rest must be zero."""
    assert state.remainder is not None
    padding = state.remainder.padding
    if padding is None:
        return named
    parts, live = narrowed(state.parts, named, padding)
    again, wide = widened(parts, live, padding)
    assert all(torch.equal(wide[name], value) for name, value in named.items())
    for part, module in state.modules().items():
        assert all(torch.equal(again[part].state_dict()[name], value) for name, value in module.state_dict().items())
    return live


def train(state: DerState, forward: Forward, shape: Sequence[int], batches: int) -> Trace:
    """Train some batches; whatever belongs to a dead channel must be zero after each."""
    sgd = NamedSGD(state.modules(), SCHEDULE)
    sgd.restore(state.momentum)
    dtype = state.head.weight.dtype
    run = forward(state.extractor.train())
    trace = []
    for number in range(batches):
        draws = seeded(10 + number)
        images, old = (torch.randn(*size, generator=draws, dtype=dtype) for size in (shape, (shape[0], OLD)))
        labels = torch.randint(5, (shape[0],), generator=draws)
        new = run(images)
        assert state.auxiliary is not None and state.remainder is not None
        loss = F.cross_entropy(state.head(torch.cat([old, new], 1)), labels)
        loss = loss + F.cross_entropy(state.auxiliary(new), labels.clamp(max=2))
        sgd.step(loss)
        gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in sgd.parameters.items()}
        state.momentum = sgd.momentum()
        live, padding = new.detach(), state.remainder.padding
        if padding is not None:
            rows = padding.rows(padding.architecture.features)
            live = live[:, rows]
            assert torch.equal(torch.zeros_like(new).index_copy(1, rows, live), new)
        check_dead(state, state.momentum)
        found = {f"gradient of {name}": value.clone() for name, value in check_dead(state, gradients).items()}
        trace.append({"features": live, "loss": loss.detach(), **found, **{n: v.clone() for n, v in state.tensors().items()}})
    return trace


def check_traces(found: Trace, wanted: Trace, bound: float) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert value.shape == other[name].shape, name
            if value.numel():
                error = (value.double() - other[name].double()).abs().max()
                assert float(error) <= bound * float(other[name].double().abs().max()), name


def few_channels() -> Architecture:
    """Every kind of join once: an identity, zero channels behind, a strided projection; a block that loses its branch, and pooling."""
    groups = {"stream": 4, "more": 4, "last": 6, "a": 4, "b": 10, "c": 6, "d": 2}
    blocks = (
        Block("identity", (Conv("conv1", ("stream",), ("a",), 1), Conv("conv2", ("a",), ("stream",), 3))),
        Block("widened", (Conv("conv1", ("stream",), ("b",), 1, 2), Conv("conv2", ("b",), ("stream", "more"), 1))),
        Block(
            "projection",
            (Conv("conv1", ("stream", "more"), ("c",), 3, 2), Conv("conv2", ("c",), ("last",), 3)),
            Conv("shortcut", ("stream", "more"), ("last",), 1, 2),
        ),
        Block("lost", (Conv("conv1", ("last",), ("d",), 3), Conv("conv2", ("d",), ("last",), 3))),
    )
    return Architecture("few", groups, Conv("stem", (), ("stream",), 3), True, blocks)


NETWORKS = {
    **{backbone: build_architecture(backbone, width=10) for backbone in ("resnet20", "resnet18", "preact_resnet18")},
    "few": few_channels(),
}


@pytest.mark.parametrize("forward", [plainly, chained])
@pytest.mark.parametrize("network", NETWORKS)
def test_training_with_dead_channels_is_training_without(network: str, forward: Forward, monkeypatch: pytest.MonkeyPatch) -> None:
    padded, plain = (settled_state(NETWORKS[network], multiple, torch.float64, monkeypatch) for multiple in (8, 1))
    assert all(width % 8 == 0 for width in padded.extractor.widths.values())
    kept = plain.extractor.widths.values()
    assert {0, 1} <= {*kept} and all(width % 2 for width in kept if width)
    shape = (16, 3, 12, 12)
    check_traces(train(padded, forward, shape, 4), train(plain, forward, shape, 4), 1e-12)
    assert padded.facts() == plain.facts()
    for state in (padded, plain):
        state.expand()
    assert padded.extractor.widths == plain.extractor.widths == NETWORKS[network].groups
    check_traces([padded.tensors()], [plain.tensors()], 1e-12)


@pytest.mark.parametrize("path", [CHAIN, CUDNN])
def test_the_kernels_keep_dead_channels_at_zero(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    padded, plain = (settled_state(few_channels(), multiple, torch.float32, monkeypatch) for multiple in (8, 1))
    found, wanted = (train(state, on_kernels(path), (3, 3, 10, 9), 2) for state in (padded, plain))
    check_traces(found, wanted, 256 * torch.finfo(torch.float32).eps)


def test_widths_are_padded_on_a_gpu_only() -> None:
    assert settled_padding(torch.device("cuda", 1)) == 8
    assert settled_padding(torch.device("cpu")) == 1


# Settled after two of four epochs; the classifiers start again an epoch later, when the small network is trained already.
KEYS: dict[str, Any] = {
    "protocol.name": "B0-2", "model.width": 6, "masks.target_params": 0.3, "first.epochs": 4, "later.epochs": 4,
    "first.warmup_epochs": 3, "later.warmup_epochs": 3, "runtime.keep_checkpoints": 100,
}  # fmt: skip


class Stop(Exception):
    pass


class StopIn(Observer):
    """Stops the run in the second batch of one of the representation stage's epochs."""

    def __init__(self, step: int, epoch: int) -> None:
        self.point = (step, "representation", epoch, 2)

    def batch_ends(self, step: int, stage: str, epoch: int, epochs: int, batch: int, batches: int, images: int) -> None:
        if (step, stage, epoch, batch) == self.point:
            raise Stop


def run(out: Path, tiny: Tiny, synthetic: Images, changes: dict[str, Any] | None = None, **rest: Any) -> None:
    run_protocol(tiny({**KEYS, **(changes or {})}), synthetic("abcd"), synthetic("abcd", 2, seed=1), out, **rest)


@pytest.fixture(scope="module")
def straight(tiny: Tiny, synthetic: Images, run_facts: Facts, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """What runs without and with dead channels leave."""
    facts = {}
    for multiple in (1, 8):
        with pytest.MonkeyPatch.context() as patch:
            pad_to(multiple, patch)
            out = tmp_path_factory.mktemp(f"padded to {multiple}") / "run"
            run(out, tiny, synthetic)
            facts[multiple] = run_facts(out)
    return facts


def check_alike(facts: dict[str, Any], others: dict[str, Any]) -> None:
    """Only rounding may differ: then the error of compaction and losses do, but nothing that counts channels or images."""
    assert facts["files"].keys() != others["files"].keys(), "the same bits: nothing was padded"
    assert len(facts["files"]) == len(others["files"])
    assert facts["metrics"].keys() == others["metrics"].keys()
    assert all(value == others["metrics"][name] for name, value in facts["metrics"].items() if name != "compaction_error")
    assert max(facts["metrics"]["compaction_error"]) < 1e-5
    assert len(facts["history"]) == len(others["history"])
    for one, other in zip(facts["history"], others["history"], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert {**one, "loss": None} == {**other, "loss": None}


def test_a_run_ends_with_the_same_network(straight: dict[int, dict[str, Any]]) -> None:
    check_alike(straight[8], straight[1])


def stopped(out: Path, epoch: int, tiny: Tiny, synthetic: Images, seconds: float = 0.0) -> Path:
    with pytest.raises(Stop):
        run(out, tiny, synthetic, {"runtime.checkpoint_seconds": seconds}, observer=StopIn(2, epoch))
    return out


@pytest.mark.parametrize(("epoch", "seconds"), [(3, 0.0), (4, 0.0), (4, 1e-9)])
def test_a_stopped_run_goes_on_bit_by_bit(
    epoch: int, seconds: float, straight: Any, tiny: Tiny, synthetic: Images, run_facts: Facts, tmp_path: Path, monkeypatch: Any
) -> None:
    pad_to(8, monkeypatch)
    out = stopped(tmp_path / "run", epoch, tiny, synthetic, seconds)
    run(out, tiny, synthetic, resume=True)
    assert run_facts(out) == straight[8]


@pytest.mark.parametrize(("before", "after"), [(8, 1), (1, 8)])
def test_a_run_goes_on_where_widths_are_padded_otherwise(
    before: int, after: int, straight: Any, tiny: Tiny, synthetic: Images, run_facts: Facts, tmp_path: Path, monkeypatch: Any
) -> None:
    pad_to(before, monkeypatch)
    out = stopped(tmp_path / "run", 4, tiny, synthetic)
    tensors, facts = load_record(Checkpoints(out, 2).stems()[-1])
    assert facts["epoch"] == 3
    # The stream's three groups come first in the mask vector.
    stem = tensors["keep"][:6].sum()
    assert len(tensors["extractor.stem.weight"]) == len(tensors["momentum.extractor.stem.weight"]) == stem
    features = int(tensors["auxiliary.weight"].shape[1])
    assert features == tensors["keep"][:24].sum() and features % 8
    pad_to(after, monkeypatch)
    run(out, tiny, synthetic, resume=True)
    check_alike(run_facts(out), straight[before])
