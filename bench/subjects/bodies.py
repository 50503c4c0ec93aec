"""One batch of every stage of a run as a function without arguments, as it would run on a GPU, so that its launches can be listed.

The backend is 'fused', with der_fast's kernels for every layer; what `auto` would measure is not known here. The frozen bank runs grouped,
which on a GPU is measured against parallel streams. The settled network has the dead channels that it has on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from unittest import mock

import torch
from torch import Tensor

from bench.harness.registry import Setting
from bench.subjects.networks import CLASSES, SharedNetworks
from bench.subjects.steps import Task
from der_fast.compaction.bank import FrozenBank
from der_fast.compaction.bank.extractor import CompactExtractor
from der_fast.compaction.bank.grouped import GroupedProgram
from der_fast.data import MemorySource
from der_fast.data.resident import ResidentImages
from der_fast.model.classifier import new_classifier
from der_fast.training.batch_step import BatchStep
from der_fast.training.classifier_stage import classifier_stage
from der_fast.training.feed import FeatureFeed, ResidentFeed
from der_fast.training.kept import KeptFeatures
from der_fast.training.methods.der import settled
from der_fast.training.methods.der.representation import RepresentationStage
from der_fast.training.packing import TENSOR_CORE_BLOCK
from der_fast.training.state import CLASSIFIER, REPRESENTATION

SETTLED = "settled"
# The same with the features of the frozen extractors kept.
KEPT = "kept"
# What runs before one batch in `sparsity.MOST_BATCHES` while masks are learned.
BETWEEN = "between"
# A share that the pruned networks here do not exceed, so that none of them is pruned further.
TARGET = 0.1


@dataclass(frozen=True)
class Moment:
    """A point of a run.

    Attributes:
        stage: 'representation', 'settled', 'kept', 'classifier' or 'between'.
        steps: t; t − 1 extractors are frozen, in the classifier stage all t.
        target: whether λ_s follows a share of the parameters.
    """

    stage: str
    steps: int
    target: bool


MOMENTS = tuple(
    Moment(stage, steps, target)
    for stage, steps in ((REPRESENTATION, 1), (REPRESENTATION, 10), (SETTLED, 1), (SETTLED, 10), (KEPT, 10), (CLASSIFIER, 10), (BETWEEN, 1))
    for target in (False, True)
)


class _OneNetwork(SharedNetworks):
    """Every frozen network is the same: launches depend on its widths, not on its weights."""

    @cached_property
    def _only(self) -> CompactExtractor:
        return super().compact(0, torch.bfloat16)

    def compact(self, number: int, dtype: torch.dtype) -> CompactExtractor:
        return self._only


class _GroupedBank(FrozenBank):
    """A bank that runs as on a GPU, on any device."""

    @cached_property
    def _program(self) -> GroupedProgram:
        members = [member for member in self.extractors if isinstance(member, CompactExtractor)]
        return GroupedProgram([member.arena for member in members], members[0].dtype)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        if not len(self):
            return super().forward(images)
        return self._program(images)


class Bodies:
    """The bodies of all moments, for one network, image size and batch.

    Args:
        batch: images per batch.
        smoke: a narrow network and small images.
    """

    def __init__(self, batch: int = 128, *, smoke: bool = False) -> None:
        self.batch = batch
        self.networks = _OneNetwork(Setting(torch.device("cpu"), "smoke" if smoke else "full", "fused"))

    def at(self, moment: Moment) -> Callable[[], None]:
        """Return the body of a batch; call this and the body under `launches.no_kernels`."""
        task = Task(self.networks, moment.steps, self.batch, 1, target=TARGET if moment.target else None)
        stage = task.stage(task.inputs(torch.Generator().manual_seed(0)), "bf16", "fused")
        if moment.stage == BETWEEN:
            assert stage.state.masks is not None
            return partial(stage.controller.follow, 0, stage.state.masks.logits.detach())
        step = self._classifier(stage, moment) if moment.stage == CLASSIFIER else self._representation(stage, moment)
        # The values make no difference to what is launched.
        return partial(step.body, torch.zeros(self.batch, dtype=torch.int64))

    def _bank(self, count: int) -> _GroupedBank:
        return _GroupedBank([self.networks.compact(number, torch.bfloat16) for number in range(count)])

    def _representation(self, stage: RepresentationStage, moment: Moment) -> BatchStep:
        stage.bank = self._bank(moment.steps - 1)
        kept = KeptFeatures(stage.context, stage.bank, stage.source, (KEPT,), 1, 2) if moment.stage == KEPT else None
        stage.feed = self._resident(stage, kept)
        if moment.stage in (SETTLED, KEPT):
            assert stage.state.masks is not None
            stage.state.masks.logits.data.copy_(self.networks.plan(0).masks.float() - 0.5)
            stage.settle_at = 0
            with mock.patch.object(settled, "settled_padding", lambda device: TENSOR_CORE_BLOCK):
                stage.begin_epoch()
        step = stage.batch_step()
        stage.before_batch(1)
        return step

    def _classifier(self, stage: RepresentationStage, moment: Moment) -> BatchStep:
        bank, state = self._bank(moment.steps), stage.state
        state.head = new_classifier(bank.features, moment.steps * CLASSES, torch.Generator().manual_seed(0))
        made = classifier_stage(stage.context, state, bank, stage.source)
        if not isinstance(made.feed, FeatureFeed):
            made.feed = self._resident(stage)
        return made.batch_step()

    def _resident(self, stage: RepresentationStage, kept: KeptFeatures | None = None) -> ResidentFeed:
        """The feed that a GPU would have."""
        source, context = stage.source, stage.context
        assert isinstance(source, MemorySource)
        images = ResidentImages(
            source.images, source.labels, context.train_transform, context.dtype, channels_last=True, backend=context.backend.name
        )
        return ResidentFeed(context, images, None, self.batch, kept)
