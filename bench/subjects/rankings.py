"""Rivals of learned masks: one-shot rankings of channels, chosen where the masks would settle.

Until then the network is trained unmasked. Then every channel gets a score, and its rank within its group becomes its logit. Groups,
prices, the budget and the epochs that remain are those of learned masks, so nothing differs but which channels of a group stay.

The scores are written here because torch-pruning (1.6.1), which has the same, does not see our groups: it follows ResNet-20's shortcuts,
which append zero channels, as one group of 16 channels, and misses those that stages 2 and 3 append.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from der_fast.model.classifier import auxiliary_targets
from der_fast.model.extractor import Convolution, Extractor, MaskedBatchNorm
from der_fast.model.layout import MaskLayout
from der_fast.seeds import generator
from der_fast.training.context import Context
from der_fast.training.methods import METHODS, register
from der_fast.training.methods.der.mask_log import MaskLog
from der_fast.training.methods.der.method import Der
from der_fast.training.methods.der.representation import RepresentationStage
from der_fast.training.methods.der.state import DerState
from der_fast.training.packing import Packed

# Masks of exactly 1 until the ranking is made: no rounding of σ(50·s) is below 1 where s is about 1.
HELD_OPEN: Mapping[str, Any] = {
    "masks.lr": 0.0,
    "masks.init_low": 50.0,
    "masks.init_high": 50.0,
    "masks.clamp": 100.0,
    "masks.s_max": 1.001,
    "masks.sparsity": 0.0,
}


class RankedStage(RepresentationStage):
    """A representation stage whose masks are set from scores (C,) when they settle; larger ones stay."""

    def __init__(self, *given: Any, score: Callable[[RankedStage], Tensor]) -> None:
        super().__init__(*given)
        self.score = score

    def begin_epoch(self) -> None:
        """See `Stage.begin_epoch`."""
        masks = self.state.masks
        if masks is not None and self.state.epoch == self.settle_at:
            masks.logits.data.copy_(ranks(masks.layout, self.score(self).cpu()))
        super().begin_epoch()


def ranks(layout: MaskLayout, scores: Tensor) -> Tensor:
    """Return each channel's rank within its group, (C,), evenly spaced in (0, 1), the largest score highest."""
    found = torch.empty(layout.channels)
    for name, part in layout.by_group(scores).items():
        layout.by_group(found)[name].copy_((part.argsort().argsort() + 0.5) / len(part))
    return found


def random_draw(stage: RankedStage) -> Tensor:
    """Random scores, the same at every step: the next extractor starts from the channels that this one has trained."""
    return torch.rand(MaskLayout(stage.state.extractor.architecture).channels, generator=generator(stage.context.seed, "random ranking"))


def magnitude(stage: RankedStage) -> Tensor:
    """The norm of a channel's filters in all convolutions that write it (Li et al. 2017; Fang et al. 2023 for groups)."""
    architecture = stage.state.extractor.architecture
    layout = MaskLayout(architecture)
    squares = torch.zeros(layout.channels)
    convs = [module for module in stage.state.extractor.modules() if isinstance(module, Convolution)]
    for conv, module in zip(architecture.convs(), convs, strict=True):
        squares[layout.slice_of(conv.target)] += module.weight.detach().square().sum((1, 2, 3)).cpu()
    return squares.sqrt()


def bn_scale(stage: RankedStage) -> Tensor:
    """Σ |γ| over all batch-norms of a channel (Liu et al. 2017, without their penalty on γ)."""
    total = torch.zeros(MaskLayout(stage.state.extractor.architecture).channels)
    for norm in _norms(stage.state.extractor):
        total[norm.where] += norm.weight.detach().abs().cpu()
    return total


def saliency(stage: RankedStage) -> Tensor:
    """The squared derivative of the loss by a channel's mask, at masks of 1, mean over one epoch's batches (Molchanov et al. 2019)."""
    context, state = stage.context, stage.state
    masks = torch.ones(MaskLayout(state.extractor.architecture).channels, device=context.device, requires_grad=True)
    total = torch.zeros_like(masks)
    draws = generator(context.seed, "saliency", state.step)
    with _statistics_kept(state.extractor):
        for batch in context.training_batches(stage.source, None, stage.schedule.batch_size, draws):
            with torch.no_grad():
                old = context.features(stage.bank, batch.images)
            new = context.features(state.extractor, batch.images, masks)
            loss = F.cross_entropy(state.head(torch.cat([old, new], 1)), batch.labels)
            if state.auxiliary is not None:
                auxiliary = F.cross_entropy(state.auxiliary(new), auxiliary_targets(batch.labels, stage.known))
                loss = loss + context.config.method.aux_weight * auxiliary
            total += torch.autograd.grad(loss, masks)[0].square()
    return total.detach()


def _norms(extractor: Extractor) -> list[MaskedBatchNorm]:
    return [module for module in extractor.modules() if isinstance(module, MaskedBatchNorm)]


@contextmanager
def _statistics_kept(extractor: Extractor) -> Iterator[None]:
    """Training mode, but running statistics stay as they are: a rival that looks at the network must not change it."""
    norms = _norms(extractor)
    usual = [norm.momentum for norm in norms]
    extractor.train()
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, usual, strict=True):
            norm.momentum = momentum


class Studied(Der):
    """DER with one more figure, and with a ranking instead of learned masks if there is a score."""

    figures: Mapping[str, tuple[str, str]] = {
        **Der.figures,
        "rank_correlation": (
            "by group",
            "of the logits before the cut with those at the start, within a group; null without learned masks",
        ),
    }

    def __init__(self, score: Callable[[RankedStage], Tensor] | None = None) -> None:
        if score is not None:
            self.stage = partial(RankedStage, score=score)

    def facts(self, context: Context, state: DerState, packed: Packed) -> dict[str, Any]:
        """See `Method.facts`."""
        found = None if state.masks is None else rank_correlation(state.masks.layout, state.mask_log)
        return {**super().facts(context, state, packed), "rank_correlation": found}


def rank_correlation(layout: MaskLayout, log: MaskLog) -> dict[str, float] | None:
    """Return Spearman's correlation of a step's first logits with the last before the cut, for every group of at least three channels.

    None if the logits start all equal, so that there is no order.
    """
    # Two rows with the same time are from before and after a cut.
    before = next(number for number in range(len(log.times) - 1) if log.times[number] == log.times[number + 1])
    first, last = (layout.by_group(log.logits[number]) for number in (0, before))
    if all(bool((part == part[0]).all()) for part in first.values()):
        return None
    pairs = {name: torch.stack([first[name], last[name]]).argsort(1).argsort(1).double() for name in layout.names}
    return {name: round(float(torch.corrcoef(pair)[0, 1]), 3) for name, pair in pairs.items() if pair.shape[1] >= 3}


RANKINGS: Mapping[str, Callable[[RankedStage], Tensor]] = {
    "random": random_draw,
    "magnitude": magnitude,
    "bn_scale": bn_scale,
    "saliency": saliency,
}


def method_name(ranking: str | None) -> str:
    """Return the name of a method that ranks like this, registered if it is not yet; without a ranking, masks are learned."""
    name = "der, studied" if ranking is None else f"der, {ranking}"
    if name not in METHODS:
        register(name, Studied(None if ranking is None else RANKINGS[ranking]))
    return name
