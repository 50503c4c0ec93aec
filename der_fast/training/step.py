"""One incremental step, from new images to a model that knows their classes (docs/method.md)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from der_fast.compaction import Arena, CompactionPlan, pack, plan
from der_fast.compaction.bank import FrozenBank
from der_fast.compaction.extractor import CompactExtractor
from der_fast.config.schema import ScheduleConfig
from der_fast.data.photos import PhotoSource
from der_fast.data.source import ImageSource
from der_fast.errors import DivergenceError
from der_fast.model.classifier import grow_classifier, new_classifier, slice_classifier
from der_fast.model.extractor import Extractor
from der_fast.model.layout import MaskLayout
from der_fast.model.masks import ChannelMasks
from der_fast.model.readout import linear_readout
from der_fast.seeds import generator
from der_fast.training.classifier_stage import train_classifier
from der_fast.training.context import Context
from der_fast.training.equality import checked_error
from der_fast.training.evaluation import features_by_class
from der_fast.training.memory import herding, quota, truncate
from der_fast.training.model import Model
from der_fast.training.progress import EpochRecord
from der_fast.training.pruning import final_keep, reestimate_batch_norm, settle
from der_fast.training.representation import RepresentationStage
from der_fast.training.state import CLASSIFIER, REPRESENTATION, StepState

# Channels that 16-bit tensor cores compute in.
TENSOR_CORE_BLOCK = 8


@dataclass(frozen=True)
class Pruned:
    """What a step's extractor became.

    Attributes:
        extractor: as it is used from now on.
        plan: what was kept.
        error: relative error of the compact network against the masked one.
        masked: whether the step had masks.
        saved_seconds: how much longer the settled epochs would have taken at the speed of those before; None where there were none.
    """

    extractor: CompactExtractor
    plan: CompactionPlan
    error: float
    masked: bool
    saved_seconds: float | None = None


def schedule_of(context: Context, step: int) -> ScheduleConfig:
    """The schedule of a step's representation stage (1-based)."""
    return context.config.first if step == 1 else context.config.later


def begin_step(context: Context, model: Model, new: int) -> StepState:
    """Build the parts of the next step: extractor, masks, classifier, auxiliary classifier.

    Args:
        context: settings.
        model: the model so far.
        new: number of new classes.
    """
    step, method, masks = len(model.class_sets) + 1, context.config.method, context.config.masks
    seed, known = context.seed, len(model.class_names)
    expands = method.expand and not method.bound
    extractor = Extractor(model.network.architecture)
    if model.network.dense is None or method.bound:
        extractor.initialise(generator(seed, "extractor", step))
    else:
        extractor.load_state_dict(model.network.dense)
    channel_masks = None
    if masks.enabled and expands:
        layout = MaskLayout(model.network.architecture)
        start = generator(seed, "mask logits")
        channel_masks = ChannelMasks(layout, low=masks.init_low, high=masks.init_high, clamp=masks.clamp, generator=start)
    features = extractor.features + (model.network.bank.features if expands else 0)
    head = grow_classifier(None if method.bound else model.network.head, features, known + new, generator(seed, "classifier", step))
    auxiliary = None
    if step > 1 and expands and method.aux_weight > 0:
        auxiliary = new_classifier(extractor.features, new + 1, generator(seed, "auxiliary classifier", step))
    state = StepState(step, extractor, channel_masks, head, auxiliary)
    for part in state.modules().values():
        part.to(context.device)
    if context.config.runtime.channels_last:
        extractor.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return state


def learn_step(context: Context, model: Model, state: StepState, train: ImageSource) -> tuple[Model, Pruned]:
    """Carry a step to its end, from wherever `state` stands; return the new model.

    Args:
        context: settings and listeners.
        model: the model before this step; left unchanged.
        state: the step in progress; changed in place.
        train: the new classes' training images; for the upper bound, those of all seen classes.

    Raises:
        DivergenceError: the loss is no longer finite.
        DerFastError: the compact network does not compute what the masked one does.
    """
    method, step = context.config.method, state.step
    known = model.class_names
    new = tuple(name for name in train.class_names if name not in known)
    source = rehearsal(model, train, method.bound)
    if isinstance(source, PhotoSource):
        state.unreadable = source.recall(state.unreadable)
    expands = method.expand and not method.bound
    frozen = model.network.bank if expands else FrozenBank()
    schedule = schedule_of(context, step)
    context.observer.step_begins(step, step, new, len(source))
    if state.stage == REPRESENTATION:
        RepresentationStage(context, state, frozen, source, len(known), schedule).run()
        for parameter in state.extractor.parameters():
            # It is not trained any more, but lives on until the step ends.
            parameter.grad = None
        _settle(context, state, source)
    pruned = _finish_extractor(context, state, source)
    bank = FrozenBank([*frozen.extractors, pruned.extractor])
    if state.stage == REPRESENTATION:
        _slice_head(context, state, frozen, pruned.plan)
        state.stage, state.epoch, state.momentum = CLASSIFIER, 0, {}
        context.save(state)
    trains_classifier = step > 1 and not method.bound and context.config.classifier.epochs > 0
    if trains_classifier:
        train_classifier(context, state, bank, source)
    dense = {name: value.detach().cpu().clone() for name, value in state.extractor.state_dict().items()}
    finished = replace(
        model,
        network=replace(model.network, bank=bank, head=state.head, dense=dense),
        readout=linear_readout(state.head, context.config.classifier.temperature if trains_classifier else 1.0),
        class_sets=[*model.class_sets, new],
    )
    finished.memory = None if method.bound else refill(context, finished, model.memory, train)
    return finished, replace(pruned, saved_seconds=_saved_seconds(state.records, context.device))


def _saved_seconds(records: Sequence[EpochRecord], device: torch.device) -> float | None:
    """What the compact network saved in the settled epochs, by the median time of an epoch before and after.

    On a CPU that is the processor's time, shared by its threads: what else the machine does meanwhile is not in it. None where it
    cannot be told, as where less than nothing seems to have been saved.
    """
    times: tuple[list[float], list[float]] = ([], [])
    for record in records:
        spent = record.processor_seconds if device.type == "cpu" else record.seconds
        if record.stage == REPRESENTATION and spent is not None:
            times[record.settled].append(spent)
    masked, compact = times
    if not masked or not compact:
        return None
    saved = len(compact) * (statistics.median(masked) - statistics.median(compact))
    return None if saved < 0 else saved / (torch.get_num_threads() if device.type == "cpu" else 1)


def rehearsal(model: Model, train: ImageSource, bound: bool) -> ImageSource:
    """Return D̃_t: the new images and the memory, labelled over all seen classes in learning order."""
    new = [name for name in train.class_names if name not in model.class_names]
    named = train.relabelled((*model.class_names, *new))
    if model.memory is None or bound:
        return named
    return named.concatenated(model.memory.relabelled(named.class_names))


def refill(context: Context, model: Model, memory: ImageSource | None, train: ImageSource) -> ImageSource | None:
    """Shrink the memory to the new quota and choose the best exemplars of the classes of `train`, by herding.

    Args:
        context: settings.
        model: the finished model, which already knows the new classes.
        memory: the memory before this step.
        train: the new classes' images, and further ones of known classes, which are chosen among together with the memory's.
    """
    names = model.class_names
    count = quota(context.config.memory, len(names))
    if not count:
        return None
    parts = []
    if memory is not None:
        kept, whole = truncate(memory, count).relabelled(names), memory.relabelled(names)
        again = torch.tensor([names.index(name) for name in train.class_names if name in memory.class_names], dtype=torch.int64)
        parts = [kept.subset(torch.isin(kept.labels, again, invert=True).nonzero().flatten())]
        rivals = torch.isin(whole.labels, again).nonzero().flatten()
        if len(rivals):
            train = train.relabelled(names).concatenated(whole.subset(rivals))
    largest = 0
    for _, positions, features in features_by_class(context, model.network.bank, train):
        parts.append(train.subset(positions[herding(features, count)]).relabelled(names))
        # Herding ranks in double precision, twice: as given and normalised.
        largest = max(largest, features.numel() * (features.element_size() + 2 * 8))
    if isinstance(train, PhotoSource):
        train.library.say(f"herding over {len(train):,} images, class by class: at most {largest / 2**20:.1f} MiB of features at a time")
    chosen = parts[0]
    for part in parts[1:]:
        chosen = chosen.concatenated(part)
    return chosen


def _settle(context: Context, state: StepState, source: ImageSource) -> None:
    """Return to the full network, make the masks binary and re-estimate batch-norm with them."""
    if state.masks is None:
        return
    started = time.perf_counter()
    state.expand()
    config = context.config.masks
    binary = settle(state.masks, config).float().to(context.device)
    state.mask_log.add(state.epoch, state.masks.logits)
    reestimate_batch_norm(
        state.extractor,
        binary,
        source,
        context.train_transform,
        images=config.bn_images,
        generator=generator(context.seed, "batch-norm", state.step),
        device=context.device,
        channels_last=context.config.runtime.channels_last,
        told=partial(context.observer.images_pass, "batch-norm statistics"),
    )
    state.elapsed += time.perf_counter() - started


def _finish_extractor(context: Context, state: StepState, source: ImageSource) -> Pruned:
    """Cut away what is pruned, fold batch-norm into the rest, and compare the result with the masked network on a real batch."""
    layout = MaskLayout(state.extractor.architecture)
    keep = torch.ones(layout.channels, dtype=torch.bool)
    if state.masks is not None:
        keep = final_keep(state.masks, context.config.masks)
    decision = plan(layout, keep)
    try:
        exact = CompactExtractor(pack(state.extractor, decision))
    except DivergenceError as problem:
        lr = schedule_of(context, state.step).lr
        raise DivergenceError(f"step {state.step}: {problem}. Lower the learning rate (now {lr:g}) with --lr.") from problem
    error = checked_error(context, state, keep, exact, decision, _some_images(context, source))
    arena = _final_arena(context, state.extractor, decision, exact.arena)
    return Pruned(CompactExtractor(arena, context.dtype), decision, error, state.masks is not None)


def _final_arena(context: Context, extractor: Extractor, decision: CompactionPlan, exact: Arena) -> Arena:
    """Return the arena that is kept: on a GPU in the run's precision, in the blocks of its tensor cores; on a CPU, whose executor
    computes in float32, the exact one."""
    if context.device.type != "cuda" or context.dtype == exact.dtype:
        return exact
    return pack(extractor, decision, dtype=context.dtype, align=TENSOR_CORE_BLOCK)


def _some_images(context: Context, source: ImageSource) -> Tensor:
    indices = torch.arange(min(64, len(source)))
    runtime = context.config.runtime
    batches = source.batches(indices, 64, transform=context.test_transform, device=context.device, channels_last=runtime.channels_last)
    return next(iter(batches)).images


def _slice_head(context: Context, state: StepState, frozen: FrozenBank, decision: CompactionPlan) -> None:
    """Let the classifier read the kept features only, unless it does since the masks settled; constant features move into its bias."""
    if state.head.in_features == frozen.features + int(decision.features.sum()):
        return
    old = torch.ones(frozen.features, dtype=torch.bool)
    keep = torch.cat([old, decision.features]).to(context.device)
    constant = None
    if decision.constant:
        note = (
            f"step {state.step}: a residual stream kept no channel, so the new extractor adds nothing and was dropped. "
            "Lower masks.sparsity or set masks.floor."
        )
        state.notes.append(note)
        context.observer.message(note)
        constant = torch.cat([torch.zeros(frozen.features), _constant_features(context, state)]).to(context.device)
    state.head = slice_classifier(state.head, keep, constant)


@torch.no_grad()
def _constant_features(context: Context, state: StepState) -> Tensor:
    """What the masked extractor makes of any image once one of its streams is empty."""
    assert state.masks is not None
    binary = final_keep(state.masks, context.config.masks).float().to(context.device)
    height, width = context.test_transform.size
    state.extractor.eval()
    features: Tensor = state.extractor(torch.zeros(1, 3, height, width, device=context.device), binary)
    return features[0].cpu()
