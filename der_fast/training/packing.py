"""From a trained extractor to the compact one that the model keeps."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from der_fast.compaction import Arena, CompactionPlan, pack, plan
from der_fast.compaction.bank import FrozenBank
from der_fast.compaction.bank.extractor import CompactExtractor
from der_fast.config.schema import ScheduleConfig
from der_fast.data.source import ImageSource
from der_fast.errors import DivergenceError
from der_fast.model.extractor import Extractor
from der_fast.model.layout import MaskLayout
from der_fast.training.context import Context
from der_fast.training.equality import checked_error
from der_fast.training.model import Network
from der_fast.training.state import LEARNING_RATE, StepState

# Block of channels that 16-bit tensor cores compute.
TENSOR_CORE_BLOCK = 8
# Size of the batch on which trained and compact extractor are compared.
_COMPARED = 64


@dataclass(frozen=True)
class PackedExtractor:
    """What a step's extractor became.

    Attributes:
        extractor: the form that is used from now on.
        plan: what was kept.
        error: relative error of the compact extractor against the trained one.
        kept: channels kept and in total, by group; None if nothing is pruned.
    """

    extractor: CompactExtractor
    plan: CompactionPlan
    error: float
    kept: dict[str, list[int]] | None


@dataclass(frozen=True)
class Packed:
    """A step's network, finished except for stages that train its classifier.

    Attributes:
        network: the whole network.
        newest: this step's extractor, the last of the network's bank.
    """

    network: Network
    newest: PackedExtractor


def packed_network(state: StepState, before: Network, frozen: FrozenBank, newest: PackedExtractor) -> Packed:
    """Assemble a step's network; its classifier is the state's, and changes with it.

    Args:
        state: the step.
        before: the network before the step.
        frozen: the extractors that stay.
        newest: this step's.
    """
    dense = {name: value.detach().cpu().clone() for name, value in state.extractor.state_dict().items()}
    bank = FrozenBank([*frozen.extractors, newest.extractor])
    return Packed(replace(before, bank=bank, head=state.head, dense=dense), newest)


def schedule_of(context: Context, step: int) -> ScheduleConfig:
    """The schedule of a step's representation stage (1-based)."""
    return context.config.first if step == 1 else context.config.later


def packed_extractor(context: Context, state: StepState, source: ImageSource, keep: Tensor | None = None) -> PackedExtractor:
    """Remove what is not kept, fold batch-norm into the rest, and compare the result with the trained extractor on a real batch.

    Args:
        context: settings and listeners.
        state: the step, with its trained extractor.
        source: the step's images.
        keep: boolean (C,), the channels that stay; default: all.

    Raises:
        DivergenceError: a batch-norm that cannot be folded.
        DerFastError: the compact network does not compute what the trained one does.
    """
    layout = MaskLayout(state.extractor.architecture)
    cut = keep is not None
    if keep is None:
        keep = torch.ones(layout.channels, dtype=torch.bool)
    decision = plan(layout, keep)
    kept = {name: [decision.widths[name], width] for name, width in layout.architecture.groups.items()}
    try:
        exact = CompactExtractor(pack(state.extractor, decision))
    except DivergenceError as problem:
        lr = schedule_of(context, state.step).lr
        raise DivergenceError(f"step {state.step}: {problem}. Lower the learning rate (now {lr:g}) with ", LEARNING_RATE, ".") from problem
    error = checked_error(context, state, keep, exact, decision, _some_images(context, source))
    arena = _final_arena(context, state.extractor, decision, exact.arena)
    return PackedExtractor(CompactExtractor(arena, context.dtype), decision, error, kept if cut else None)


def _final_arena(context: Context, extractor: Extractor, decision: CompactionPlan, exact: Arena) -> Arena:
    """Return the arena to keep: on a GPU in the run's precision, in the blocks of its tensor cores; on a CPU, whose executor
    computes in float32, the exact one."""
    if context.device.type != "cuda" or context.dtype == exact.dtype:
        return exact
    return pack(extractor, decision, dtype=context.dtype, align=TENSOR_CORE_BLOCK)


def _some_images(context: Context, source: ImageSource) -> Tensor:
    return next(iter(context.test_batches(source, torch.arange(min(_COMPARED, len(source)))))).images
