"""Every way in which the compact extractor can run is compared with the masked network; rounding is told from a fault."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from der_fast.compaction import pack, plan
from der_fast.compaction.bank import lanes, onednn, strategies
from der_fast.compaction.bank.extractor import CompactExtractor
from der_fast.config.schema import Config
from der_fast.data import MemorySource
from der_fast.errors import DerFastError
from der_fast.model.architecture import build_architecture
from der_fast.model.extractor import Extractor
from der_fast.model.layout import MaskLayout
from der_fast.training import equality, packing
from der_fast.training.context import Context
from der_fast.training.equality import checked_error, relative_error
from der_fast.training.learner import Learner
from der_fast.training.state import StepState

Tiny = Callable[..., Config]
Images = Callable[..., MemorySource]
Contexts = Callable[..., Context]


def has(strategy: str) -> bool:
    return strategy == "plain" or (onednn.available(torch.float32) if strategy == "fused" else lanes.available()[0])


def broken(monkeypatch: pytest.MonkeyPatch, strategy: str, factor: float) -> None:
    """Let one strategy return something else."""
    if strategy == "lanes":
        run = lanes.run
        monkeypatch.setattr(lanes, "run", lambda programs, images, threads: run(programs, images, threads) * factor)
        return
    own = strategies.Runnable.run

    def other(self: strategies.Runnable, name: str, images: torch.Tensor) -> torch.Tensor:
        return own(self, name, images) * (factor if name == strategy else 1.0)

    monkeypatch.setattr(strategies.Runnable, "run", other)


@pytest.mark.parametrize("factor", [1 + 1e-3, 1.5, float("nan")])
@pytest.mark.parametrize("strategy", ["plain", "fused", "lanes"])
def test_a_strategy_that_computes_something_else_stops_the_run(
    strategy: str, factor: float, tiny: Tiny, synthetic: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has(strategy):
        pytest.skip(f"this processor does not run {strategy!r}")
    learner = Learner(tiny())
    broken(monkeypatch, strategy, factor)
    with pytest.raises(DerFastError, match=f"(when run as '{strategy}'|in double precision) by .* bug in der_fast"):
        learner.learn(synthetic("ab"))
    assert learner.class_names == ()


def test_a_wrong_cut_stops_the_run(tiny: Tiny, synthetic: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same wrong weights in every precision."""

    def wrong(*arguments: Any, **settings: Any) -> Any:
        arena = pack(*arguments, **settings)
        next(iter(arena.tensors().values())).mul_(1.01)
        return arena

    monkeypatch.setattr(packing, "pack", wrong)
    monkeypatch.setattr(equality, "pack", wrong)
    with pytest.raises(DerFastError, match="in double precision by .* bug in der_fast"):
        Learner(tiny()).learn(synthetic("ab"))


def ill_conditioned(seed: int) -> tuple[Extractor, torch.Tensor]:
    """An extractor that takes the difference of two large equal numbers, and images for it."""
    noise = torch.Generator().manual_seed(seed)
    dense = Extractor(build_architecture("resnet20", width=4)).initialise(noise).eval()
    with torch.no_grad():
        # The stream's second channel is three times its first; the first convolution subtracts a third of it.
        dense.stem.weight[1] = dense.stem.weight[0]
        dense.norm.weight[1] = 3 * dense.norm.weight[0]
        large = 1e4 * torch.randn(4, 3, 3, generator=noise)
        dense.blocks[0].convs[0].weight[:, 0] = large
        dense.blocks[0].convs[0].weight[:, 1] = -large / 3
    return dense, torch.randn(8, 3, 8, 8, generator=noise)


def state_of(context_for: Contexts, config: Config, source: MemorySource, dense: Extractor) -> tuple[Context, StepState]:
    context = context_for(config, source)
    state = StepState(1, {"extractor": dense, "head": torch.nn.Linear(1, 2)})
    return context, state


@pytest.mark.parametrize("seed", range(3))
def test_rounding_in_an_ill_conditioned_extractor_is_no_fault(
    seed: int, tiny: Tiny, synthetic: Images, watcher: Any, context_for: Contexts, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, images = ill_conditioned(seed)
    context, state = state_of(context_for, tiny(), synthetic("ab"), dense)
    context = replace(context, observer=watcher)
    layout = MaskLayout(dense.architecture)
    keep = torch.rand(layout.channels, generator=torch.Generator().manual_seed(seed)) < 0.8
    layout.by_group(keep)["stage1"][:2] = True
    decision = plan(layout, keep)
    finished = CompactExtractor(pack(dense, decision))
    error = checked_error(context, state, keep, finished, decision, images)
    assert error > 1e-5, "the extractor is not ill-conditioned: the test shows nothing"
    (note,) = state.notes
    assert "ill-conditioned" in note and note in watcher.messages
    broken(monkeypatch, "plain", 1.5)
    with pytest.raises(DerFastError, match="bug in der_fast"):
        checked_error(context, state, keep, finished, decision, images)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_keeps_the_weights_in_the_precision_of_the_run(
    dtype: torch.dtype, tiny: Tiny, synthetic: Images, context_for: Contexts
) -> None:
    config = tiny({"runtime.precision": "bf16" if dtype == torch.bfloat16 else "fp32"})
    dense = Extractor(build_architecture("resnet20", width=4)).initialise(torch.Generator().manual_seed(0)).eval()
    layout = MaskLayout(dense.architecture)
    decision = plan(layout, torch.rand(layout.channels, generator=torch.Generator().manual_seed(0)) < 0.7)
    exact = pack(dense, decision)
    context = context_for(config, synthetic("ab"))
    assert packing._final_arena(context, dense, decision, exact) is exact
    there = packing._final_arena(replace(context, device=torch.device("cuda")), dense, decision, exact)
    assert there.dtype == dtype
    assert (there is exact) == (dtype == torch.float32)
    if dtype == torch.bfloat16:
        assert all(width % 8 == 0 for width in there.stored.values())
        assert there.parameters == exact.parameters
        begin, views = there.storage.data_ptr(), CompactExtractor(there, dtype).runnable.tensors
        weights = [tensor.data_ptr() for name, tensor in views.items() if name.endswith(".weight")]
        assert weights and all(begin <= place < begin + there.nbytes for place in weights)


def test_relative_error() -> None:
    truth = torch.tensor([[2.0, -4.0]])
    assert relative_error(truth + 1e-3, truth) == pytest.approx(2.5e-4, rel=1e-3)
    assert relative_error(torch.full((1, 2), torch.nan), truth) == float("inf")
    assert relative_error(truth, torch.full((1, 2), torch.nan)) == float("inf")
    assert relative_error(torch.zeros(3, 0), torch.zeros(3, 0)) == 0.0
