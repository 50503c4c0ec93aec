"""DER: every step adds an extractor to the frozen ones, and its channel masks prune it at the end (Yan et al. 2021)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from der_fast.compaction import CompactionPlan
from der_fast.compaction.bank import FrozenBank
from der_fast.config.schema import Config
from der_fast.data.source import ImageSource
from der_fast.model.classifier import grow_classifier, new_classifier, slice_classifier
from der_fast.model.extractor import Extractor
from der_fast.model.layout import MaskLayout
from der_fast.model.masks import ChannelMasks
from der_fast.model.readout import Readout
from der_fast.seeds import generator
from der_fast.training.classifier_stage import classifier_readout, has_classifier_stage, train_classifier
from der_fast.training.context import Context
from der_fast.training.method import Split, placed
from der_fast.training.methods.der.batch_norm import reestimate_batch_norm
from der_fast.training.methods.der.pruning import binarise, final_keep, thresholds
from der_fast.training.methods.der.representation import RepresentationStage
from der_fast.training.methods.der.state import DerState
from der_fast.training.model import Model
from der_fast.training.packing import Packed, packed_extractor, packed_network, schedule_of
from der_fast.training.progress import EpochRecord
from der_fast.training.rehearsal import new_names
from der_fast.training.state import CLASSIFIER, REPRESENTATION


class Der:
    """See `der_fast.training.method.Method`.

    Attributes:
        stage: makes the representation stage; a method that chooses channels otherwise has another one.
    """

    joint = False
    stage: Callable[..., RepresentationStage] = RepresentationStage
    figures: Mapping[str, tuple[str, str]] = {
        "saved_seconds": (
            "seconds",
            "how much longer the settled epochs would have taken on the masked network; null if there were none or it is unknown",
        ),
    }

    def begin(self, context: Context, model: Model, train: ImageSource) -> DerState:
        """Build the parts of the next step."""
        return begin_step(context, model, len(new_names(model, train)))

    def split(self, context: Context, model: Model, train: ImageSource) -> Split:
        """All of them, none held out."""
        return train, None

    def train(self, context: Context, model: Model, state: DerState, source: ImageSource) -> None:
        """The representation stage, which ends with binary masks."""
        if state.stage != REPRESENTATION:
            return
        schedule = schedule_of(context, state.step)
        self.stage(context, state, model.network.bank, source, len(model.class_names), schedule).run()
        state.drop_gradients()
        _end_representation(context, state, source)

    def pack(self, context: Context, model: Model, state: DerState, source: ImageSource) -> Packed:
        """Prune the new extractor; the classifier reads its remaining features."""
        keep = None if state.masks is None else final_keep(state.masks, context.config.masks)
        newest = packed_extractor(context, state, source, keep)
        frozen = model.network.bank
        if state.stage != CLASSIFIER:
            _slice_head(context, state, frozen, newest.plan)
            state.enter(CLASSIFIER)
            context.save(state)
        return packed_network(state, model.network, frozen, newest)

    def finish(self, context: Context, model: Model, state: DerState, source: ImageSource, held: ImageSource | None) -> None:
        """The classifier stage."""
        if has_classifier_stage(context, state.step):
            train_classifier(context, state, model.network.bank, source)

    def readout(self, context: Context, model: Model, state: DerState) -> Readout:
        """The linear classifier."""
        return classifier_readout(context, state)

    def facts(self, context: Context, state: DerState, packed: Packed) -> dict[str, Any]:
        """The time saved in the settled epochs."""
        return {"saved_seconds": saved_seconds(state.records, context.device)}

    def label(self, config: Config) -> str:
        """'pruned' or 'unpruned', and what else is switched off."""
        parts = ["pruned" if config.masks.enabled else "unpruned"]
        return ", ".join([*parts, *(["without auxiliary loss"] if config.method.aux_weight == 0 else [])])


def begin_step(context: Context, model: Model, new: int) -> DerState:
    """Build the parts of the next step: extractor, masks, classifier, auxiliary classifier.

    Args:
        context: settings.
        model: the model so far.
        new: number of new classes.
    """
    step, masks = len(model.class_sets) + 1, context.config.masks
    network, seed = model.network, context.seed
    extractor = Extractor(network.architecture)
    if network.dense is None:
        extractor.initialise(generator(seed, "extractor", step))
    else:
        extractor.load_state_dict(network.dense)
    state = DerState(step, {"extractor": extractor})
    if masks.enabled:
        layout, start = MaskLayout(network.architecture), generator(seed, "mask logits")
        state.parts["masks"] = ChannelMasks(layout, low=masks.init_low, high=masks.init_high, clamp=masks.clamp, generator=start)
    features, known = extractor.features + network.bank.features, len(model.class_names)
    state.parts["head"] = grow_classifier(network.head, features, known + new, generator(seed, "classifier", step))
    if step > 1 and context.config.method.aux_weight > 0:
        state.parts["auxiliary"] = new_classifier(extractor.features, new + 1, generator(seed, "auxiliary classifier", step))
    return placed(context, state)


def saved_seconds(records: Sequence[EpochRecord], device: torch.device) -> float | None:
    """Return the time that the compact network saved in the settled epochs, from the median time of an epoch before and after.

    On a CPU this is processor time, divided by the number of threads: it excludes other load on the machine. None if unknown, for
    example because the difference is negative.
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


def _end_representation(context: Context, state: DerState, source: ImageSource) -> None:
    """Return to the full network, make the masks binary and re-estimate batch-norm with them."""
    if state.masks is None:
        return
    started = time.perf_counter()
    state.expand()
    config = context.config.masks
    needed = thresholds(state.masks, config)
    binary = binarise(state.masks, config).float().to(context.device)
    state.mask_log.add(state.epoch, state.masks.logits, needed)
    reestimate_batch_norm(context, state.extractor, binary, source, generator(context.seed, "batch-norm", state.step))
    state.elapsed += time.perf_counter() - started


def _slice_head(context: Context, state: DerState, frozen: FrozenBank, decision: CompactionPlan) -> None:
    """Make the classifier read the kept features only, if it does not already; constant features move into its bias."""
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
def _constant_features(context: Context, state: DerState) -> Tensor:
    """The masked extractor's features for any image once one of its streams is empty."""
    assert state.masks is not None
    binary = final_keep(state.masks, context.config.masks).float().to(context.device)
    height, width = context.test_transform.size
    state.extractor.eval()
    features: Tensor = state.extractor(torch.zeros(1, 3, height, width, device=context.device), binary)
    return features[0].cpu()
