"""The settled epochs on the compact network do what they would have done on the masked one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from der_fast.compaction import plan
from der_fast.compaction.bank import FrozenBank
from der_fast.compaction.slices import gather, scatter, tensor_groups
from der_fast.config.schema import Config, ScheduleConfig
from der_fast.data import MemorySource
from der_fast.model.architecture import BACKBONES, build_architecture
from der_fast.model.extractor import Extractor
from der_fast.model.layout import MaskLayout
from der_fast.training.context import Context
from der_fast.training.methods.der.loss import DerLoss
from der_fast.training.methods.der.method import begin_step
from der_fast.training.methods.der.pruning import final_keep
from der_fast.training.methods.der.representation import RepresentationStage
from der_fast.training.methods.der.settled import Remainder
from der_fast.training.methods.der.state import DerState
from der_fast.training.model import Model, Network
from der_fast.training.packing import schedule_of

Tiny = Callable[..., Config]
Images = Callable[..., MemorySource]
Contexts = Callable[..., Context]


def run_stage(context: Context, source: MemorySource, backbone: str, monkeypatch: pytest.MonkeyPatch) -> tuple[DerState, list[float]]:
    """Train the second step of a tiny network to its last epoch; return its state and the loss of every batch."""
    architecture = build_architecture(backbone, width=4)
    old = Extractor(architecture).initialise(torch.Generator().manual_seed(1))
    model = Model(
        Network(architecture, FrozenBank([old]), dense={n: v.clone() for n, v in old.state_dict().items()}), class_sets=[("a", "b")]
    )
    state = begin_step(context, model, 2)
    # In double precision rounding cannot be mistaken for a fault, however chaotic a tiny deep network is.
    for module in (model.network.bank, *state.modules().values()):
        module.double()
    losses: list[float] = []
    step = DerLoss.__call__

    def noting(self: DerLoss, *arguments: Any) -> Any:
        loss, logits = step(self, *arguments)
        losses.append(float(loss.detach()))
        return loss, logits

    with monkeypatch.context() as patch:
        patch.setattr(DerLoss, "__call__", noting)
        patch.setattr(Context, "features", lambda self, extractor, images, *masks: extractor(images.double(), *masks))
        RepresentationStage(context, state, model.network.bank, source, 2, schedule_of(context, 2)).run()
    return state, losses


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("backbone", ["resnet20", "resnet18", "preact_resnet18", "resnet50"])
def test_the_compact_network_goes_on_where_the_masked_one_was(
    backbone: str, momentum: float, tiny: Tiny, synthetic: Images, context_for: Contexts, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = synthetic("abcd", per_class=8)
    changes = {"later.momentum": momentum, "later.weight_decay": 0.05, "later.lr": 0.01, "later.epochs": 4, "masks.sparsity": 0.0}
    context = context_for(tiny(changes), source)
    state, losses = run_stage(context, source, backbone, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(DerState, "compact", lambda self, keep: False)
        masked, expected = run_stage(context, source, backbone, monkeypatch)
    assert state.remainder is not None and masked.remainder is None
    assert state.masks is not None and masked.masks is not None
    keep = final_keep(state.masks, context.config.masks)
    assert torch.equal(keep, final_keep(masked.masks, context.config.masks)) and 0 < keep.sum() < len(keep)
    assert sum(p.numel() for p in state.extractor.parameters()) < sum(p.numel() for p in masked.extractor.parameters())
    assert len(losses) == len(expected) == 4 * 4
    assert losses == pytest.approx(expected, rel=1e-7)

    names = set(masked.momentum)
    state.expand()
    assert state.momentum == {} and state.remainder is None
    kept = plan(MaskLayout(masked.extractor.architecture), keep)
    found, wanted = state.extractor.state_dict(), masked.extractor.state_dict()
    # The statistics of what was cut away are not updated any more: they are re-estimated when the step ends.
    parameters = [name for name in wanted if not name.endswith(("running_mean", "running_var"))]
    pairs = [(found[name], wanted[name]) for name in parameters]
    pairs += list(zip(gather(kept.selection, found).values(), gather(kept.selection, wanted).values(), strict=True))
    pairs.append((state.head.weight, masked.head.weight[:, _columns(kept, masked)]))
    assert all(torch.allclose(one, other, rtol=1e-6, atol=1e-9) for one, other in pairs)
    assert momentum == 0 or names >= {f"extractor.{name}" for name in parameters}


def _columns(kept: Any, masked: DerState) -> torch.Tensor:
    old = masked.head.in_features - len(kept.features)
    return torch.cat([torch.ones(old, dtype=torch.bool), kept.features])


def test_the_first_batch_after_settling_has_the_loss_of_the_masked_network(
    tiny: Tiny, synthetic: Images, context_for: Contexts, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = synthetic("abcd", per_class=8)
    context = context_for(tiny({"masks.sparsity": 0.0}), source)
    _, losses = run_stage(context, source, "resnet20", monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(DerState, "compact", lambda self, keep: False)
        _, expected = run_stage(context, source, "resnet20", monkeypatch)
    assert losses[:4] == expected[:4]
    assert losses[4] == pytest.approx(expected[4], rel=1e-9)


def test_a_network_of_which_nothing_is_left_is_not_compacted(tiny: Tiny, synthetic: Images, context_for: Contexts) -> None:
    context = context_for(tiny(), synthetic("ab"))
    state = begin_step(context, Model(Network(build_architecture("resnet20", width=2))), 2)
    before = state.extractor
    assert not state.compact(torch.zeros(MaskLayout(before.architecture).channels, dtype=torch.bool))
    assert state.extractor is before and state.remainder is None and state.head.in_features == before.features


@given(
    momentum=st.sampled_from([0.0, 0.5, 0.9]), decay=st.sampled_from([0.0, 5e-4, 0.1]), updates=st.integers(0, 40), lr=st.floats(1e-4, 0.2)
)
def test_what_was_cut_away_decays_as_sgd_would_let_it(momentum: float, decay: float, updates: int, lr: float) -> None:
    generator = torch.Generator().manual_seed(updates)
    weight, mean = torch.randn(5, generator=generator).double(), torch.randn(5, generator=generator).double()
    buffer = torch.randn(5, generator=generator).double() if momentum else None
    parameter = torch.nn.Parameter(weight.clone())
    sgd = torch.optim.SGD([parameter], lr=lr, momentum=momentum, weight_decay=decay)
    if buffer is not None:
        sgd.state[parameter]["momentum_buffer"] = buffer.clone()
    for _ in range(updates):
        parameter.grad = torch.zeros_like(parameter)
        sgd.step()
    architecture = build_architecture("resnet20", width=2)
    layout = MaskLayout(architecture)
    buffers = {} if buffer is None else {"stem.weight": buffer}
    nothing = plan(layout, torch.ones(layout.channels, dtype=torch.bool))
    remainder = Remainder(nothing, {"stem.weight": weight, "norm.running_mean": mean}, buffers)
    remainder.decay(ScheduleConfig(momentum=momentum, weight_decay=decay), lr, updates)
    assert torch.allclose(remainder.tensors["stem.weight"], parameter.detach(), rtol=1e-9, atol=1e-12)
    assert torch.equal(remainder.tensors["norm.running_mean"], mean)
    if buffer is not None:
        assert torch.allclose(remainder.momentum["stem.weight"], sgd.state[parameter]["momentum_buffer"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_taking_out_and_putting_back_changes_what_was_kept_and_nothing_else(backbone: str, share: float) -> None:
    architecture = build_architecture(backbone, width=3)
    layout = MaskLayout(architecture)
    generator = torch.Generator().manual_seed(5)
    keep = torch.rand(layout.channels, generator=generator) < share
    for name in layout.stream_groups():
        layout.by_group(keep)[name][0] = True
    decision = plan(layout, keep)
    tensors = Extractor(architecture).initialise(generator).state_dict()
    assert set(tensor_groups(architecture)) == set(tensors)
    before = {name: value.clone() for name, value in tensors.items()}
    parts = gather(decision.selection, tensors)
    assert all(torch.equal(tensors[name], value) for name, value in before.items())
    compact = Extractor(architecture, decision.widths).state_dict()
    assert {name: value.shape for name, value in parts.items()} == {name: value.shape for name, value in compact.items()}
    assert all(
        part.untyped_storage().data_ptr() != tensors[name].untyped_storage().data_ptr() for name, part in parts.items() if part.numel()
    )
    scatter(decision.selection, {name: torch.full_like(part, 7.0) for name, part in parts.items()}, tensors)
    for name, value in tensors.items():
        assert int((value == 7.0).sum()) == parts[name].numel()
        untouched = value != 7.0
        assert torch.equal(value[untouched], before[name][untouched])
    scatter(decision.selection, parts, tensors)
    assert all(torch.equal(tensors[name], value) for name, value in before.items())
